"""One linear layer, int4 and int8, against ``torch.compile`` in float32, in alternating order; prints a markdown table.

    python bench/layer.py                          # 4096 x 4096, the instruction set that the machine runs best
    python bench/layer.py --emulate-avx2           # as a processor without AVX-512 would run it, torch included
    python bench/layer.py --n 576 --k 1536 --rows 1,32

Weights rotate among enough copies to leave a 32 MiB cache, so that few rows are measured from memory, where a model's
weights are. The kinds take turns of a few calls each, the first of a turn uncounted: in it the threads of the kind
before may still be spinning. Times are medians of single calls, in milliseconds; "memory" is the share of the bandwidth
measured in the same run, by summing float32 that is not in a cache either, that a layer's packed bytes are read at.
Compare columns of one run, not runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "QCOMPILE_ISA": "avx2",
}
CACHE = 32 << 20


def main() -> None:
    args = _arguments()
    if args.emulate_avx2 and any(os.environ.get(k) != v for k, v in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})

    import torch

    from qcompile.kernels.cpu import build

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.emulate_avx2:
        torch._inductor.config.cpp.simdlen = 256
    loaded = build.ensure_loaded()
    if not loaded.loaded:
        raise SystemExit(build.status())
    schemes = [_scheme(name) for name in args.schemes.split(",")]
    rows = [int(m) for m in args.rows.split(",")]
    torch.manual_seed(0)
    floats = [torch.randn(args.n, args.k) for _ in range(2 + 2 * CACHE // (args.n * args.k * 4))]
    packs = {name: _packed(args.n, args.k, bits, group) for name, bits, group in schemes}
    machine = f"{torch.get_num_threads()} threads, {build.isa()}, torch {torch.__version__}"
    print(f"\n{args.n} x {args.k}, {machine}, {'best' if args.best else 'median'}")
    header = ["M", "float32 ms"]
    for name, _, _ in schemes:
        header += [f"{name} ms", "speed-up", "memory"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}", flush=True)
    for m in rows:
        _row(m, args.k, args.n, floats, packs, args)


def _row(m: int, k: int, n: int, floats: list, packs: dict, args: argparse.Namespace) -> None:
    import torch

    x = torch.randn(m, k)
    linear = torch.compile(torch.nn.functional.linear, dynamic=False)
    op = torch.ops.qcompile.linear_tiled.default
    calls: dict[str, Callable[[int], object]] = {"float32": lambda i: linear(x, floats[i % len(floats)])}
    for name, tiled in packs.items():
        calls[name] = lambda i, t=tiled: op(  # type: ignore[misc]
            x, t[i % len(t)].codes, t[i % len(t)].scale, t[i % len(t)].zero, None, t[0].bits, t[0].group_size, n,
            "none", None, None, False, args.exact,
        )  # fmt: skip
    streams = torch.randn(16, CACHE >> 3)  # 16 MiB each, so that a piece has left the cache when its turn comes again
    calls["read"] = lambda i: streams[i % len(streams)].sum()
    with torch.inference_mode():
        times = _alternate(calls, args.seconds)
    typical = min if args.best else statistics.median
    bandwidth = streams[0].nbytes / typical(times["read"])
    base = typical(times["float32"])
    cells = [str(m), f"{base * 1e3:.2f}"]
    for name, tiled in packs.items():
        t = typical(times[name])
        cells += [f"{t * 1e3:.3f}", f"{base / t:.1f}x", f"{tiled[0].nbytes / t / bandwidth:.0%}"]
    print(f"| {' | '.join(cells)} | read {bandwidth / 1e9:.1f} GB/s", flush=True)


def _alternate(calls: dict[str, Callable[[int], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, the kinds taking turns of five calls until the time is up; the first turns don't count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, turn, index = time.perf_counter(), 0, 0
    while turn < 3 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            for i in range(5):
                begin = time.perf_counter()
                call(index)
                index += 1
                if i > 0 and turn > 0:
                    times[name].append(time.perf_counter() - begin)
        turn += 1
    return times


def _packed(n: int, k: int, bits: int, group: int) -> list:
    import torch

    from qcompile.kernels.layouts.tiled import Geometry, pack

    groups = Geometry.of(k, group).groups
    copies = 2 + 2 * CACHE // (n * k * bits // 8)
    return [
        pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), torch.rand(n, groups), None, bits, group)
        for _ in range(copies)
    ]


def _scheme(name: str) -> tuple[str, int, int]:
    """``int4g128`` -> ("int4g128", 4, 128); ``int8`` is per channel."""
    bits, _, group = name.removeprefix("int").partition("g")
    if bits not in ("2", "3", "4", "5", "6", "8") or (group and not group.isdigit()):
        raise SystemExit(f"scheme {name!r}: give int2, int3, int4, int5, int6 or int8, with a group size as in int4g128")
    return name, int(bits), int(group or 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="out_features")
    parser.add_argument("--k", type=int, default=4096, help="in_features")
    parser.add_argument("--rows", default="1,2,4,8,16,32,128,512", help="rows of x, comma separated")
    parser.add_argument("--schemes", default="int4g128,int8", help="comma separated: intB or intBgGROUP")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of rows")
    parser.add_argument("--best", action="store_true", help="the least time instead of the median: on a busy machine")
    parser.add_argument("--exact", action="store_true", help="float32 activations in the kernel")
    parser.add_argument("--emulate-avx2", action="store_true", help="hold torch and the kernels to AVX2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
