"""Hugging Face Quanto's files (optimum-quanto 0.2): a state dict and a map of what is quantized, without Quanto.

The map is ``{module: {"weights": qtype, "activations": qtype}}``, each a name or ``"none"``. A quantized module holds

===========================  ==========================================================================================
``weight._data``             8 bits: codes, int8 or float8, in the shape of the weight
``weight._data._data``       2 and 4 bits: codes of the grouped matrix ``[groups, size]``, packed along its *first* axis
``weight._scale``            one an output channel, or a group
``weight._shift``            2 and 4 bits: floating point, ``scale * code - shift``; or uint8, ``scale * (code - shift)``
``input_scale``,             one element each, 1 where activations are not quantized or not calibrated
``output_scale``
``bias``                     float, where the module has one
===========================  ==========================================================================================

The bytes of 2 and 4 bit codes hold the first rows of the matrix in their lowest bits, the next rows in the next bits, and so
on, the last block filled up with rows that mean nothing. Neither the group size nor the shape of such a weight is stored:
the size is a row of the packed matrix, the shape is the model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qcompile.kernels import numerics
from qcompile.kernels.dtypes import QType, qint2, qint4, qint8, qtypes
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import SCALE_DTYPES, Granularity, Mode, PerChannel, PerGroup, Scheme

__all__ = ["QuantoFile", "QuantoModule", "decode", "read"]

#: Quanto's names of what a weight may be held in.
_WEIGHTS: dict[str, QType] = {
    **{t.name: t for t in (qint2, qint4, qint8)},
    **{name: t for name, t in qtypes.items() if t.is_float},
    "qfloat8": qtypes["qfloat8_e4m3fn"],
}
_ACTIVATIONS = {name: t for name, t in _WEIGHTS.items() if t.bits == 8}

_MAPS = ("quanto_qmap.json", "quantization_map.json")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class QuantoModule:
    """One module of the map.

    Attributes:
        weight: the codes as they are in the file, as a matrix ``[out, everything else]``; None where only activations are
            quantized.
        shape: the shape of the weight in the model; empty where the weight is None.
        bias: float, or None.
        activations: the dtype of input and output, or None.
        input_scale, output_scale: one element, no axes, in the file's dtype; None where the file has none.
    """

    weight: QTensor | None
    shape: tuple[int, ...]
    bias: Tensor | None
    activations: QType | None
    input_scale: Tensor | None
    output_scale: Tensor | None


@dataclass(frozen=True, eq=False)
class QuantoFile:
    """A model as Quanto stored it.

    Attributes:
        modules: what the map names, by module name.
        floats: every other tensor, by its name in the state dict.
    """

    modules: dict[str, QuantoModule]
    floats: dict[str, Tensor]


def read(folder: str | Path, shapes: nn.Module | Mapping[str, Sequence[int]] | None = None) -> QuantoFile:
    """Read a folder that Quanto saved: ``model.safetensors`` (or its shards) and the map.

    Args:
        folder: holds ``quanto_qmap.json`` or ``quantization_map.json`` beside the tensors.
        shapes: see :func:`decode`.

    Raises:
        ValueError: a file is missing or damaged, or see :func:`decode`.
    """
    root = Path(folder)
    maps = [root / name for name in _MAPS if (root / name).is_file()]
    if not maps:
        raise ValueError(f"{str(root)!r} holds neither {' nor '.join(_MAPS)}: it is no model that Quanto saved")
    quantization_map = _json(maps[0])
    tensors: dict[str, Tensor] = {}
    for path in _shards(root):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name in tensors:
                        raise ValueError(f"{str(path)!r} holds {name!r}, which another file of the folder holds too")
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    return decode(tensors, quantization_map, shapes)


def decode(
    state_dict: Mapping[str, Tensor],
    quantization_map: Mapping[str, Any],
    shapes: nn.Module | Mapping[str, Sequence[int]] | None = None,
) -> QuantoFile:
    """What a state dict and a map of Quanto's hold.

    Args:
        state_dict: tensors by name, of a model that was frozen.
        quantization_map: as Quanto gives it, parsed.
        shapes: the float model (which may be on the meta device) or the shapes of its weights by module name. 2 and 4 bit
            weights in groups need one of them; where a module has a bias, that tells a matrix's shape too.

    Raises:
        ValueError: the map is not one of Quanto's, a tensor is missing, left over, or of a wrong shape or dtype, the model
            was not frozen, or the shape of a weight cannot be told.
        TypeError: something in the state dict that is no tensor.
    """
    entries = _entries(quantization_map)
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"a state dict holds tensors by name, got {name!r}: {type(tensor).__name__}")
    left = dict(state_dict)
    modules = {name: _module(name, *entry, left, _shape_of(shapes, name)) for name, entry in entries.items()}
    for name in left:
        if name.endswith((".weight._data", ".weight._data._data", ".weight._scale", ".weight._shift")):
            raise ValueError(f"{name!r} is part of a quantized weight, but the quantization map does not name its module")
    return QuantoFile(modules, left)


def _module(
    name: str, weights: QType | None, activations: QType | None, left: dict[str, Tensor], known: tuple[int, ...] | None
) -> QuantoModule:
    prefix = f"{name}." if name else ""
    scales = [_scalar(left, f"{prefix}{which}_scale") for which in ("input", "output")]
    if weights is None:
        return QuantoModule(None, (), None, activations, *scales)
    bias = left.pop(f"{prefix}bias", None)
    if bias is not None and (bias.dim() != 1 or not bias.is_floating_point()):
        raise ValueError(f"{prefix}bias must be floating point with one axis, got {_described(bias)}")
    if f"{prefix}weight" in left:
        raise ValueError(
            f"{prefix}weight is not quantized though the map says {weights}: the model was saved before it was frozen; "
            f"call freeze(model) in Quanto and save it again"
        )
    weight = f"{prefix}weight"
    if weights.bits == 8:
        quantized, shape = _bytes(weight, weights, left)
    else:
        quantized, shape = _packed(weight, weights, left, known, None if bias is None else bias.numel())
    if known is not None and shape != known:
        raise ValueError(f"{weight} has shape {list(shape)} in the file and {list(known)} in the model")
    if bias is not None and bias.numel() != shape[0]:
        raise ValueError(f"{prefix}bias has {bias.numel()} elements for a weight of shape {list(shape)}")
    return QuantoModule(quantized, shape, bias, activations, *scales)


def _bytes(weight: str, dtype: QType, left: dict[str, Tensor]) -> tuple[QTensor, tuple[int, ...]]:
    """A weight of 8 bits: one scale an output channel."""
    data, scale = _take(left, f"{weight}._data"), _scale(left, f"{weight}._scale")
    if data.dtype != dtype.dtype or data.dim() < 2:
        raise ValueError(f"{weight}._data must be {dtype.dtype} with at least two axes, got {_described(data)}")
    shape = tuple(data.shape)
    # A weight of one output channel was quantized as a whole.
    if tuple(scale.shape) != (shape[0], *[1] * (len(shape) - 1)) and not (shape[0] == 1 == scale.numel()):
        raise ValueError(f"{weight}._scale must be one a row of {list(shape)}, got {_described(scale)}")
    matrix = data.reshape(shape[0], math.prod(shape[1:]))
    scheme = Scheme(dtype, PerChannel(0), "symmetric", scale.dtype)
    return QTensor(matrix.contiguous(), scale.reshape(shape[0]).contiguous(), None, scheme, tuple(matrix.shape)), shape


def _packed(
    weight: str, dtype: QType, left: dict[str, Tensor], known: tuple[int, ...] | None, out: int | None
) -> tuple[QTensor, tuple[int, ...]]:
    """A weight of 2 or 4 bits: a scale and a shift a group."""
    data, scale = _take(left, f"{weight}._data._data"), _scale(left, f"{weight}._scale")
    shift = _take(left, f"{weight}._shift")
    if data.dtype != torch.uint8 or data.dim() < 2:
        raise ValueError(f"{weight}._data._data must be uint8 with at least two axes, got {_described(data)}")
    if shift.shape != scale.shape or shift.dtype not in (scale.dtype, torch.uint8):
        raise ValueError(f"{weight}._shift must be like the scale, {_described(scale)}, or uint8; got {_described(shift)}")
    groups, size, per_byte = scale.numel(), math.prod(data.shape[1:]), 8 // dtype.bits
    if data.shape[0] != -(-groups // per_byte) or (scale.dim() and scale.shape[0] != groups):
        raise ValueError(
            f"{weight}: {_described(data)} holds {per_byte} codes a byte along the first axis, which does not fit the "
            f"{_described(scale)} of its scale"
        )
    shape = _weight_shape(weight, known, out, groups, size)
    columns = math.prod(shape[1:])
    granularity: Granularity = PerChannel(0) if groups == shape[0] else PerGroup(size)
    mode: Mode = "affine" if shift.dtype == torch.uint8 else "shift"
    scheme = Scheme(dtype, granularity, mode, scale.dtype)
    codes = _unpack(data.reshape(data.shape[0], size), dtype.bits, groups).reshape(shape[0], columns)
    if mode == "affine" and groups and int(shift.max()) >= dtype.levels:
        raise ValueError(f"{weight}._shift holds {int(shift.max())}, which is no code of {dtype}")
    form = scheme.scale_shape(codes.shape)
    zero = (shift if mode == "affine" else -shift).reshape(form).contiguous()
    return QTensor(numerics.store(codes, scheme), scale.reshape(form).contiguous(), zero, scheme, (shape[0], columns)), shape


def _weight_shape(weight: str, known: tuple[int, ...] | None, out: int | None, groups: int, size: int) -> tuple[int, ...]:
    shape = known
    if shape is None and out and groups % out == 0:
        shape = (out, groups // out * size)
    if shape is None:
        raise ValueError(
            f"the file does not tell the shape of {weight}, {groups} groups of {size}; pass the float model (on the meta "
            f"device will do) or its shapes"
        )
    if len(shape) < 2 or math.prod(shape) != groups * size or not shape[0] or groups % shape[0]:
        raise ValueError(f"{weight} has {groups} groups of {size} in the file, which does not fit shape {list(shape)}")
    return shape


def _unpack(data: Tensor, bits: int, rows: int) -> Tensor:
    """Codes from bytes: the first block of rows in the lowest bits."""
    mask = (1 << bits) - 1
    return torch.cat([(data >> at) & mask for at in range(0, 8, bits)])[:rows]


def _scale(left: dict[str, Tensor], name: str) -> Tensor:
    scale = _take(left, name)
    if scale.dtype not in SCALE_DTYPES.values():
        raise ValueError(f"{name} must be {', '.join(SCALE_DTYPES)}, got {scale.dtype}")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return scale


def _scalar(left: dict[str, Tensor], name: str) -> Tensor | None:
    scale = left.pop(name, None)
    if scale is not None and (scale.numel() != 1 or not scale.is_floating_point()):
        raise ValueError(f"{name} must be one floating point number, got {_described(scale)}")
    return None if scale is None else scale.reshape(())


def _take(left: dict[str, Tensor], name: str) -> Tensor:
    if name not in left:
        raise ValueError(f"{name!r} is missing from the state dict, though the quantization map names its module")
    return left.pop(name)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _shape_of(shapes: nn.Module | Mapping[str, Sequence[int]] | None, name: str) -> tuple[int, ...] | None:
    if isinstance(shapes, nn.Module):
        try:
            weight = getattr(shapes.get_submodule(name), "weight", None)
        except AttributeError as error:
            raise ValueError(f"the quantization map names {name!r}, which the model does not have") from error
        return None if weight is None else tuple(weight.shape)
    shape = None if shapes is None else shapes.get(name)
    return None if shape is None else tuple(int(size) for size in shape)


def _entries(given: object) -> dict[str, tuple[QType | None, QType | None]]:
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            "a quantization map of Quanto's is {module: {'weights': qtype, 'activations': qtype}}, and not empty"
        )
    entries = {}
    for name, entry in given.items():
        if not isinstance(name, str) or not isinstance(entry, Mapping) or set(entry) != {"weights", "activations"}:
            raise ValueError(f"entry {name!r} of the quantization map must have weights and activations, got {entry!r}")
        entries[name] = (
            _named(name, "weights", entry["weights"], _WEIGHTS),
            _named(name, "activations", entry["activations"], _ACTIVATIONS),
        )
    return entries


def _named(module: str, what: str, given: object, known: Mapping[str, QType]) -> QType | None:
    if given is None or given == "none":
        return None
    if not isinstance(given, str) or given not in known:
        raise ValueError(f"{what} of {module!r} must be none, {', '.join(known)}; got {given!r}")
    return known[given]


def _shards(root: Path) -> list[Path]:
    if not (root / _INDEX).is_file():
        if not (root / "model.safetensors").is_file():
            raise ValueError(f"{str(root)!r} holds no model.safetensors")
        return [root / "model.safetensors"]
    index = _json(root / _INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{str(root / _INDEX)!r} has no weight_map")
    paths = []
    for name in dict.fromkeys(files.values()):
        if not isinstance(name, str) or Path(name).name != name or not (root / name).is_file():
            raise ValueError(f"{str(root / _INDEX)!r} names {name!r}, which is no file of the folder")
        paths.append(root / name)
    return paths


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
