"""The page of all figures, ``docs/benchmarks.md``: goals, tables in which losses are marked, and how to repeat each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchkit.goals import GOALS
from benchkit.records import Record, Run, table

__all__ = ["SECTIONS", "goals_table", "render", "section_table"]

Runs = Mapping[str, Run]


@dataclass(frozen=True)
class Section:
    """How one script's records become a table: a row a case, a column an engine, ours against the best of the others."""

    bench: str
    title: str
    text: str
    keys: tuple[str, ...] = ()
    pairs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Each of our engines with the ones it is held against; the verdict is on the best of these."""
    digits: int = 3


SECTIONS = (
    Section(
        "layers",
        "One layer, weights from memory",
        "`per token` and `static`: ours where the model asks for int8 activations, with a scale a row of x or one. "
        "ONNX Runtime is `MatMulNBits` at accuracy level 4, groups of 128; for int8, too, where ours has a scale a row. "
        "`floor` is what the machine allows: the packed bytes at the bandwidth measured in the same turns, or the "
        "multiply-adds at the rate at which all threads multiply bytes in registers, whichever takes longer.",
        ("shape", "scheme", "M"),
        (("qcompile", ("onnxruntime", "float32 compiled")),),
    ),
    Section(
        "language",
        "A language model, SmolLM2-135M",
        "The same weights: qint4 beside Q4_0, qint8 beside Q8_0, groups of 32, the head in 8 bits. Tokens follow a prompt.",
        ("model", "what", "prompt"),
        (("qint4", ("Q4_0", "float32 compiled")), ("qint8", ("Q8_0", "float32 compiled"))),
        1,
    ),
    Section(
        "encoder",
        "A sentence encoder, all-MiniLM-L6-v2",
        "Batches are texts x tokens. ONNX Runtime's int8 is `quantize_dynamic`, of the exported graph and of the fused one:"
        " one scale a tensor. Ours has one a channel, or one for 32 values (`qint8`, the default); activations are rounded"
        " by 32. Traced is by `qcompile.trace`, not `torch.compile`; a package is compiled ahead of time and has no Python.",
        ("batch",),
        tuple(
            (ours, ("onnxruntime int8", "onnxruntime int8 fused", "float32 compiled", "onnxruntime float32 fused"))
            for ours in ("qcompile qint8 a channel", "qcompile qint8 a channel, traced", "qcompile qint8 a channel, package")
        ),
        2,
    ),
    Section(
        "vision",
        "A convolutional network, EfficientNet-lite0",
        "ONNX Runtime's int8 is static (QDQ), calibrated on the same crops as ours with activations.",
        ("batch",),
        tuple(
            (ours, ("onnxruntime int8", "float32 compiled", "onnxruntime float32"))
            for ours in (
                "qcompile qint8 activations",
                "qcompile qint8 activations, traced",
                "qcompile qint8 activations, package",
            )
        ),
        2,
    ),
    Section(
        "quantizers",
        "PyTorch's quantizers, one eager `nn.Linear`",
        "One layer again and again: weights in the cache where they fit.",
        ("shape", "mode", "M"),
        (
            ("qcompile int4", ("torchao int4 weight-only", "optimum-quanto int4", "bitsandbytes nf4", "float32")),
            ("qcompile int8", ("torchao int8 weight-only", "torchao int8 dynamic", "optimum-quanto int8", "float32")),
        ),
        2,
    ),
    Section(
        "compile_time",
        "Compiling SmolLM2-135M",
        "The programs of a prompt of 512 and of a token, in a fresh process; ours with quantizing and packing, by "
        '`qcompile.trace`, as `qcompile.generate` does it, and by `torch.compile(backend="qcompile")`.',
        ("cache",),
        (
            ("qint4", ("float32 compiled",)),
            ("qint8", ("float32 compiled",)),
            ("qint4 torch.compile", ("float32 compiled",)),
        ),
        1,
    ),
    Section(
        "token_time", "Where a token's time goes", "One decode step of SmolLM2-135M. MB are of the operators' arguments."
    ),
    Section(
        "grid",
        "Never slower than float32",
        "The operators themselves, one weight each, but for small weights that meet one row: they stay float32.",
    ),
    Section("inner_loops", "The innermost loops", "Instructions of each, counted in the built library."),
)

_INTRODUCTION = """# Benchmarks

