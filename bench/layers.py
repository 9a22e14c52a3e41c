"""One linear layer on weights from memory: qcompile against ONNX Runtime and ``torch.compile`` in float32, in turns.

    python bench/layers.py                                        # the four shapes, int4 in groups of 128 and int8
    python bench/layers.py --shapes 4096x4096 --rows 1,32 --schemes int4g128,int8,int2g64
    python bench/layers.py --emulate-avx2                         # as a processor without AVX-512 would run it

Shapes are out_features x in_features. A round goes through so many copies of a layer that none is in a cache when its turn
comes again (two where more than 64 rows make the weight's way from memory unimportant); a time is the median round, divided
by the copies, in milliseconds. "memory" is the share of the bandwidth, measured in the same turns, at which the packed
bytes are read. ``int8`` has one scale a row; ONNX Runtime has no such scheme and is given groups of 128 (``int8g128``).
ONNX Runtime is ``MatMulNBits`` at accuracy level 4: it rounds activations to int8 as we do, block by block. "floor" is
what the machine allows: the bytes at that bandwidth, or the multiply-adds at the rate at which it multiplies bytes in
registers on all threads, whichever takes longer. ``per token`` and ``static``: ours where the model asks for int8
activations, with a scale a row of x or one. Results are compared before they are timed.

All are called as models call them, many layers at once: ours are programs of up to 32 layers in memory of large pages, as
compiled models have them, float32's programs of 8, ONNX Runtime's nodes of one graph.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial

import torch
from benchkit import command, machine, peers
from benchkit.peak import floor, peak
from benchkit.records import Record, table
from benchkit.timing import medians, undisturbed
from torch import Tensor

SHAPES = "4096x4096,11008x4096,4096x14336,1536x576"
ROWS = "1,2,4,8,16,32,128,512"
FLOATS = 8  # float32 layers of a program
MOST = 4096  # copies, of small layers
PAUSE = 0.1  # ONNX Runtime's threads go on spinning for a while after a run


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)
    threads = machine.use_threads(args.threads)
    print(machine.summary(), flush=True)
    records: list[Record] = []
    for shape in args.shapes.split(","):
        for scheme in args.schemes.split(","):
            records += _layer(shape, scheme, args.rows, threads, args.seconds)
    for scheme in filter(None, args.also.split(",")):
        records += _layer(args.shapes.split(",")[0], scheme, "1", threads, args.seconds)
    command.finish(args, "layers", records)


def _layer(shape: str, scheme: str, rows_of_x: str, threads: int, seconds: float) -> list[Record]:
    from qcompile.kernels.cpu import build
    from qcompile.kernels.memory import give_back

    torch.compiler.reset()  # programs hold the weights of the layer before; what is left of memory is in small pieces
    gc.collect()
    give_back()
    n, k = (int(size) for size in shape.split("x"))
    name, bits, group = parse_scheme(scheme)
    torch.manual_seed(0)
    copies = _copies(n * k * bits // 8)
    weights = [_weight(n, k, bits, group or k) for _ in range(copies)]
    ours, packed = _ours(weights, bits, group)
    kinds: dict[str, Callable[[Tensor], tuple[Callable[[], object], int]]] = {"qcompile": ours}
    if bits == 8:
        kinds["per token"] = partial(ours, per_row=True)
        kinds["static"] = partial(ours, x_scale=torch.tensor(0.03))
    wide = [torch.randn(n, k) for _ in range(-(-_copies(4 * n * k) // FLOATS) * FLOATS)]
    kinds["float32 compiled"] = _float32(wide)
    size = group or 128  # of ONNX Runtime's groups
    if bits in (4, 8) and peers.available("onnxruntime", "onnx"):
        given = weights if group == size else [_weight(n, k, bits, size) for _ in range(copies)]
        kinds["onnxruntime"] = _onnxruntime(given, bits, size, threads)
    print(f"\n{shape}, {name}, {copies} copies of {packed / 1e6:.1f} MB", flush=True)
    read, streamed = machine.reader()
    records, rows = [], []
    with torch.inference_mode(), undisturbed():
        for m in (int(m) for m in rows_of_x.split(",")):
            x = torch.randn(m, k)
            calls, counts = {}, {}
            for kind, make in kinds.items():
                calls[kind], counts[kind] = make(x)
            if "onnxruntime" in calls and group == size:
                _compare(calls["qcompile"](), calls["onnxruntime"](), m)
            calls["read"] = read
            most = peak(str(build.isa()), bits, threads)
            times = medians(calls, seconds, pause=PAUSE if "onnxruntime" in calls else 0.0)
            bandwidth = streamed / times.pop("read")
            layer = {kind: t / counts[kind] for kind, t in times.items()}
            own = layer["qcompile"]
            case = {"shape": shape, "scheme": name, "M": m}
            records += [Record(case, kind, t * 1e3, "ms") for kind, t in layer.items()]
            records.append(Record(case, "of bandwidth", packed / own / bandwidth, "share"))
            least = floor(packed, bandwidth, n * k * m, most)
            records.append(Record(case, "floor", least * 1e3, "ms"))
            row = [str(m), _ms(own), f"{packed / own / bandwidth:.0%}", _ms(least)]
            for kind in kinds:
                row += [] if kind == "qcompile" else [_ms(layer[kind]), f"{layer[kind] / own:.2f}x"]
            rows.append([*row, f"{bandwidth / 1e9:.1f}"])
    rest = [column for kind in kinds if kind != "qcompile" for column in (f"{kind} ms", "qcompile is")]
    print(table(["M", "qcompile ms", "memory", "floor ms", *rest, "read GB/s"], rows), flush=True)
    return records


def _copies(size: int) -> int:
    """Of a layer of so many bytes: none is in a cache when its turn comes again, unless that would be very many."""
    return min(1 + -(-2 * machine.cache_bytes() // size), MOST)


def _ours(weights: list[tuple[Tensor, Tensor]], bits: int, group: int) -> tuple[Callable, int]:
    from benchkit.own_layers import linears

    from qcompile.kernels.cpu import build

    if not build.ensure_loaded().loaded:
        raise SystemExit(build.status())
    return linears(weights, bits, group)


def _float32(weights: list[Tensor]) -> Callable:
    linears = torch.compile(lambda x, few: [torch.nn.functional.linear(x, w) for w in few], dynamic=False)

    def bind(x: Tensor) -> tuple[Callable[[], object], int]:
        used = weights if len(x) <= 64 else weights[:2]
        programs = [used[i : i + FLOATS] for i in range(0, len(used), FLOATS)]

        def turn() -> None:
            for few in programs:
                linears(x, few)

        return turn, len(used)

    return bind


def _onnxruntime(weights: list[tuple[Tensor, Tensor]], bits: int, group: int, threads: int) -> Callable:
    from benchkit.onnx_layers import matmul_nbits

    few = matmul_nbits(weights, bits, group, 4, threads)
    many = matmul_nbits(weights[:2], bits, group, 4, threads)

    def bind(x: Tensor) -> tuple[Callable[[], object], int]:
        return (few(x), len(weights)) if len(x) <= 64 else (many(x), min(2, len(weights)))

    return bind


def _weight(n: int, k: int, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[n, k]`` and float32 scales: some weight of that scheme; the values do not change the time."""
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), torch.rand(n, -(-k // group)) * 0.01 + 0.005


def _compare(ours: object, theirs: object, rows: int) -> None:
    """Raise where two engines disagree on the same codes: then at least one does something else."""
    a, b = (torch.as_tensor(y).double() for y in (ours, theirs))
    error = float((a - b).norm() / b.norm())
    if a.shape != b.shape or not error < 0.03:
        raise SystemExit(f"{rows} rows: results differ by {error:.1%}, shapes {tuple(a.shape)} and {tuple(b.shape)}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def parse_scheme(name: str) -> tuple[str, int, int]:
    """``int4g128`` -> ("int4g128", 4, 128); ``int8`` is per channel, group 0."""
    bits, _, group = name.removeprefix("int").partition("g")
    if bits not in ("2", "3", "4", "5", "6", "8") or (group and not group.isdigit()):
        raise SystemExit(f"scheme {name!r}: give int2, int3, int4, int5, int6 or int8, with a group size as in int4g128")
    return name, int(bits), int(group or 0)


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="out_features x in_features, comma separated")
    parser.add_argument("--rows", default=ROWS, help="rows of x, comma separated")
    parser.add_argument("--schemes", default="int4g128,int8", help="comma separated: intB or intBgGROUP")
    parser.add_argument("--also", default="int2g128,int3g128,int5g128,int6g128", help="schemes of the first shape, one row")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each number of rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
