"""``quantization_map`` and ``requantize``: a quantized module's structure as JSON, and the way back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.eager.layers import describe
from qcompile.eager.mixin import Plan, QModuleMixin, State, hold_skeleton
from qcompile.eager.modules import become
from qcompile.eager.quantize import activation_dtype, leave_fast_paths
from qcompile.eager.weight import CHILD, PARTS, QWeight
from qcompile.kernels.qparams import CLIPS
from qcompile.kernels.scheme import Scheme

__all__ = ["quantization_map", "requantize"]

VERSION = 1


def quantization_map(model: nn.Module) -> dict[str, Any]:
    """What is quantized in a model, and how: everything beside the tensors of its state dict that :func:`requantize` needs.

    Returns:
        Plain values for ``json.dump``: ``{"version": 1, "modules": {path: {"weights": {parameter: {"scheme", "arrangement",
        "groups", "optimizer"}}, "activations", "static_input", "static_output"}}}``. A module reachable by several names is
        there by its first.

    Raises:
        ValueError: nothing in the model is quantized.
    """
    modules = {}
    for path, module in model.named_modules():
        if not isinstance(module, QModuleMixin):
            continue
        q = module.q
        weights = {
            name: {
                "scheme": str(plan.scheme),
                "arrangement": plan.arrangement.kind,
                "groups": plan.arrangement.groups,
                "optimizer": plan.optimizer if isinstance(plan.optimizer, str) else type(plan.optimizer).__name__,
            }
            for name, plan in q.plans.items()
        }
        modules[path] = {
            "weights": weights,
            "activations": None if q.activations is None else q.activations.name,
            "static_input": q.static_input,
            "static_output": q.static_output,
        }
    if not modules:
        raise ValueError("nothing in the model is quantized; call qcompile.quantize(model, ...) first")
    return {"version": VERSION, "modules": modules}


def requantize(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    quantization_map: Mapping[str, Any],
    device: torch.device | str | None = None,
) -> nn.Module:
    """Make a float model of the same architecture the quantized one that was saved, in place, bit for bit.

    Args:
        model: a float model, also on the meta device.
        state_dict: of the quantized model, frozen or not; tensors may be shared with the model afterwards.
        quantization_map: what :func:`quantization_map` returned (or Quanto's own map, with its state dict).
        device: where the model goes; None: where the tensors of ``state_dict`` are.

    Returns:
        The model.

    Raises:
        ValueError: a map of another version or form, modules that the model does not have, missing or extra tensors, or
            tensors of another shape or dtype; and a model on the meta device with buffers that are in no state dict.

    Example:
        >>> import torch, qcompile
        >>> model = qcompile.freeze(qcompile.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), weights="qint4"))
        >>> with torch.device("meta"):
        ...     new = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> new = qcompile.requantize(new, model.state_dict(), qcompile.quantization_map(model), device="cpu")
        >>> x = torch.randn(2, 64)
        >>> bool(torch.equal(new(x), model(x)))
        True
    """
    _check_buffers(model)
    if is_quanto(quantization_map):
        from qcompile.eager.from_quanto import translated

        state_dict, quantization_map = translated(model, state_dict, quantization_map)
    _rebuild(model, state_dict, _entries(quantization_map))
    _load(model, state_dict)
    return model if device is None else model.to(device)


def is_quanto(quantization_map: Mapping[str, Any]) -> bool:
    """Whether a map is one of Hugging Face's Quanto: ``{module: {"weights": "qint8", "activations": "none"}}``."""
    return (
        isinstance(quantization_map, Mapping)
        and "version" not in quantization_map
        and bool(quantization_map)
        and all(isinstance(e, Mapping) and isinstance(e.get("weights"), str) for e in quantization_map.values())
    )


