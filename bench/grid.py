"""Is a quantized linear ever slower than the float one? Every (N, K, M) of a grid, in turns; prints where it is.

    python bench/grid.py                           # N and K of 64 to 16384, M of 1 to 2048, int4 and int8
    python bench/grid.py --sizes 64,1024 --rows 1,2048 --schemes int8

The operator that a compiled program calls, against the product that Inductor calls for float32; neither pays for guards.
Both have one weight, in the cache where it fits. A ratio above 1 means faster than float32; where one of ours is slower,
all are measured twice more, and the median of the three counts. Cases of more than ``--limit``
multiply-adds are left out and counted: at 16384 x 16384 x 2048 float32 alone takes seconds. So are small weights with one
row: they stay float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from benchkit import command, machine
from benchkit.records import Record, table
from benchkit.timing import medians, undisturbed
from layers import parse_scheme

NOISE = 0.95


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)
    machine.use_threads(args.threads)
    print(machine.summary(), flush=True)
    from qcompile.kernels.cpu import build

    if not build.ensure_loaded().loaded:
        raise SystemExit(build.status())
    sizes = [int(size) for size in args.sizes.split(",")]
    rows = [int(m) for m in args.rows.split(",")]
    schemes = [parse_scheme(name) for name in args.schemes.split(",")]
    records: list[Record] = []
    left_out = left_float = 0
    for n in sizes:
        for k in sizes:
            kept = [m for m in rows if m * n * k <= args.limit]
            left_out += len(rows) - len(kept)
            measured = [m for m in kept if not _stays_float(n, k, m)]
            left_float += len(kept) - len(measured)
            records += _shape(n, k, measured, schemes, args.seconds) if measured else []
    for name, _, _ in schemes:
        _summary(name, rows, records)
    print(f"{left_out} cases of more than {args.limit:.0e} multiply-adds left out; {left_float} that stay float32")
    command.finish(args, "grid", records)


def _stays_float(n: int, k: int, m: int) -> bool:
    """Whether a program that multiplies ``m`` rows by this weight leaves it alone."""
    from qcompile.options import Options
    from qcompile.passes.select import ONE_ROW

    return n * k < Options().min_elements * (ONE_ROW if m == 1 else 1)


def _shape(n: int, k: int, rows: list[int], schemes: list[tuple[str, int, int]], seconds: float) -> list[Record]:
    from qcompile.kernels.layouts.tiled import Geometry, pack

    weight = torch.randn(n, k)
    op = torch.ops.qcompile.linear_tiled_forward.plain
    packs = {}
    for name, bits, group in schemes:
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        packs[name] = pack(codes, torch.rand(n, Geometry.of(k, group).groups), None, bits, group)
    records = []
    with torch.inference_mode(), undisturbed():
        for m in rows:
            x = torch.randn(m, k)
            calls: dict[str, Callable[[], torch.Tensor]] = {"float32": partial(_float32, x, weight)}
            for name, t in packs.items():
                calls[name] = partial(op, x, t.codes, t.scale, t.zero, None, t.bits, t.group_size, n)
            least = 1 if m * n * k > 4e9 else 3
            times = medians(calls, seconds, turn=0.01, least=least)
            if min(times["float32"] / times[name] for name in packs) < NOISE:
                again = [times, *(medians(calls, 2 * seconds, turn=0.01, least=least) for _ in range(2))]
                times = {kind: median(each[kind] for each in again) for kind in calls}
            case = {"N": n, "K": k, "M": m}
            for name in packs:
                records.append(Record({**case, "scheme": name}, "qcompile", times[name] * 1e3, "ms"))
                records.append(Record({**case, "scheme": name}, "float32", times["float32"] * 1e3, "ms"))
    return records


def ratios(name: str, records: list[Record]) -> dict[tuple[int, int, int], float]:
    """(N, K, M) to the time of float32 over ours, of one scheme."""
    own, plain = (
        {tuple(r.case[x] for x in "NKM"): r.value for r in records if r.case["scheme"] == name and r.engine == engine}
        for engine in ("qcompile", "float32")
    )
    return {at: plain[at] / own[at] for at in own}


def _summary(name: str, rows: list[int], records: list[Record]) -> None:
    found = ratios(name, records)
    lines = []
    for m in rows:
        part = sorted((ratio, at) for at, ratio in found.items() if at[2] == m)
        if part:
            lost = [f"{n}x{k} {ratio:.2f}" for ratio, (n, k, _) in part if ratio < NOISE]
            middle = part[len(part) // 2][0]
            lines.append([str(m), f"{part[0][0]:.2f}", f"{middle:.2f}", f"{part[-1][0]:.2f}", ", ".join(lost) or "none"])
    print(f"\n{name}: times faster than float32\n{table(['M', 'worst', 'median', 'best', 'slower than float32'], lines)}")


def _float32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.t())  # a view at each call, as Inductor makes one


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--sizes", default="64,256,1024,4096,16384", help="of N and of K, comma separated")
    parser.add_argument("--rows", default="1,2,8,32,128,512,2048", help="M, comma separated")
    parser.add_argument("--schemes", default="int4g64,int8", help="comma separated: intB or intBgGROUP")
    parser.add_argument("--limit", type=float, default=4e10, help="multiply-adds of the largest case")
    parser.add_argument("--seconds", type=float, default=0.15, help="for each case")
    return parser.parse_args()


if __name__ == "__main__":
    main()
