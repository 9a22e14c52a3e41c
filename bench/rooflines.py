"""Rooflines on paper: what bytes, operations and instruction counts allow; writes docs/rooflines.md.

    python bench/rooflines.py

Instruction counts are those of docs/gpu_report.json; run bench/gpu_report.py first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qcompile.kernels.triton.table import choose
from qcompile.kernels.triton.target import Target

DOCS = Path(__file__).resolve().parent.parent / "docs"
N = K = 8192


@dataclass(frozen=True)
class Part:
    """A GPU's data sheet: bytes a second, float16 operations a second on tensor cores, clock, lanes that issue a cycle."""

    name: str
    target: Target
    bandwidth: float
    float16: float
    clock: float
    lanes: int


PARTS = (
    Part("A100 80 GB", Target("sm_80", 108), 2.04e12, 312e12, 1.41e9, 128),
    Part("H100 SXM", Target("sm_90", 132), 3.35e12, 989e12, 1.76e9, 128),
    Part("RTX 4090", Target("sm_89", 128), 1.01e12, 165e12, 2.52e9, 128),
    Part("MI300X", Target("gfx942", 304), 5.3e12, 1307e12, 2.1e9, 64),
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

TEXT = """# Rooflines on paper

Written by `python bench/rooflines.py` from data sheets and from the instruction counts of [gpu_report.md](gpu_report.md).
**Nothing here was measured.** The layer is 8192 x 8192. For each kernel and M:

- *memory*: bytes of W, scales, x and y (and of float32 partial sums, written and read, where K is split), at the data
  sheet's bandwidth;
- *math*: 2 M N K operations at the data sheet's float16 peak (M = 1 and 2 don't use tensor cores; their multiply-adds are in
  the next column);
- *issue*: instructions of the inner loop a weight, times weights, times tiles of x that decode the weight again, over lanes
  and clock: as if every cycle issued one instruction for each lane;
- *bound*: the largest of the three; *of float16*: how many times as fast as a float16 layer at *its* roofline.

The goals are 85 % of bandwidth at M = 1, 1.5 times float16 at M = 64, and never below float16. Where *issue* is the bound at
M = 1, Triton's kernel cannot reach the first on that part, whatever else it does: that is the place for the CUDA kernels.
No row is below float16: from a few hundred rows on both are bound by the tensor cores, as long as decoding takes no more
instructions than these leave time for (a test holds the table to that). From 1024 or 1536 rows on the dispatcher decodes W
once and takes the vendor's matmul all the same, which costs (bits / 8 + 2) bytes of memory traffic a weight more than
float16, 50 microseconds here for int4 on an H100 and 80 on an A100: on paper never less than the kernel, but cheaper as soon
as that reaches less than 80 % of the vendor's rate.

What would break this: memory and issue overlap only with enough warps in flight, and occupancy is 0.12 to 0.5 here; loads of
x come out of the L1 cache for free; clocks stay at boost under load; tensor cores run beside the decoding, not after it;
Triton's launch, 5 to 10 microseconds of Python a call, is hidden by CUDA graphs.

| GPU | weight, activations | M | way | MB | memory us | math us | issue us | bound | of float16 |
| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |
"""


def row(part: Part, case: str, bits: int, group: int, side: int, m: int, report: dict[str, dict[str, float]]) -> str:
    config, split = choose(part.target, m, N, K, bits, False)
    kernel = next(v for k, v in report.items() if k == f"{part.target.arch} | {config.way} | {case}, M={m}")
    scales = N * (K // group if group else 1) * side
    size = N * K * bits / 8 + scales + 2 * m * (N + K) + (8 * split * m * N if split > 1 or config.way == "gemv" else 0)
    tiles = 1 if config.way == "gemv" else -(-m // config.bm)
    memory = size / part.bandwidth
    math = 0.0 if config.way == "gemv" else 2 * max(m, config.bm) * N * K / part.float16
    issue = kernel["per_weight"] * N * K * tiles / (part.target.processors * part.clock * part.lanes)
    bound = max((memory, "memory"), (math, "math"), (issue, "issue"))
    plain = max((2 * N * K + 2 * m * (N + K)) / part.bandwidth, 2 * m * N * K / part.float16)
    cells = [part.name, case, str(m), f"{config.way} {config.bn}x{config.bm or config.bb} /{split}", f"{size / 1e6:.0f}"]
    cells += [f"{t * 1e6:.1f}" if t else "" for t in (memory, math, issue)]
    return f"| {' | '.join(cells)} | {bound[1]} | {plain / bound[0]:.2f} |"


def rows(report: dict[str, dict[str, float]]) -> list[str]:
    return [row(part, *weight, m, report) for part in PARTS for weight in WEIGHTS for m in (1, 16, 64, 512)]


def main() -> None:
    report = json.loads((DOCS / "gpu_report.json").read_text(encoding="utf-8"))
    (DOCS / "rooflines.md").write_text(TEXT + "\n".join(rows(report)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