def _rebuild(
    model: nn.Module, state_dict: Mapping[str, Tensor], entries: Mapping[str, tuple[Mapping[str, Any], State]]
) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    lost = sorted(set(entries) - set(modules))
    if lost:
        raise ValueError(
            f"the model has no modules {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}, which the map names"
        )
    held: dict[int, tuple[object, QWeight]] = {}  # by the float parameter, kept so that its id stays its own
    for path, (weights, state) in entries.items():
        module = modules[path]
        if isinstance(module, QModuleMixin):
            raise ValueError(f"module {path!r} is quantized already; requantize takes a float model")
        layer = describe(module)
        known = {} if layer is None else {**layer.weights, **layer.unsure}
        for name, entry in weights.items():
            arrangement = known.get(name)
            if arrangement is None or (arrangement.kind, arrangement.groups) != (entry["arrangement"], entry["groups"]):
                raise ValueError(
                    f"module {path!r} ({type(module).__name__}) has no weight {name!r} arranged as {dict(entry)}"
                )
            optimizer = entry["optimizer"] if entry["optimizer"] in CLIPS else "max"
            state.plans[name] = Plan(Scheme.parse(entry["scheme"]), arrangement, optimizer)
        if layer is not None:
            state.reads, state.gives = layer.reads, layer.gives
        become(module, state)
        for name, plan in state.plans.items():
            parameter = module._parameters[name]
            if f"{path}.{name}.{PARTS[0]}".lstrip(".") not in state_dict:
                continue
            if id(parameter) in held:
                del module._parameters[name]
                module._modules[CHILD + name] = held[id(parameter)][1]
            else:
                held[id(parameter)] = (parameter, hold_skeleton(module, name, plan))
    leave_fast_paths(model)


def _load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    on_meta = any(t.is_meta for t in model.parameters()) or any(b.is_meta for n, b in model.named_buffers() if "._" not in n)
    scales = {n: t for n, t in state_dict.items() if n.rpartition(".")[2] in ("input_scale", "output_scale")}
    for name, scale in scales.items():
        if scale.numel() != 1 or not math.isfinite(float(scale)) or float(scale) <= 0:
            raise ValueError(f"{name} must be one positive number, got {scale!r}")
    for name, own in itertools.chain(model.named_parameters(), model.named_buffers()):
        given = state_dict.get(name)
        if isinstance(given, Tensor) and given.dtype != own.dtype:
            raise ValueError(
                f"{name} is {given.dtype} in the state dict and {own.dtype} in the model; build the model in the dtype that "
                "was saved, or convert it first (model.to(dtype))"
            )
    try:
        model.load_state_dict(dict(state_dict), strict=True, assign=on_meta)
    except RuntimeError as error:
        raise ValueError(f"the state dict does not fit the model and its map: {error}") from error


def _check_buffers(model: nn.Module) -> None:
    """Buffers that no state dict has cannot come back from the meta device."""
    lost = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
    ]
    if lost:
        raise ValueError(
            f"{', '.join(lost[:5])}{' …' if len(lost) > 5 else ''} on the meta device hold no values, and no state dict has "
            "them (they are not persistent); build the model under qcompile.meta_parameters() instead of "
            "torch.device('meta'), which leaves buffers real"
        )


def _entries(quantization_map: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], State]]:
    """The map, checked: it may come from a file."""
    form = "what qcompile.quantization_map returns"
    if not isinstance(quantization_map, Mapping) or not isinstance(quantization_map.get("modules"), Mapping):
        raise ValueError(f"not a quantization map; {form} is {{'version', 'modules'}}")
    if quantization_map.get("version") != VERSION:
        raise ValueError(f"a quantization map of version {quantization_map.get('version')!r}; this is for version {VERSION}")
    found = {}
    for path, entry in quantization_map["modules"].items():
        keys = {"weights", "activations", "static_input", "static_output"}
        if not isinstance(entry, Mapping) or set(entry) != keys or not isinstance(entry["weights"], Mapping):
            raise ValueError(f"the map's entry for {path!r} must have the keys {', '.join(sorted(keys))}, got {entry!r}")
        for name, weight in entry["weights"].items():
            wanted = {"scheme": str, "arrangement": str, "groups": int, "optimizer": str}
            if not isinstance(weight, Mapping) or {k: type(v) for k, v in weight.items()} != wanted:
                raise ValueError(f"the map's entry for {path}.{name} must have {', '.join(wanted)}, got {weight!r}")
        activations = entry["activations"]
        if activations is not None and not isinstance(activations, str):
            raise ValueError(f"the map's entry for {path!r} has activations {activations!r}")
        if not all(isinstance(entry[k], bool) for k in ("static_input", "static_output")):
            raise ValueError(f"the map's entry for {path!r}: static_input and static_output must be true or false")
        state = State({}, activation_dtype(activations), False, False, entry["static_input"], entry["static_output"])
        found[str(path)] = (entry["weights"], state)
    return found
