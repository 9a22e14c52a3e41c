"""What becomes of one architecture: exported or compiled, quantized, run, and held against its float model."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import Architecture, inputs_of, model_of
from harness import compile_without_inductor, export, graphs, quantize_program, tensors, trace_without_inductor
from torch import Tensor, fx, nn

import qcompile
from qcompile.passes.decision import Decision

#: Operators that the report must have a row for, by name without overload, found in the float graph.
MATMULS = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "einsum", "_grouped_mm", "grouped_mm_fallback",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "embedding",
    "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "bilinear",
})  # fmt: skip


@dataclass(frozen=True)
class Specimen:
    """What was found.

    Attributes:
        matmuls: matmul-like operators in the float graph; None where the way in does not show it.
        rows: the report.
        cosine: of the outputs, quantized against float.
        noise: the same for a float model with noise as large as the rounding in its weights; None where it was not needed.
        experts: names of the stacks of expert weights in the model.
        left: names of quantized parameters of which the program still holds the float value.
    """

    matmuls: int | None
    rows: list[Decision]
    cosine: float
    noise: float | None = None
    experts: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> int:
        """How many operators work on codes."""
        return sum(r.quantized for r in self.rows)

    @property
    def activations(self) -> int:
        """How many are products of two activations."""
        return sum(r.reason == "both operands are activations" for r in self.rows)

    @property
    def alone(self) -> Counter[str]:
        """Reasons why others were left alone, and how often."""
        reasons = (r.reason or "" for r in self.rows if not r.quantized)
        return Counter(r for r in reasons if r != "both operands are activations")

    @property
    def close(self) -> bool:
        """Whether the outputs agree: to 0.99, or nearly as well as they do for weights with noise of the same size."""
        return self.cosine > 0.99 or (self.noise is not None and self.noise > 0.9 and 1 - self.cosine < 3 * (1 - self.noise))


def exported(architecture: Architecture) -> Specimen:
    """The way through ``torch.export``."""
    model = model_of(architecture)
    inputs = inputs_of(model, architecture.kind)
    with torch.no_grad():
        want = tensors(model(*inputs))
        ep = export(model, *inputs)
        qep, rows = quantize_program(ep)
        got = tensors(qep.module()(*inputs))
    cosine = _cosine(got, want)
    names = {r.weight for r in rows if r.quantized}
    return Specimen(
        matmuls(ep.graph_module), rows, cosine, _noise(model, inputs, cosine), _experts(model),
        sorted(names & set(qep.state_dict)),
    )  # fmt: skip


def compiled(architecture: Architecture) -> Specimen:
    """The way through ``torch.compile``, with what it hands to Inductor run as it is."""
    return _compiled(architecture, compile_without_inductor)


def traced(architecture: Architecture) -> Specimen:
    """The way through ``qcompile.trace``, likewise."""
    return _compiled(architecture, trace_without_inductor)


def _compiled(architecture: Architecture, compile_fn: Callable[..., tuple[Any, list[Decision]]]) -> Specimen:
    model = model_of(architecture)
    inputs = inputs_of(model, architecture.kind)
    with torch.no_grad():
        want = tensors(model(*inputs))
        experts = _experts(model)
        got, rows = compile_fn(model, *inputs)
        torch._dynamo.reset()
    cosine = _cosine(tensors(got), want)
    fresh = model_of(architecture)
    return Specimen(None, rows, cosine, _noise(fresh, inputs, cosine), experts)


def eager(architecture: Architecture) -> Specimen:
    """The eager way: quantized in place, frozen, run."""
    model = model_of(architecture)
    inputs = inputs_of(model, architecture.kind)
    with torch.no_grad():
        want = tensors(model(*inputs))
        quantized = qcompile.freeze(qcompile.quantize(model))
        got = tensors(quantized(*inputs))
    rows = qcompile.report(quantized).rows
    cosine = _cosine(got, want)
    left = [r.weight for r in rows if r.quantized and r.weight in dict(quantized.named_parameters())]
    return Specimen(None, rows, cosine, _noise(model_of(architecture), inputs, cosine), [], left)


def matmuls(module: fx.GraphModule) -> int:
    """How many matmul-like operators that something reads stand in a graph and its subgraphs."""
    module = copy.deepcopy(module)
    module.graph.eliminate_dead_code()
    names = (str(getattr(n.target, "_schema", None) and n.target._schema.name) for g in graphs(module) for n in g.nodes)
    return sum(name.partition("::")[2] in MATMULS for name in names)


def _experts(model: nn.Module) -> list[str]:
    named = model.named_parameters()
    return [name for name, p in named if p.dim() == 3 and "experts" in name and "bias" not in name]


def _noise(model: nn.Module, inputs: tuple[Tensor, ...], cosine: float) -> float | None:
    if cosine > 0.99:
        return None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        want = tensors(model(*inputs))
        for p in model.parameters():
            if p.dim() > 1:
                # Rounding to steps of max/127 is off by a step's length over the square root of 12.
                step = p.abs().amax(tuple(range(1, p.dim())), keepdim=True) / 127
                p.add_(torch.randn(p.shape, generator=generator) * step / 12**0.5)
        return _cosine(tensors(model(*inputs)), want)


def _cosine(got: list[Tensor], want: list[Tensor]) -> float:
    pairs = zip(got, want, strict=True)
    worst = min(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0) for a, b in pairs)
    gc.collect()
    return float(worst)
