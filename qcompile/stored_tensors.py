"""Tensors in a safetensors file: written without a second copy in memory, read only after all sizes were checked.

Tensors that share memory stay that way: each run of memory is one entry of the file, and a tensor is a view of an entry.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qcompile.progress import Bar

__all__ = ["read", "write"]

#: dtypes as safetensors names them; others are stored as bytes.
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip

#: dtypes that a file may name.
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *_CODES, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.uint16, torch.uint32, torch.uint64, torch.complex64,
        torch.complex128,
    )
}  # fmt: skip

_BLOCK = 16 << 20


@dataclass
class _Run:
    """A stretch of memory that one or several tensors view."""

    tensors: dict[str, Tensor]

    def stored(self) -> tuple[Tensor, int]:
        """The contiguous tensor to store, and where in its memory that begins, in elements."""
        first = next(iter(self.tensors.values()))
        if len({t.dtype for t in self.tensors.values()}) > 1:
            raise ValueError(f"{' and '.join(map(repr, self.tensors))} view the same memory as different dtypes")
        if all(_same_view(t, first) for t in self.tensors.values()) and first.is_contiguous():
            return first, int(first.storage_offset())
        low = min(int(t.storage_offset()) for t in self.tensors.values())
        high = max(int(t.storage_offset()) + _span(t.shape, t.stride()) for t in self.tensors.values())
        return first.as_strided((high - low,), (1,), low), low


def write(path: Path, tensors: Mapping[str, Tensor], progress: Bar | None = None) -> dict[str, Any]:
    """Write tensors to a new file; returns what :func:`read` needs to give the same tensors back.

    Raises:
        ValueError: a tensor that holds no values (meta), or two that view the same memory as different dtypes.
    """
    entries: dict[str, Tensor] = {}
    refs: dict[str, Any] = {}
    for run in _runs(tensors):
        name = next(iter(run.tensors))
        stored, low = run.stored()
        entries[name] = stored
        for key, tensor in run.tensors.items():
            refs[key] = _reference(name, stored, low, tensor, tensors[key])
    digest = _write_file(path, entries, progress)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest, "tensors": refs}


def read(folder: Path, index: object, progress: Bar | None = None) -> dict[str, Tensor]:
    """The tensors that :func:`write` wrote.

    Args:
        folder: where the file lies.
        index: what :func:`write` returned; nothing in it is trusted.

    Raises:
        ValueError: the file is missing, cut off, changed, or holds other tensors than the index says.
    """
    if not isinstance(index, dict) or set(index) != {"file", "bytes", "sha256", "tensors"}:
        raise ValueError("the index of the tensors must have file, bytes, sha256 and tensors")
    name = index["file"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is not the name of a safetensors file in the folder")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing")
    if path.stat().st_size != index["bytes"]:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size} bytes, {index['bytes']!r} were written: it was cut off")
    if _digest(path) != index["sha256"]:
        raise ValueError(f"{str(path)!r} is not what was written: its sha256 differs, it was changed or damaged")
    refs = {k: _checked(k, v) for k, v in _mapping(index["tensors"]).items()}
    try:
        with safe_open(path, framework="pt") as file:
            _compare(path, file, refs)
            held = {e: file.get_tensor(e).clone() for e in _tracked(list(file.keys()), progress)}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    made: dict[str, Tensor] = {}
    same: dict[tuple[object, ...], Tensor] = {}
    moved: dict[tuple[str, str], Tensor] = {}
    for key, ref in refs.items():
        identity = tuple(tuple(v) if isinstance(v, list) else v for v in ref.values())
        if identity not in same:
            same[identity] = _view(key, held[ref["entry"]], ref, moved)
        made[key] = same[identity]
    return made


def _runs(tensors: Mapping[str, Tensor]) -> list[_Run]:
    runs: dict[tuple[object, ...], _Run] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            raise ValueError(f"tensor {name!r} holds no values (it is on the meta device)")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"tensor {name!r} is {tensor.layout}, only plain strided tensors can be stored")
        if tensor.dtype not in _DTYPES.values():
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, which cannot be stored; {', '.join(_DTYPES)} can")
        plain = tensor.detach()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        shared = plain.numel() > 0
        key = (plain.device, plain.untyped_storage().data_ptr()) if shared else (name,)
        runs.setdefault(key, _Run({})).tensors[name] = plain
    return list(runs.values())


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a.storage_offset() == b.storage_offset() and a.shape == b.shape and a.stride() == b.stride()


def _span(shape: Iterable[int], strides: Iterable[int]) -> int:
    """How many elements of memory a view reaches over."""
    reach = 0
    for size, stride in zip(shape, strides, strict=True):
        if size == 0:
            return 0
        reach += (size - 1) * stride
    return reach + 1


def _reference(entry: str, stored: Tensor, low: int, tensor: Tensor, given: Tensor) -> dict[str, Any]:
    """How ``tensor`` is found in the file; ``given`` is the same as its owner holds it."""
    parameter = isinstance(given, nn.Parameter)
    ref: dict[str, Any] = {
        "entry": entry,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "device": str(tensor.device),
        "parameter": parameter,
        "requires_grad": parameter and given.requires_grad,
    }
    if tensor.shape != stored.shape or tensor.stride() != stored.stride():
        ref |= {"stride": list(tensor.stride()), "offset": tensor.storage_offset() - low}
    return ref


def _write_file(path: Path, entries: Mapping[str, Tensor], progress: Bar | None) -> str:
    """Write the file block by block; returns its sha256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in entries.items():
        size = tensor.numel() * tensor.element_size()
        code = _CODES.get(tensor.dtype)
        shape = list(tensor.shape) if code else [size]
        header[name] = {"dtype": code or "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for tensor in _tracked(list(entries.values()), progress, "saving"):
            for block in _blocks(tensor):
                digest.update(block)
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _blocks(tensor: Tensor) -> Iterable[bytes]:
    if tensor.numel() == 0:
        return
    # A tensor of one element may have any stride, which reshape keeps and a view as bytes refuses.
    flat = tensor.reshape(-1).as_strided((tensor.numel(),), (1,)) if tensor.numel() == 1 else tensor.reshape(-1)
    flat = flat.view(torch.uint8)
    for start in range(0, flat.numel(), _BLOCK):
        yield flat[start : start + _BLOCK].cpu().numpy().tobytes()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ValueError("the index of the tensors must name each of them")
    return value


def _checked(key: str, ref: object) -> dict[str, Any]:
    """A reference with every field of the right type and every number in range."""
    required = {"entry": str, "dtype": str, "shape": list, "device": str, "parameter": bool, "requires_grad": bool}
    optional = {"stride": list, "offset": int}
    known = {**required, **optional}
    if not isinstance(ref, dict) or not set(required) <= set(ref) <= set(known):
        raise ValueError(f"tensor {key!r}: its description must have {', '.join(required)}")
    for name, value in ref.items():
        if type(value) is not known[name]:
            raise ValueError(f"tensor {key!r}: {name} must be {known[name].__name__}, found {value!r}")
    if ref["dtype"] not in _DTYPES:
        raise ValueError(f"tensor {key!r}: unknown dtype {ref['dtype']!r}; known: {', '.join(_DTYPES)}")
    numbers = [*ref["shape"], *ref.get("stride", ()), ref.get("offset", 0)]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"tensor {key!r}: sizes, strides and offset must be integers from 0")
    if ("stride" in ref) != ("offset" in ref) or ("stride" in ref and len(ref["stride"]) != len(ref["shape"])):
        raise ValueError(f"tensor {key!r}: a view has a stride for each size, and an offset")
    if ref["requires_grad"] and not _DTYPES[ref["dtype"]].is_floating_point and not _DTYPES[ref["dtype"]].is_complex:
        raise ValueError(f"tensor {key!r}: {ref['dtype']} cannot require gradients")
    try:
        torch.device(ref["device"])
    except RuntimeError as error:
        raise ValueError(f"tensor {key!r}: unknown device {ref['device']!r}") from error
    return ref


