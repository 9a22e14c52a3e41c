"""A frozen eager module against the same float module; prints a markdown table of times and ratios.

    python bench/eager.py                                   # nn.Linear, 256 to 4096, 1 to 512 rows
    python bench/eager.py --sizes 256,1024 --rows 1,8 --weights qint4 --activations qint8

The kinds take turns of a few calls each, the first of a turn uncounted; times are medians of single calls of the module, in
microseconds. A ratio above 1 means slower than float. Layers that fit are measured in cache, as float is.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics

from benchkit.timing import alternate


def main() -> None:
    args = _arguments()

    import torch

    import qcompile
    from qcompile.kernels.cpu import build

    if args.threads:
        torch.set_num_threads(args.threads)
    build.ensure_loaded()
    torch.manual_seed(0)
    names = args.weights.split(",")
    machine = f"{torch.get_num_threads()} threads, {build.isa()}, torch {torch.__version__}"
    print(f"\nnn.Linear(n, n), eager, activations {args.activations or 'float'}, {machine}, load {os.getloadavg()[0]:.1f}")
    print(f"| n | M | float32 us | {' | '.join(f'{name} us | ratio' for name in names)} |")
    print(f"|{' --- |' * (3 + 2 * len(names))}", flush=True)
    worst = 0.0
    with torch.no_grad():
        for size in (int(n) for n in args.sizes.split(",")):
            layer = torch.nn.Linear(size, size)
            kinds: dict[str, torch.nn.Module] = {"float32": layer}
            for name in names:
                quantized = qcompile.quantize(copy.deepcopy(layer), weights=name, activations=args.activations)
                if args.activations:
                    qcompile.calibrate(quantized, [torch.randn(64, size)])
                kinds[name] = qcompile.freeze(quantized)
            for rows in (int(m) for m in args.rows.split(",")):
                x = torch.randn(rows, size)
                calls = {name: (lambda module=module, x=x: module(x)) for name, module in kinds.items()}
                times = alternate(calls, args.seconds, turn=0.0005)
                base = statistics.median(times["float32"])
                cells = [str(size), str(rows), f"{base * 1e6:.1f}"]
                for name in names:
                    typical = statistics.median(times[name])
                    worst = max(worst, typical / base)
                    cells += [f"{typical * 1e6:.1f}", f"{typical / base:.2f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nworst ratio {worst:.2f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,512,1024,4096", help="n of the layers, comma separated")
    parser.add_argument("--rows", default="1,2,4,8,16,32,128,512", help="rows of x, comma separated")
    parser.add_argument("--weights", default="qint8,qint4", help="comma separated")
    parser.add_argument("--activations", default=None, help="a dtype, to quantize and calibrate them, too")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size and number of rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
