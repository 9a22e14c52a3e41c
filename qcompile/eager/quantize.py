"""Quantizing a module in place: every weight gets a plan, and its module learns to read it through codes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.eager.layers import Layer, describe
from qcompile.eager.mixin import Plan, QModuleMixin, State
from qcompile.eager.modules import become
from qcompile.kernels.dtypes import QType, qint8, qtype
from qcompile.kernels.scheme import Scheme
from qcompile.passes.select import FLOATS, Select, first_match

__all__ = ["ACTIVATIONS", "Place", "Request", "activation_dtype", "places_of", "quantize_module", "reason_for"]

log = logging.getLogger("qcompile.eager")

#: The dtypes that activations can have: codes of 8 bits, for which products and scales exist.
ACTIVATIONS = ("qint8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        select: gives each weight its scheme.
        activations: their dtype, or None.
        optimizer: of the weights' scales: a name, or an object.
        weights: whether weights are quantized at all.
    """

    select: Select
    activations: QType | None = None
    optimizer: Any = "max"
    weights: bool = True


@dataclass(frozen=True)
class Place:
    """A module, by all its names, and what quantization does to it."""

    module: nn.Module
    names: tuple[str, ...]
    layer: Layer

    def weight_names(self, parameter: str) -> list[str]:
        return [f"{n}.{parameter}" if n else parameter for n in self.names]


def quantize_module(model: nn.Module, request: Request) -> nn.Module:
    """Quantize in place; see :func:`qcompile.quantize`.

    Raises:
        ValueError: a pattern that matches nothing, nothing to quantize, or a scheme that a weight cannot have.
    """
    places = places_of(model)
    _check_patterns(model, places, (*request.select.include, *request.select.exclude))
    looked_up = {id(p.module._parameters.get(n)) for p in places if p.layer.looked_up for n in p.layer.weights}
    states: list[tuple[nn.Module, State]] = []
    for place in places:
        state = _state(place, request, looked_up)
        if state is not None:
            states.append((place.module, state))
    if not states:
        known = any(isinstance(m, QModuleMixin) for m in model.modules())
        if known:
            raise ValueError("everything that could be quantized is quantized already; start from the float model")
        reasons = {reason_for(p, n, p.module._parameters.get(n), request) for p in places for n in (*p.layer.weights, "")}
        log.warning("nothing was quantized: %s", "; ".join(sorted(r for r in reasons if r)) or "the model has no weights")
    _try_optimizer(request.optimizer, {plan.scheme for _, state in states for plan in state.plans.values()})
    for module, state in states:
        become(module, state)
    leave_fast_paths(model)
    # For the report, which says why the rest stays float.
    model.__dict__["q_request"] = request
    return model


def _try_optimizer(optimizer: Any, schemes: Iterable[Scheme]) -> None:
    """Raise now what an optimizer object has against a scheme, not when a weight is first read."""
    if isinstance(optimizer, str):
        return
    sample = torch.linspace(-1.0, 1.0, 64).reshape(2, 32)
    for scheme in schemes:
        try:
            optimizer.qparams(sample, scheme)
        except ValueError as error:
            raise ValueError(f"{optimizer!r} cannot quantize to {scheme}: {error}") from error


def places_of(model: nn.Module) -> list[Place]:
    """Every module that has something to quantize, once."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    # Attention multiplies with this layer's weight itself.
    never_called = {id(m.out_proj) for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    places = []
    for key, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        layer = describe(module)
        if layer is not None and key in never_called:
            layer = replace(layer, reads=False, gives=False)
        if layer is not None:
            places.append(Place(module, tuple(names[key]), layer))
    return places


def _state(place: Place, request: Request, looked_up: set[int]) -> State | None:
    """The new state of a module, or None where nothing about it changes."""
    module, layer = place.module, place.layer
    old = module.q if isinstance(module, QModuleMixin) else State()
    plans = dict(old.plans)
    for name, arrangement in (*layer.weights.items(), *layer.unsure.items()):
        parameter = module._parameters.get(name)
        if not request.weights or parameter is None or name in plans:
            continue
        if reason_for(place, name, parameter, request) is not None:
            continue
        select = request.select
        if name in layer.unsure and select.weights.bits < 8 and not _named(place, name, select.include):
            # How it is used is not known; 8 bits do little harm to what is no product after all.
            select = replace(select, weights=select.embeddings or qint8, mode=None)
        scheme = select.scheme_for(arrangement.matrix_shape, id(parameter) in looked_up, arrangement.kind.startswith("conv"))
        plans[name] = Plan(scheme, arrangement, request.optimizer)
    activations = old.activations
    touched = plans != old.plans
    wanted = reason_for(place, "", None, request) is None
    if request.activations is not None and activations is None and (layer.reads or layer.gives) and wanted:
        activations, touched = request.activations, True
    if not touched:
        return None
    return State(plans, activations, layer.reads, layer.gives, old.static_input, old.static_output)


def reason_for(place: Place, name: str, parameter: Tensor | None, request: Request) -> str | None:
    """Why a weight (or, without one, the activations of a module) stays float, or None."""
    select = request.select
    names = [n for n in (*place.names, *(place.weight_names(name) if name else ())) if n]
    hit = first_match(select.exclude, names)
    if hit is not None:
        return f"excluded by {hit!r}"
    if select.include and first_match(select.include, names) is None and names:
        return f"not among the included: {', '.join(map(repr, select.include))}"
    if parameter is None:
        return None
    if place.layer.reason is not None:
        return place.layer.reason
    if parameter.dtype not in FLOATS:
        return f"weight is {str(parameter.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    if _computed(place.module, name):
        return "weight is computed at run time (by a parametrization)"
    if parameter.numel() < max(1, select.min_elements):
        return f"too small to win: {parameter.numel()} elements, at least {max(1, select.min_elements)} pay"
    return None


def _computed(module: nn.Module, name: str) -> bool:
    return name.startswith("original") or (name.endswith(("_orig", "_g", "_v")) and not hasattr(module, "weight_ih_l0"))


def _named(place: Place, name: str, include: Sequence[str]) -> bool:
    return bool(include) and first_match(include, place.weight_names(name)) is not None


def _check_patterns(model: nn.Module, places: Iterable[Place], patterns: Sequence[str]) -> None:
    known: list[str] = []
    for place in places:
        known += [n for n in place.names if n]
        known += [w for name in (*place.layer.weights, *place.layer.unsure) for w in place.weight_names(name)]
    known += [n for n, m in model.named_modules(remove_duplicate=False) if n and isinstance(m, QModuleMixin)]
    lost = [p for p in patterns if first_match([p], known) is None]
    if lost:
        shown = ", ".join(sorted(set(known))[:20]) + (f", … ({len(set(known))} in all)" if len(set(known)) > 20 else "")
        raise ValueError(f"no weight or module matches {', '.join(map(repr, lost))}; there are: {shown}")


def leave_fast_paths(model: nn.Module) -> None:
    """torch's fused encoder layer reads the float weights of its children and never calls them: it must not be taken."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, QModuleMixin) for m in module.modules()):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(isinstance(m, QModuleMixin) for m in module.modules()):
            module.use_nested_tensor = False  # only the fused layer takes its padded batches as nested tensors


def activation_dtype(given: QType | str | None) -> QType | None:
    """The dtype of activations that a user named.

    Raises:
        ValueError: a dtype that activations cannot have.
        TypeError: neither a dtype nor a name.
    """
    if given is None or given == "none":
        return None
    found = qtype(given)
    if found.name not in ACTIVATIONS:
        raise ValueError(f"activations can be {', '.join(ACTIVATIONS)}, got {found.name}")
    return found
