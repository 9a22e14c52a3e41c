"""Rooflines on paper: what bytes, operations and instruction counts allow; writes docs/rooflines.md.

    python bench/rooflines.py

Instruction counts are those of docs/gpu_report.json; run bench/gpu_report.py first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qcompile.kernels.triton.table import choose, grouped, quantized
from qcompile.kernels.triton.target import Target

DOCS = Path(__file__).resolve().parent.parent / "docs"
N = K = 8192
ROWS = (1, 16, 64, 512)
Report = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Part:
    """A GPU's data sheet: bytes a second, operations a second on tensor cores, clock, lanes that issue a cycle.

    float16, int8, float8: with sums in float32, int32, float32; float8 are those that it multiplies (``target.float8``).
    """

    name: str
    target: Target
    bandwidth: float
    float16: float
    int8: float
    float8: float
    clock: float
    lanes: int

    def issue(self, instructions: float, programs: int = 1 << 30) -> float:
        """Seconds for instructions (one lane's each) on as many processors as have a program."""
        return instructions / (min(self.target.processors, programs) * self.clock * self.lanes)


PARTS = (
    Part("A100 80 GB", Target("sm_80", 108), 2.04e12, 312e12, 624e12, 0, 1.41e9, 128),
    Part("H100 SXM", Target("sm_90", 132), 3.35e12, 989e12, 1979e12, 1979e12, 1.76e9, 128),
    Part("RTX 4090", Target("sm_89", 128), 1.01e12, 165e12, 661e12, 330e12, 2.52e9, 128),
    Part("MI300X", Target("gfx942", 304), 5.3e12, 1307e12, 2615e12, 2615e12, 2.1e9, 64),
)
#: (case of the report, bits a weight, columns a scale (0 = a row), bytes of scale and zero point)
WEIGHTS = (
    ("int8 a row, float16", 8, 0, 2),
    ("int4 g128 affine, float16", 4, 128, 3),
    ("int4 g128 affine, bfloat16", 4, 128, 3),
    ("int3 g128 affine, float16", 3, 128, 3),
    ("int2 g64 affine, float16", 2, 64, 3),
    ("float8 e4m3fn a row, bfloat16", 8, 0, 2),
)
#: Products of codes: (case of the report, dtype, columns a scale of W (0 = a row))
CODES = (
    ("int8 x int8", "int8", 0),
    ("int8 x int8 g64", "int8", 64),
    ("float8 e4m3fn x float8 e4m3fn", "e4m3fn", 0),
    ("float8 e4m3fnuz x float8 e4m3fnuz", "e4m3fnuz", 0),
)
EXPERTS, TOP = 8, 2
#: Operations a value in float32, counted in the source, a division as one: the two halves of ``norm_quantize.py`` (RMSNorm;
#: a scale for each row), and ``rows.py`` (int4 with zero points).
NORM, QUANTIZE, DECODE = 5, 12, 6
#: Rows and columns (of 4 bits) that a program of ``rows.py`` decodes.
TILE = (16, 128)

TEXT = """# Rooflines on paper

Written by `python bench/rooflines.py` from data sheets and from the instruction counts of [gpu_report.md](gpu_report.md).
**Nothing here was measured.** A layer is 8192 x 8192. First linears of which only the weight is codes, then
[codes by codes](#codes-by-codes), [experts](#experts), [norms](#norms-that-end-in-codes) and [rows](#decoded-rows), each
with what is different there. For each kernel and M:

- *memory*: bytes of W, scales, x and y (and of float32 partial sums, written and read, where K is split), at the data
  sheet's bandwidth;
- *math*: 2 M N K operations at the data sheet's float16 peak (M = 1 and 2 don't use tensor cores; their multiply-adds are in
  the next column);
- *issue*: instructions of the inner loop a weight, times weights, times tiles of x that decode the weight again, over lanes
  and clock: as if every cycle issued one instruction for each lane;
- *bound*: the largest of the three; *of float16*: how many times as fast as a float16 layer at *its* roofline.

The goals are 85 % of bandwidth at M = 1, 1.5 times float16 at M = 64, and never below float16. Where *issue* is the bound at
M = 1, Triton's kernel cannot reach the first on that part, whatever else it does: that is the place for the CUDA kernels.
No row of this table is below float16: from a few hundred rows on both are bound by the tensor cores, as long as decoding
takes no more instructions than these leave time for (a test holds the table to that). From 1024 or 1536 rows on the
dispatcher decodes W once and takes the vendor's matmul all the same, which costs (bits / 8 + 2) bytes of memory traffic a
weight more than float16, 50 microseconds here for int4 on an H100 and 80 on an A100: on paper never less than the kernel,
but cheaper as soon as that reaches less than 80 % of the vendor's rate.

What would break this: memory and issue overlap only with enough warps in flight, and occupancy is 0.12 to 0.5 here; loads of
x come out of the L1 cache for free; clocks stay at boost under load; tensor cores run beside the decoding, not after it;
Triton's launch, 5 to 10 microseconds of Python a call, is hidden by CUDA graphs.

"""

CODES_TEXT = """
## Codes by codes

int8 x int8 and float8 x float8, a float32 scale for each row of x, and for each row or group of W. Bytes of x are its codes
and scales; the pass that makes them is further down. *math* is at the data sheet's peak for int8, or for float8 summed in
float32; where tensor cores don't know the float8 the kernel decodes both sides to float16, and that peak counts. *issue* is
the whole loop, over lanes and clock. e4m3fnuz is AMD's own.

Float8 that is decoded, on an A100 and as e4m3fn on an MI300X, is below float16: each tile decodes both sides again, in 19 to
58 instructions a weight. Weights alone in float8 (above) are the better choice there. No other row is below (the same test).

What would break this: what feeds tensor cores twice as fast as in float16 is shared memory, which has no column here; and x
and W come from the L2 cache when another tile reads them again.

"""

EXPERTS_TEXT = """
## Experts

int4 g128 affine, bfloat16; 8 experts of 8192 x 8192, the 2 best for each of M tokens: 2 M rows, evenly spread, so that
min(8, 2 M) experts are read. y is written twice, zeros first. float16 reads the same experts, and writes once.

What would break this: that rows are not evenly spread. An expert's 16 rows at M = 64, and but for the A100 its 128 rows at
M = 512, fit one tile exactly; with experts drawn at random three or four of the eight have a row more and a second tile, and
*issue* and *math* are 1.4 to 1.5 times what they say.

"""

NORM_TEXT = """
## Norms that end in codes

RMSNorm of M rows of 8192 bfloat16 to int8, a scale for each row: one program a row, which stays in registers. *math* is 17
float32 operations a value (counted in the source, a division as one) on those processors that have a row. Instructions are
not counted: the report counts those of loops, and there is none. *of two*: against a norm and a quantization in two kernels.

What would break this: few rows wait, for memory and then for two sums and a maximum over the row, one after another, and for
a launch of some microseconds, which is more than all of this up to 64 rows; a division is 8 to 10 instructions.

"""

ROWS_TEXT = """
## Decoded rows

int4 g128 affine to bfloat16: M rows that indices ask for (embedding), or all 8192 of a layer (before the vendor's matmul).
*math* is 6 float32 operations a value, counted in the source, for all 16 rows of a program, on those processors that have
one. Instructions are not counted: there is no loop. float16 copies its rows, and calculates nothing.

What would break this: at M = 1 either is a launch and two waits for memory (index, then row), and the 15 rows calculated in
vain do not show; 32 columns are 64 bytes of y, which the L2 cache has to join to whole lines.

"""


def table(case: str, than: str) -> str:
    """The head of a table."""
    return (
        f"| GPU | {case} | M | way | MB | memory us | math us | issue us | bound | of {than} |\n"
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |\n"
    )


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value >= 10 ** (1 - digits) else f"{value:.2g}"


def line(
    part: Part, case: str, m: int | str, way: str, size: float, math: float, issue: float | None, than: float | None
) -> str:
    """size: bytes; math, issue: seconds, issue None where it is not counted; than: seconds of what it is compared with."""
    memory = size / part.bandwidth
    bound = max((memory, "memory"), (math, "math"), (issue or 0.0, "issue"))
    cells = [part.name, case, str(m), way, number(size / 1e6, 0)]
    cells += [number(t * 1e6, 1) if t else "" for t in (memory, math)]
    cells += ["not counted" if issue is None else f"{issue * 1e6:.1f}", bound[1]]
    return f"| {' | '.join(cells)} | {'' if than is None else f'{than / bound[0]:.2f}'} |"


def plain(part: Part, m: int, experts: int = 1) -> float:
    """Seconds of a float16 layer at its roofline: m rows, each of one of the experts."""
    return max((2 * experts * N * K + 2 * m * (N + K)) / part.bandwidth, 2 * m * N * K / part.float16)


def row(part: Part, case: str, bits: int, group: int, side: int, m: int, report: Report) -> str:
    config, split = choose(part.target, m, N, K, bits, False)
    kernel = next(v for k, v in report.items() if k == f"{part.target.arch} | {config.way} | {case}, M={m}")
    scales = N * (K // group if group else 1) * side
    size = N * K * bits / 8 + scales + 2 * m * (N + K) + (8 * split * m * N if split > 1 or config.way == "gemv" else 0)
    tiles = 1 if config.way == "gemv" else -(-m // config.bm)
    math = 0.0 if config.way == "gemv" else 2 * max(m, config.bm) * N * K / part.float16
    issue = part.issue(kernel["per_weight"] * N * K * tiles)
    way = f"{config.way} {config.bn}x{config.bm or config.bb} /{split}"
    return line(part, case, m, way, size, math, issue, plain(part, m))


def codes_row(part: Part, case: str, kind: str, group: int, m: int, report: Report) -> str:
    native = kind == "int8" or kind in part.target.float8
    config, split, runs = quantized(part.target, m, N, K, native, group)
    size = N * K + 4 * N * (K // group if group else 1) + m * (K + 4) + 2 * m * N + (8 * split * m * N if split > 1 else 0)
    tiles = -(-m // config.bm)
    peak = part.int8 if kind == "int8" else part.float8 if native else part.float16
    loop = report[f"{part.target.arch} | quantized_gemm | {case}, M={m}"]["loop"]
    threads = config.warps * (64 if part.target.hip else 32)
    issue = part.issue(loop * threads * N * K * tiles / (config.bn * config.bk * runs))
    way = f"{config.bn}x{config.bm} /{split}{'' if native else ', decoded'}"
    return line(part, case, m, way, size, 2 * tiles * config.bm * N * K / peak, issue, plain(part, m))


def experts_row(part: Part, m: int, report: Report) -> str:
    total = TOP * m
    experts = min(EXPERTS, total)
    config = grouped(part.target, total, EXPERTS, 4, False)
    counted = next(t for t in (16, 1024) if grouped(part.target, t, EXPERTS, 4, False) == config)
    loop = report[f"{part.target.arch} | grouped_gemm | {EXPERTS} experts, int4 g128, bfloat16, T={counted}"]
    size = experts * N * K * (4 / 8 + 3 / 128) + 2 * total * K + 4 * total * N
    tiles = experts * -(-total // (experts * config.bm))
    math = 2 * tiles * config.bm * N * K / part.float16
    case = f"{experts} of {EXPERTS}, {total // experts} row{'s' if total > experts else ''} each"
    issue = part.issue(loop["per_weight"] * N * K * tiles)
    return line(part, case, m, f"{config.bn}x{config.bm}", size, math, issue, plain(part, total, experts))


def norm_row(part: Part, m: int) -> str:
    values = m * K
    # what lies between two kernels is bfloat16, written and read
    apart = max((4 * values + 2 * K) / part.bandwidth, part.issue((NORM + 1) * values, m))
    apart += max((3 * values + 4 * m) / part.bandwidth, part.issue((QUANTIZE + 1) * values, m))
    size, math = 3 * values + 2 * K + 4 * m, part.issue((NORM + QUANTIZE) * values, m)
    return line(part, "RMSNorm to int8", m, "a row a program", size, math, None, apart)


def decode_row(part: Part, m: int | None) -> str:
    count = m or N
    programs = -(-count // TILE[0]) * (K // TILE[1])
    size = count * K * (4 / 8 + 3 / 128 + 2) + (8 * count if m else 0)
    math = part.issue(DECODE * programs * TILE[0] * TILE[1], programs)
    than = 4 * count * K / part.bandwidth if m else None
    return line(part, "embedding" if m else "decode", m or "all", f"{TILE[0]}x{TILE[1]}", size, math, None, than)


def rows(report: Report) -> list[str]:
    """Linears whose weights alone are codes."""
    return [row(part, *weight, m, report) for part in PARTS for weight in WEIGHTS for m in ROWS]


def codes_rows(report: Report) -> list[str]:
    """Products of codes; AMD's own float8 on AMD's part only."""
    cases = [(part, case) for part in PARTS for case in CODES if case[1] != "e4m3fnuz" or part.target.hip]
    return [codes_row(part, *case, m, report) for part, case in cases for m in ROWS]


def experts_rows(report: Report) -> list[str]:
    return [experts_row(part, m, report) for part in PARTS for m in ROWS]


def page(report: Report) -> str:
    """All of docs/rooflines.md."""
    sections = (
        (TEXT, "weight, activations", "float16", rows(report)),
        (CODES_TEXT, "codes", "float16", codes_rows(report)),
        (EXPERTS_TEXT, "experts read", "float16", experts_rows(report)),
        (NORM_TEXT, "rows", "two", [norm_row(part, m) for part in PARTS for m in ROWS]),
        (ROWS_TEXT, "rows", "float16", [decode_row(part, m) for part in PARTS for m in (*ROWS, None)]),
    )
    return "".join(text + table(case, than) + "\n".join(lines) + "\n" for text, case, than, lines in sections)


def main() -> None:
    report = json.loads((DOCS / "gpu_report.json").read_text(encoding="utf-8"))
    (DOCS / "rooflines.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