Written by `make bench` (`python bench/run.py`); every table names the command that repeats it. Times are medians, the
engines of a table taking turns in one process. **Bold** marks where we are slower than the best of the others, or miss a
goal. Read ratios, not digits: the machine is shared.
"""
_MACHINE = ("processor", "family", "cores and threads used", "last level cache")
_EMULATED = """Everything as a processor without AVX-512 and VNNI runs it: torch, MKL, oneDNN, qcompile, ONNX Runtime (a
copy whose questions to the processor are answered so) and llama.cpp (a build of its own).
"""


def render(runs: Runs, emulated: Runs, plots: Sequence[Path], target: Path) -> None:
    """Write the page. ``emulated`` are the runs held to AVX2; ``plots`` lie beside or below the page."""
    lines = [_INTRODUCTION]
    for title, found in (("", runs), ("Held to AVX2", emulated)):
        if not found:
            continue
        most = Counter(map(_place, found.values())).most_common(1)[0][0]
        one = next(run for run in found.values() if _place(run) == most)
        peers = dict(sorted({name: v for run in found.values() for name, v in run.peers.items()}.items()))
        lines += [f"## {title or 'The machine'}", "", *([_EMULATED] if title else [])]
        lines += [table(["", ""], [[k, v] for k, v in one.machine.items()]).replace("---:", "---"), ""]
        lines += [f"Peers: {', '.join(f'{name} {v}' for name, v in peers.items()) or 'none installed'}.", ""]
        lines += ["### Goals" if title else "## Goals", "", goals_table(found), ""]
        if not title:
            for plot in plots:
                lines += [f"![{plot.stem}]({plot.relative_to(target.parent)})", ""]
        for section in SECTIONS:
            if section.bench in found:
                run = found[section.bench]
                lines += [f"{'###' if title else '##'} {section.title}", "", *([section.text, ""] if section.text else [])]
                lines += [f"    {run.command}", "", *_elsewhere(run, one), section_table(section, run), ""]
    scratch = target.with_suffix(".tmp")
    scratch.write_text("\n".join(lines).rstrip() + "\n", "utf-8")
    scratch.replace(target)


def _place(run: Run) -> tuple[str, ...]:
    return tuple(run.machine.get(k, "unknown") for k in _MACHINE)


def _elsewhere(run: Run, one: Run) -> list[str]:
    """A line where a script ran on another machine than the one that the page begins with."""
    there = _place(run)
    return [] if there == _place(one) else [f"On another machine: {', '.join(there)} of last level cache.", ""]


def goals_table(runs: Runs) -> str:
    """Each goal, what was measured, and whether that is enough."""
    rows = []
    for goal in GOALS:
        value = goal.found(runs)
        if value is not None:
            met = value >= goal.least
            said = goal.text(value)
            rows.append([goal.what, goal.text(goal.least), said if met else f"**{said}**", "met" if met else "**missed**"])
    return table(["goal", "at least", "measured (worst case)", ""], rows)


def section_table(section: Section, run: Run) -> str:
    """The records of one script as markdown."""
    special = {"token_time": _token_time, "grid": _grid, "inner_loops": _inner_loops}
    if section.bench in special:
        return special[section.bench](run)
    shown = [r for r in run.records if r.unit in ("ms", "s", "us", "tokens/s")]
    engines = list(dict.fromkeys(r.engine for r in shown))
    cases: dict[tuple, dict[str, Record]] = {}
    for record in shown:
        cases.setdefault(tuple(record.case.get(key) for key in section.keys), {})[record.engine] = record
    pairs = [(ours, [e for e in theirs if e in engines]) for ours, theirs in section.pairs if ours in engines]
    pairs = [(ours, theirs) for ours, theirs in pairs if theirs]
    rows = []
    for case, found in cases.items():
        cells = [f"{found[e].value:,.{section.digits}f}" if e in found else "" for e in engines]
        rows.append([*(str(part) for part in case), *cells, *(_verdict(found, ours, theirs) for ours, theirs in pairs)])
    units = ", ".join(dict.fromkeys(r.unit for r in shown))
    verdicts = [f"{ours} against the best{' of its kind' if len(pairs) > 1 else ''}" for ours, _ in pairs]
    return f"In {units}.\n\n" + table([*section.keys, *engines, *verdicts], rows)


def _verdict(found: Mapping[str, Record], ours: str, theirs: Sequence[str]) -> str:
    own, others = found.get(ours), [found[e] for e in theirs if e in found]
    if own is None or not others:
        return ""
    if own.less_is_better:
        ratio = min(r.value for r in others) / own.value
    else:
        ratio = own.value / max(r.value for r in others)
    return f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x, slower**"


def _token_time(run: Run) -> str:
    whole = next((r.value for r in run.records if r.case["op"] == "one token"), 0.0)
    rows = [
        [r.case["op"], f"{r.case.get('calls', 1):.0f}", f"{r.value:.3f}", f"{r.value / whole:.0%}" if whole else "",
         f"{r.case.get('bytes', 0) / 1e6:.2f}"]
        for r in run.records if r.value > 0.003 * whole
    ]  # fmt: skip
    return table(["operator", "calls", "ms", "share", "MB"], rows)


def _grid(run: Run) -> str:
    plain = {tuple(r.case.values()): r.value for r in run.records if r.engine == "float32"}
    found: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for r in run.records:
        if r.engine == "qcompile":
            at = f"{r.case['N']}x{r.case['K']}"
            found.setdefault((r.case["scheme"], r.case["M"]), []).append((plain[tuple(r.case.values())] / r.value, at))
    rows = []
    for (scheme, m), part in sorted(found.items()):
        part.sort()
        lost = ", ".join(f"**{at} {ratio:.2f}x**" for ratio, at in part if ratio < 0.95) or "none"
        rows.append([scheme, str(m), f"{part[0][0]:.2f}x", f"{part[len(part) // 2][0]:.2f}x", lost])
    return table(["scheme", "M", "worst", "median", "slower than float32 (N x K)"], rows)


def _inner_loops(run: Run) -> str:
    """A row a function: how many such loops, and the range over them."""
    found: dict[str, list[Record]] = {}
    for record in run.records:
        found.setdefault(record.case["function"], []).append(record)
    rows = []
    for name, part in found.items():
        spills, multiplies = max(int(r.value) for r in part), [r.case["multiplies"] for r in part]
        loads = [r.case["loads"] / r.case["multiplies"] for r in part]
        share = [r.case["multiplies"] / r.case["instructions"] for r in part]
        rows.append(
            [f"`{name}`", str(len(part)), _range(multiplies, "{:.0f}"), _range(share, "{:.0%}"), _range(loads, "{:.2f}"),
             f"**{spills}**" if spills else "0"]
        )  # fmt: skip
    return table(["loops in", "loops", "multiplies", "share", "loads a multiply", "most spills"], rows)


def _range(values: Sequence[float], form: str) -> str:
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} to {most}"
