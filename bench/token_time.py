"""Where the time of one token goes, operator by operator, against the bytes that each must move.

    python bench/token_time.py                     # SmolLM2-135M, qint4, at 512 tokens of context
    python bench/token_time.py --variant qint8 --context 64 --emulate-avx2

A decode step under torch's profiler, Inductor's loops included, after which the same step is timed without it. Bytes are
those of an operator's tensor arguments (of a static cache all of it, of a lookup table all of it: upper bounds there). The
profiler costs about a microsecond a call: the column of times is scaled to what the operators would take together if each
of their calls were that much shorter; what then is missing to the whole step is Python, guards and dispatch.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchkit import command, machine
from benchkit.records import Record, table
from benchkit.timing import undisturbed

WIDTHS = {
    "float": 4,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "double": 8,
    "bool": 1,
    "unsigned char": 1,
    "signed char": 1,
    "int": 4,
    "long": 8,
    "long int": 8,
}
PROFILER = 1e-6


@dataclass
class Share:
    """What one operator took in one step: calls, seconds, bytes of its arguments."""

    calls: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)
    threads = machine.use_threads(args.threads)
    import torch
    import torch._inductor.config

    torch._inductor.config.cpp.enable_kernel_profile = True
    from language import compiler

    from qcompile.demo.data import smollm2_folder
    from qcompile.demo.generation import GreedyDecoder, steady
    from qcompile.demo.loading import load

    model, _ = load(smollm2_folder())
    decoder = GreedyDecoder(model, args.context + 3 * args.steps + 8, compiler(args.variant))
    for _ in range(0, args.context, 16):
        token = decoder.feed(torch.randint(1000, 10_000, (1, 16)))
    token = decoder.feed(token)
    bandwidth = machine.read_bandwidth()
    with undisturbed(), steady():
        whole = []
        for _ in range(args.steps):
            start = time.perf_counter()
            token = decoder.feed(token)
            whole.append(time.perf_counter() - start)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            for _ in range(args.steps):
                token = decoder.feed(token)
    shares = summed(profile.profiler.kineto_results.events(), args.steps)
    step = median(whole)
    records, rows = [], []
    for name, share in sorted(shares.items(), key=lambda item: -item[1].seconds):
        seconds = max(share.seconds - share.calls * PROFILER, 0.0)
        case = {"variant": args.variant, "op": name, "calls": share.calls, "bytes": share.bytes}
        records.append(Record(case, "qcompile", seconds * 1e3, "ms"))
        if seconds > 0.003 * step:
            rows.append(_row(name, share, seconds, step, bandwidth))
    known = sum(record.value for record in records) * 1e-3
    rest = [
        "everything else: Python, guards, dispatch",
        "",
        f"{(step - known) * 1e3:.3f}",
        f"{1 - known / step:.0%}",
        "",
        "",
    ]
    rows.append(rest)
    total = sum(share.bytes for share in shares.values())
    rows.append(["one token", "", f"{step * 1e3:.3f}", "100%", f"{total / 1e6:.1f}", f"{total / step / bandwidth:.0%}"])
    records.append(Record({"variant": args.variant, "op": "one token"}, "qcompile", step * 1e3, "ms"))
    print(f"{machine.summary()}\n{args.variant}, {args.context} tokens before, {threads} threads")
    print(f"read {bandwidth / 1e9:.1f} GB/s\n")
    print(table(["operator", "calls", "ms", "share", "MB", "of bandwidth"], rows))
    command.finish(args, "token_time", records)


def summed(events: Any, steps: int) -> dict[str, Share]:
    """Per step and name: operators of qcompile by the shape of the weight, Inductor's loops, other operators of torch.

    Operators inside others are not counted. Seconds are the median step's, where each step has as many calls.
    """
    kept = [e for e in events if e.duration_ns() and not _frame(e.name())]
    shares: dict[str, Share] = defaultdict(Share)
    durations: dict[str, list[float]] = defaultdict(list)
    end = 0
    for event in sorted(kept, key=lambda e: (e.start_ns(), -e.duration_ns())):
        if event.start_ns() < end:  # inside one that is counted
            continue
        end = event.start_ns() + event.duration_ns()
        kind = _kind(event.name(), list(zip(event.shapes(), event.dtypes(), strict=False)))
        durations[kind].append(event.duration_ns() * 1e-9)
        share = shares[kind]
        share.calls += 1 / steps
        tensors = zip(event.shapes(), event.dtypes(), strict=False)
        share.bytes += sum(math.prod(shape) * WIDTHS.get(dtype, 0) for shape, dtype in tensors if shape) / steps
    for kind, found in durations.items():
        count = len(found) // steps
        whole = count * steps == len(found)
        shares[kind].seconds = (
            median(sum(found[i * count : (i + 1) * count]) for i in range(steps)) if whole else sum(found) / steps
        )
    return dict(shares)


def _frame(name: str) -> bool:
    """Whether an event is a frame around operators, no operator: of the profiler, Dynamo, Inductor's whole graph."""
    return not (name.startswith(("aten::", "qcompile::", "cpp_", "kernel_cpp")) or "cpp_fused" in name)


def _kind(name: str, tensors: list[tuple[list[int], str]]) -> str:
    if "cpp_fused" in name:
        return "Inductor's loops"
    name = name.removesuffix("_forward")
    # codes are [tiles of 16 rows, blocks of 32 columns, bytes]
    codes = next((shape for shape, dtype in tensors if len(shape) == 3 and dtype == "unsigned char"), None)
    return name if codes is None else f"{name} {codes[0] * 16} x {codes[1] * 32}, {codes[2] // 64} bits"


def _row(name: str, share: Share, seconds: float, step: float, bandwidth: float) -> list[str]:
    rate = f"{share.bytes / seconds / bandwidth:.0%}" if share.bytes else ""
    moved = f"{share.bytes / 1e6:.2f}" if share.bytes else ""
    return [name, f"{share.calls:.0f}", f"{seconds * 1e3:.3f}", f"{seconds / step:.0%}", moved, rate]


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--variant", default="qint4", help="qint4, qint8 or 'float32 compiled'")
    parser.add_argument("--context", type=int, default=512, help="tokens before, a multiple of 16")
    parser.add_argument("--steps", type=int, default=24)
    return parser.parse_args()


if __name__ == "__main__":
    main()
