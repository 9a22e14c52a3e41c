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

Everything is gone through ``--passes`` times, so that a bad minute of a shared machine falls on few of a layer's calls.

All are called as models call them, many layers at once: ours are programs of up to 32 layers in memory of large pages, as
compiled models have them, float32's programs of 8, ONNX Runtime's nodes of one graph.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from functools import partial

import torch
from benchkit import command, machine, peers
from benchkit.peak import floor, peak
from benchkit.records import Record, table
from benchkit.timing import WARM, alternate, undisturbed
from torch import Tensor

from qcompile.kernels.cpu import build
from qcompile.kernels.memory import give_back

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
    # all of a layer's numbers of rows are programs of one function
    torch._dynamo.config.recompile_limit = 256
    read = machine.reader()
    shapes = args.shapes.split(",")
    wide = {shape: _wide(shape) for shape in shapes}
    cases = [(shape, scheme, args.rows) for shape in shapes for scheme in args.schemes.split(",")]
    cases += [(shapes[0], scheme, "1") for scheme in filter(None, args.also.split(","))]
    layers = [Layer(shape, scheme, rows, threads, read, wide[shape]) for shape, scheme, rows in cases]
    for i in range(args.passes):
        for layer in layers:
            layer.measure(args.seconds / args.passes)
            print(f"pass {i + 1} of {args.passes}: {layer.shape}, {layer.scheme}", flush=True)
    for layer in layers:
        print(layer.table(), flush=True)
    command.finish(args, "layers", [record for layer in layers for record in layer.records()])


class Layer:
    """A shape and a scheme: what is called for each number of rows, and how long it took."""

    def __init__(
        self, shape: str, scheme: str, rows: str, threads: int, read: tuple[Callable[[], object], int], wide: list[Tensor]
    ) -> None:
        n, k = (int(size) for size in shape.split("x"))
        name, bits, group = parse_scheme(scheme)
        self.shape, self.scheme, self.bits, self.threads = shape, name, bits, threads
        self.n, self.k = n, k
        self.read, self.streamed = read
        torch.manual_seed(0)
        copies = _copies(n * k * bits // 8)
        weights = [_weight(n, k, bits, group or k) for _ in range(copies)]
        ours, self.packed = _ours(weights, bits, group)
        kinds: dict[str, Callable[[Tensor], tuple[Callable[[], object], int]]] = {"qcompile": ours}
        if bits == 8:
            kinds["per token"] = partial(ours, per_row=True)
            kinds["static"] = partial(ours, x_scale=torch.tensor(0.03))
        kinds["float32 compiled"] = _float32(wide)
        size = group or 128  # of ONNX Runtime's groups
        if bits in (4, 8) and peers.available("onnxruntime", "onnx"):
            given = weights if group == size else [_weight(n, k, bits, size) for _ in range(copies)]
            kinds["onnxruntime"] = _onnxruntime(given, bits, size, threads)
        self.kinds = list(kinds)
        self.calls: dict[int, dict[str, Callable[[], object]]] = {}
        self.counts: dict[int, dict[str, int]] = {}
        self.times: dict[int, dict[str, list[float]]] = {}
        with torch.inference_mode():
            for m in (int(m) for m in rows.split(",")):
                x = torch.randn(m, k)
                made = {kind: make(x) for kind, make in kinds.items()}
                self.calls[m] = {kind: call for kind, (call, _) in made.items()} | {"read": self.read}
                self.counts[m] = {kind: count for kind, (_, count) in made.items()} | {"read": 1}
                self.times[m] = {kind: [] for kind in self.calls[m]}
                if "onnxruntime" in made and group == size:
                    _compare(self.calls[m]["qcompile"](), self.calls[m]["onnxruntime"](), m)
        print(f"{shape}, {name}: {copies} copies of {self.packed / 1e6:.1f} MB", flush=True)
        gc.collect()
        give_back()

    def measure(self, seconds: float) -> None:
        """Each number of rows for so many seconds, the kinds taking turns."""
        pause = PAUSE if "onnxruntime" in self.kinds else 0.0
        with torch.inference_mode(), undisturbed():
            for m, calls in self.calls.items():
                found = alternate(calls, seconds, turn=0.06, pause=pause, least=1, warm=WARM)
                for kind, times in found.items():
                    self.times[m][kind] += times

    def _layers(self, m: int) -> tuple[dict[str, float], float, float]:
        """Seconds of each kind's layer, bytes a second that were read, and the least seconds that the machine allows."""
        times = {kind: statistics.median(t) / self.counts[m][kind] for kind, t in self.times[m].items()}
        bandwidth = self.streamed / times.pop("read")
        most = peak(str(build.isa()), self.bits, self.threads)
        return times, bandwidth, floor(self.packed, bandwidth, self.n * self.k * m, most)

    def records(self) -> list[Record]:
        records = []
        for m in self.calls:
            times, bandwidth, least = self._layers(m)
            case = {"shape": self.shape, "scheme": self.scheme, "M": m}
            records += [Record(case, kind, t * 1e3, "ms") for kind, t in times.items()]
            records.append(Record(case, "of bandwidth", self.packed / times["qcompile"] / bandwidth, "share"))
            records.append(Record(case, "floor", least * 1e3, "ms"))
        return records

    def table(self) -> str:
        rows = []
        for m in self.calls:
            times, bandwidth, least = self._layers(m)
            own = times["qcompile"]
            row = [str(m), _ms(own), f"{self.packed / own / bandwidth:.0%}", _ms(least)]
            for kind in self.kinds:
                row += [] if kind == "qcompile" else [_ms(times[kind]), f"{times[kind] / own:.2f}x"]
            rows.append([*row, f"{bandwidth / 1e9:.1f}"])
        rest = [column for kind in self.kinds if kind != "qcompile" for column in (f"{kind} ms", "qcompile is")]
        head = ["M", "qcompile ms", "memory", "floor ms", *rest, "read GB/s"]
        return f"\n{self.shape}, {self.scheme}\n{table(head, rows)}"


def _wide(shape: str) -> list[Tensor]:
    n, k = (int(size) for size in shape.split("x"))
    return [torch.randn(n, k) for _ in range(-(-_copies(4 * n * k) // FLOATS) * FLOATS)]


def _copies(size: int) -> int:
    """Of a layer of so many bytes: none is in a cache when its turn comes again, unless that would be very many."""
    return min(1 + -(-2 * machine.cache_bytes() // size), MOST)


def _ours(weights: list[tuple[Tensor, Tensor]], bits: int, group: int) -> tuple[Callable, int]:
    from benchkit.own_layers import linears

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
    parser.add_argument("--seconds", type=float, default=4.5, help="for each number of rows")
    parser.add_argument("--passes", type=int, default=3, help="through all: a bad minute falls on some of the calls")
    return parser.parse_args()


if __name__ == "__main__":
    main()
