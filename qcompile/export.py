"""``ExportedProgram`` in, ``ExportedProgram`` out, and compiled programs from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.capture_export import from_exported, to_exported
from qcompile.dump import observer
from qcompile.options import Options
from qcompile.passes.pipeline import arrival, run
from qcompile.passes.program import Program
from qcompile.passes.select import first_match, unmatched
from qcompile.passes.unpack import PACKED

log = logging.getLogger("qcompile.export")

#: Key of ``node.meta["custom"]`` under which an exported graph carries its report.
REPORT_KEY = "qcompile"


#: What stands in a program whose weights came quantized.
_QUANTIZED = (torch.ops.qcompile.dequantize.default, *PACKED)


def quantize_exported(
    ep: ExportedProgram,
    options: Options,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
) -> ExportedProgram:
    """A quantized copy of ``ep``; see :func:`qcompile.quantize`."""
    program = from_exported(ep)
    program.progress = progress
    watcher = observer("export", options)
    # What is quantized already stays as it is, and stays in the report.
    program.decisions = [row for row in _decisions(program) if row.quantized]
    before = len(program.decisions)
    find, others = options.finding()
    run(find, program, watcher)
    if before and not program.sites and not any(d.quantized for d in program.decisions[before:]):
        log.warning("nothing to quantize: no weight of this program is float (it was quantized before)")
    _check_patterns(program, options)
    run(others, program, watcher)
    annotate(program)
    return to_exported(program, ep)


def _check_patterns(program: Program, options: Options) -> None:
    known = [name for d in program.decisions for name in (d.weight, d.module) if name]
    lost = [p for p in unmatched((*options.include, *options.exclude), program) if first_match([p], known) is None]
    if lost:
        names = sorted({d.weight for d in program.decisions if d.weight})
        shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
        raise ValueError(f"no weight matches {', '.join(map(repr, lost))}; the program's weights are: {shown}")


def annotate(program: Program) -> None:
    """Write the report's rows into the graph, where ``torch.export.save`` keeps them."""
    rows = [d.to_dict() for d in program.decisions]
    node = program.first_call()
    node.meta["custom"] = {**node.meta.get("custom", {}), REPORT_KEY: {"version": 1, "decisions": rows}}


def lowered(qep: ExportedProgram, options: Options | None = None) -> ExportedProgram:
    """``qep`` with its weights packed for the device that they are on and its operators fused."""
    program = from_exported(qep)
    program.decisions = list(_decisions(program))
    watcher = observer("lower", options or Options())
    if not program.decisions and program.calls(*_QUANTIZED):
        # Exported from a module that was quantized eagerly, and not passed through qcompile.quantize.
        run(arrival(), program, watcher)
        for site in program.sites:
            site.decision.reason = "a float weight of a program that was compiled as it is (see qcompile.quantize)"
    run((options or Options()).lowering(), program, watcher)
    annotate(program)
    return to_exported(program, qep)


def _decisions(program: Program) -> Iterable[Any]:
    from qcompile.report import rows_of

    return rows_of(program.graph)


def compile_exported(qep: ExportedProgram, **options: Any) -> Callable[..., Any]:
    """A callable of a quantized program, lowered by Inductor; see :func:`qcompile.compile`."""
    from qcompile.inductor import cache_stamp, prepare

    prepare()
    module = lowered(qep, Options.parse(options)).module()
    compiled = torch.compile(module, fullgraph=True, options=cache_stamp())

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return compiled(*args, **kwargs)

    return call


def aot_compile_exported(qep: ExportedProgram, path: str | Path, **options: Any) -> Path:
    """An AOTInductor package of a quantized program; see :func:`qcompile.aot_compile`."""
    from qcompile.inductor import prepare

    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"an AOTInductor package is a .pt2 file, got {str(path)!r}")
    prepare()
    package = torch._inductor.aoti_compile_and_package(lowered(qep, Options.parse(options)), package_path=str(path))
    return Path(package)


def options_of(**given: Any) -> Options:
    """Options from the arguments of :func:`qcompile.quantize`, those not given left to their defaults."""
    return Options.parse({k: v for k, v in given.items() if v is not None})