def _compare(path: Path, file: Any, refs: Mapping[str, dict[str, Any]]) -> None:
    """Raise unless the file holds exactly the entries that are named, in the sizes that are said."""
    there, wanted = set(file.keys()), {r["entry"] for r in refs.values()}
    if there != wanted:
        lost, extra = sorted(wanted - there), sorted(there - wanted)
        raise ValueError(f"{str(path)!r}: missing tensors {lost[:5]}, unexpected tensors {extra[:5]}")
    for key, ref in refs.items():
        part = file.get_slice(ref["entry"])
        dtype, shape = _DTYPES[ref["dtype"]], list(part.get_shape())
        code = _CODES.get(dtype)
        if part.get_dtype() != (code or "U8"):
            raise ValueError(f"tensor {key!r}: {ref['dtype']} was said, the file holds {part.get_dtype()}")
        held = math.prod(shape) // (1 if code else dtype.itemsize)
        if "stride" in ref:
            reach = _span(ref["shape"], ref["stride"])
            fits = reach == 0 or ref["offset"] + reach <= held
        else:
            fits = ref["shape"] == shape if code else math.prod(ref["shape"]) == held
        if not fits:
            raise ValueError(f"tensor {key!r}: {ref['shape']} was said, the file holds {shape}")


def _view(key: str, stored: Tensor, ref: Mapping[str, Any], moved: dict[tuple[str, str], Tensor]) -> Tensor:
    """The tensor that a reference describes, as a view of its entry on its device."""
    place = (ref["entry"], ref["device"])
    if place not in moved:
        try:
            moved[place] = stored.to(ref["device"])
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"tensor {key!r} was on {ref['device']}, which is not here: {error}") from error
    tensor = moved[place]
    dtype = _DTYPES[ref["dtype"]]
    if dtype not in _CODES:
        tensor = tensor.view(dtype)
    if "stride" in ref:
        tensor = tensor.as_strided(ref["shape"], ref["stride"], tensor.storage_offset() + ref["offset"])
    else:
        tensor = tensor.view(ref["shape"])
    if ref["parameter"]:
        return nn.Parameter(tensor, requires_grad=ref["requires_grad"])
    return tensor


def _tracked(items: list[Any], progress: Bar | None, what: str = "loading") -> Iterable[Any]:
    return items if progress is None else progress(items, what)
