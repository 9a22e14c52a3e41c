"""A quantized module in a folder: its state dict, and its quantization map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qcompile import stored_folder, stored_tensors
from qcompile.eager.qmap import quantization_map, requantize
from qcompile.eager.weight import PARTS, QWeight, parameter_prefix
from qcompile.progress import progress_bar

__all__ = ["load", "save"]

_KEYS = ("format", "version", "kind", "torch", "map", "tensors", "checksum")

#: How Quanto names its maps, beside ``model.safetensors``.
_QUANTO_MAPS = ("quanto_qmap.json", "quantization_map.json")
_QUANTO_TENSORS = "model.safetensors"

#: A map with more bytes is refused.
_LARGEST_MAP = 64 << 20


def save(model: nn.Module, folder: Path) -> Path:
    """Write a quantized module; see :func:`qcompile.save`."""
    document = {
        "format": stored_folder.FORMAT,
        "version": stored_folder.VERSION,
        "kind": "module",
        "torch": torch.__version__,
        "map": quantization_map(model),
    }
    stored_folder.write(folder, document, _state(model))
    return folder


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, in which a weight that several modules share is one tensor."""
    state = model.state_dict()
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QWeight):
            prefix = parameter_prefix(path)
            same = first.setdefault(id(module), prefix)
            state.update({prefix + n: state[same + n] for n in PARTS if same + n in state})
    return state


def load(folder: Path, model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Make a float model the quantized one that was saved; see :func:`qcompile.load`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"qcompile.load takes a torch.nn.Module to load into, got {type(model).__name__}")
    tensors: dict[str, Tensor]
    if not (folder / stored_folder.STRUCTURE).is_file() and _quanto_map(folder) is not None:
        qmap, tensors = _quanto(folder)
        return requantize(model, tensors, qmap, device)
    document = stored_folder.read(folder)
    if document.get("kind") != "module":
        raise ValueError(f"{str(folder)!r} holds a program, not a module: load it without a model")
    stored_folder.check_form(folder, document, _KEYS)
    tensors = stored_tensors.read(folder, document["tensors"], progress_bar())
    return requantize(model, tensors, document["map"], device)


def _quanto_map(folder: Path) -> Path | None:
    return next((folder / name for name in _QUANTO_MAPS if (folder / name).is_file()), None)


def _quanto(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = _quanto_map(folder)
    if path is None or path.stat().st_size > _LARGEST_MAP:
        raise ValueError(f"{str(folder)!r} has no {' or '.join(_QUANTO_MAPS)} of a size that a map can have")
    try:
        qmap = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(qmap, dict):
        raise ValueError(f"{str(path)!r} is no map of modules")
    file = folder / _QUANTO_TENSORS
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has a map but no {_QUANTO_TENSORS}")
    return qmap, load_file(file)
