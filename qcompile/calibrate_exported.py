"""Fixed scales for the activations of an exported program, from samples that are run through its graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from qcompile.capture_export import from_exported, to_exported
from qcompile.eager.calibration import Calibration
from qcompile.eager.observers import Observer
from qcompile.export import annotate
from qcompile.kernels.dtypes import QType, qtype
from qcompile.passes.lift import weight_name
from qcompile.passes.program import Program, normalized
from qcompile.passes.quantize_activations import PRODUCTS, ROUNDINGS
from qcompile.passes.writes import is_written
from qcompile.progress import track
from qcompile.report import rows_of

qc = torch.ops.qcompile


def calibrate_exported(
    ep: ExportedProgram, samples: Iterable[Any], batches: int | None, activations: QType | str | None, **options: Any
) -> ExportedProgram:
    """A copy of ``ep`` whose quantized products read activations rounded with one fixed scale; see ``calibrate``."""
    program = from_exported(ep)
    program.decisions = list(rows_of(program.graph))
    reads: dict[fx.Node, list[fx.Node]] = {}
    for node in program.calls(*PRODUCTS):
        reads.setdefault(_source(node), []).append(node)
    if not reads:
        raise ValueError("the program has no quantized product; calibrate what qcompile.quantize returned")
    kind = _kind(program, activations)
    settings = Calibration(**options)
    observers = {x: settings.observer() for x in reads}
    chosen = samples if batches is None else (s for _, s in zip(range(batches), samples, strict=False))
    watch, count = _Watch(program.module, observers), 0
    with torch.no_grad():
        for sample in track(chosen, "calibrating"):
            watch.run(*_inputs(ep, program, sample), enable_io_processing=False)
            count += 1
    if count == 0:
        raise ValueError("there are no samples to calibrate with")
    for x, nodes in reads.items():
        _fix(program, x, nodes, observers[x], kind)
    program.clean()
    annotate(program)
    return to_exported(program, ep)


class _Watch(fx.Interpreter):
    """Runs the graph, activations as they come, and shows observers what their nodes give."""

    def __init__(self, module: fx.GraphModule, observers: Mapping[fx.Node, Observer]) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        # What an earlier calibration would clip must not hide the range.
        result = self.env[n.args[0]] if n.target in ROUNDINGS else super().run_node(n)  # type: ignore[index]
        if n in self.observers:
            self.observers[n].see(result)
        return result


def _kind(program: Program, given: QType | str | None) -> QType:
    asked = {normalized(n)["qtype"] for n in program.calls(*ROUNDINGS)}
    if given is not None:
        asked = {qtype(given).name}
    if len(asked) != 1:
        raise ValueError(
            "which dtype should activations get? quantize the program with activations=..., or name one: "
            f"calibrate(program, samples, activations='qint8'); found {', '.join(sorted(asked)) or 'none'}"
        )
    return qtype(asked.pop())


def _source(node: fx.Node) -> fx.Node:
    """What a product reads, before it is rounded."""
    x = normalized(node)["x"]
    return x.args[0] if x.target in ROUNDINGS else x


def _inputs(ep: ExportedProgram, program: Program, sample: Any) -> list[Any]:
    """All inputs of the graph; buffers that it writes to are copied, so that each sample meets the program as it was."""
    args, kwargs = ((), sample) if isinstance(sample, Mapping) else (sample, {})
    if not isinstance(args, (tuple, list)):
        args = (args,)
    given = iter(ep._get_flat_args_with_check(tuple(args), dict(kwargs))[0])
    held = [program.constants.get(n.name) for n in program.graph.nodes if n.op == "placeholder"]
    return [next(given) if c is None else c.tensor.clone() if c.mutated else c.tensor for c in held]


def _fix(program: Program, x: fx.Node, nodes: list[fx.Node], observer: Observer, kind: QType) -> None:
    value = observer.scale(kind)
    if value is None or not math.isfinite(value):
        raise ValueError(f"no sample reached {nodes[0].name} with finite values: it cannot be given a scale")
    name = weight_name(normalized(nodes[0])["data"].name)
    scale = program.add_constant(f"{name}_input_scale", torch.tensor(value, dtype=torch.float32))
    weights, rounded = set(), None
    for node in nodes:
        if rounded is None or is_written(x):
            with program.graph.inserting_before(node):
                rounded = program.call(qc.fake_quantize.default, x, scale, kind.name, like=x)
        node.replace_input_with(normalized(node)["x"], rounded)
        constant = program.constant(normalized(node)["data"])
        weights.add(weight_name(constant.name) if constant is not None else "")
    for decision in program.decisions:
        if decision.quantized and decision.weight in weights and decision.op != "embedding":
            decision.activations = f"{kind.name} static"
