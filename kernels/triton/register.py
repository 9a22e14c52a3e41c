"""The Triton kernels in the dispatch table and behind the operators; Triton is imported when one is launched."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qcompile.kernels.cuda import linear as cuda_linear
from qcompile.kernels.dispatch import Kernel, Packed, register
from qcompile.kernels.layouts.planes import Planes, pack, unpack_codes
from qcompile.kernels.numerics import store
from qcompile.kernels.ops import grouped_planes, norm_quantize, rows_planes
from qcompile.kernels.ops._library import lib
from qcompile.kernels.ops._planes import KINDS
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import PerBlock, PerChannel, PerGroup, PerTensor, Scheme
from qcompile.kernels.triton.target import present, target_of

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CUDA = torch.device("cuda")


def container_bits(bits: int) -> int:
    """How many bits a code of ``bits`` bits takes in the layout."""
    return bits if bits <= 4 else 8


def _refuses(scheme: Scheme, shape: Sequence[int], dtype: torch.dtype, axes: int = 2) -> str | None:
    if len(shape) != axes or min(shape) < 1:
        return f"takes {'a matrix' if axes == 2 else 'a stack of matrices'}, not shape {list(shape)}"
    granularity = scheme.granularity
    if axes == 3 and not isinstance(granularity, PerGroup | PerBlock | PerTensor):
        return f"scales of a stack must follow its rows, not {granularity}"
    if isinstance(granularity, PerChannel) and granularity.axis not in (0, -2):
        return f"scales must follow rows, not axis {granularity.axis}"
    if dtype not in _FLOATS:
        return f"takes float32, float16 or bfloat16 activations, not {str(dtype).removeprefix('torch.')}"
    return unusable(_CUDA)


def unusable(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None if they can, or where there is no GPU to ask."""
    if present() and not _installed():
        return "Triton is not installed"
    return target_of(device).refusal()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def float8_note(scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """What the device does another way than by its own instructions."""
    kind = _kind(scheme)
    if kind == "int" or kind in target_of(_CUDA).float8:
        return None
    return f"{scheme.qtype} decoded by integer arithmetic, {target_of(_CUDA).arch} has no such type"


def _way(scheme: Scheme, shape: Sequence[int], x: Tensor) -> str | None:
    """Where a compiled program computes a linear on x."""
    from qcompile.kernels.triton.decompose import plan_of

    if x.device.type != "cuda":
        return None
    bits, group_size = container_bits(scheme.qtype.bits), _group_size(scheme, shape[-1])
    planned = plan_of(x, shape[0], bits, _kind(scheme), group_size)
    if planned is None:
        return "called"
    config, split = planned
    if config.way == "dense":
        return "decoded, then the vendor's matmul"
    return f"{config.way} template of Inductor's" + (f", K in {split} parts" if split > 1 else "")


def _kind(scheme: Scheme) -> str:
    return str(scheme.qtype.dtype).removeprefix("torch.float8_") if scheme.qtype.is_float else "int"


def _kind_of(weight: QTensor) -> str:
    """The layout's name for what a byte is; NaN and infinity take instructions, so that a weight without them says so."""
    data, kind = weight.data, _kind(weight.scheme)
    if kind == "int" or data.is_meta or isinstance(data, FakeTensor):
        return kind
    return f"finite_{kind}" if all(part.float().isfinite().all() for part in data.split(1024)) else kind


def _rows(part: Tensor, scheme: Scheme, shape: Sequence[int]) -> Tensor:
    """A scale or zero point as ``[*lead, rows, groups]``."""
    match scheme.granularity:
        case PerTensor():
            return part.reshape([1] * len(shape)).expand(*shape[:-1], 1).contiguous()
        case PerChannel():
            return part.reshape(shape[0], 1)
        case PerBlock(rows=rows):
            return part.repeat_interleave(rows, dim=-2)[..., : shape[-2], :].contiguous()
        case PerGroup():
            return part
    raise TypeError(f"unknown granularity {scheme.granularity!r}")


def _stored(part: Tensor, scheme: Scheme, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`_rows`."""
    if isinstance(scheme.granularity, PerBlock):
        part = part[..., :: scheme.granularity.rows, :]
    if isinstance(scheme.granularity, PerTensor):
        part = part.reshape(-1)[:1]
    return part.reshape(scheme.scale_shape(tuple(shape))).contiguous()


def _group_size(scheme: Scheme, columns: int) -> int:
    size = {PerGroup: "size", PerBlock: "cols"}.get(type(scheme.granularity))
    value = getattr(scheme.granularity, size) if size else columns
    return 0 if value >= columns else value


def _offset(scheme: Scheme) -> int:
    """What is added to stored symmetric codes, so that the container's own middle is zero."""
    if scheme.qtype.is_float or scheme.mode != "symmetric":
        return 0
    return int((1 << (container_bits(scheme.qtype.bits) - 1)) - scheme.qtype.offset)


def pack_planes(weight: QTensor, parts: Sequence[int] | None, glu: bool) -> Packed:
    """A logical weight ``[N, K]`` or ``[E, N, K]`` in the planes layout; siblings, gate and up just follow each other."""
    scheme, shape = weight.scheme, weight.shape
    bits, group_size = container_bits(scheme.qtype.bits), _group_size(scheme, shape[-1])
    codes = weight.unsigned_codes() + _offset(scheme)
    scale, zero = (None if part is None else _rows(part, scheme, shape) for part in (weight.scale, weight.zero))
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (codes, scale, zero)]
    packed: Planes = pack(flat[0], flat[1], flat[2], bits, group_size)  # type: ignore[arg-type]
    lead = shape[:-1]
    tensors = [None if t is None else t.reshape(*lead, -1) for t in (packed.codes, packed.scale, packed.zero)]
    sizes = {"bits": bits, "kind": KINDS.index(_kind_of(weight)), "group_size": group_size}
    sizes |= {"rows": shape[-2], "cols": shape[-1]}
    return Packed(tuple(tensors), sizes)


def unpack_planes(
    packed: Packed, scheme: Scheme, shape: Sequence[int], parts: Sequence[int] | None, glu: bool
) -> QTensor:
    """The exact inverse of :func:`pack_planes`."""
    codes, scale, zero = packed.tensors
    if codes is None or scale is None:
        raise ValueError("a packed weight has codes and scales")
    plain = unpack_codes(codes.reshape(-1, codes.shape[-1]), packed.sizes["bits"], shape[-1]).reshape(*shape)
    if scheme.qtype.is_float:
        plain = plain.view(scheme.qtype.dtype)
    elif scheme.mode == "symmetric":
        plain = (plain.to(torch.int16) - _offset(scheme) - scheme.qtype.offset).to(torch.int8)
    stored = [None if part is None else _stored(part, scheme, shape) for part in (scale, zero)]
    return QTensor(store(plain, scheme), stored[0], stored[1], scheme, tuple(shape))  # type: ignore[arg-type]


def _options(sizes: Mapping[str, int]) -> tuple[int, str, int]:
    return sizes["bits"], KINDS[sizes["kind"]], sizes["group_size"]


def decode_planes(tensors: Sequence[Any], sizes: Mapping[str, int], dtype: torch.dtype) -> Tensor:
    """The float matrix ``[N, K]`` of packed tensors."""
    return torch.ops.qcompile.dequantize_planes(*tensors, *_options(sizes), sizes["cols"], dtype)


def _linear(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    features = sizes["rows"] // 2 if args["glu"] else sizes["rows"]
    epilogue = (args["activation"], args["mul"], args["add"], args["glu"])
    return (args["x"], *tensors, args["bias"], *_options(sizes), features, *epilogue)


def _split(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    return (args["x"], *tensors, args["bias"], *_options(sizes), args["sizes"])


def _embedding(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    return (args["indices"], *tensors, *_options(sizes), sizes["rows"], sizes["cols"], args["dtype"])


def _grouped(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    return (args["x"], *tensors, args["offsets"], *_options(sizes))


def launcher(module: str, name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The operator on a GPU: Triton's kernel, imported now, or what computes it where Triton cannot run."""

    @functools.cache
    def kernel() -> Callable[..., Any]:
        if unusable(_CUDA) is not None:
            return reference
        return getattr(importlib.import_module(f"qcompile.kernels.triton.{module}"), name)

    def launch(*args: Any, **kwargs: Any) -> Any:
        return kernel()(*args, **kwargs)

    return launch


qc = torch.ops.qcompile
for _operator, _target, _arguments, _axes, _how in (
    ("linear", qc.linear_planes.default, _linear, 2, _way),
    ("linear_split", qc.linear_planes_split.default, _split, 2, _way),
    ("embedding", qc.embedding_planes.default, _embedding, 2, None),
    ("grouped_linear", qc.grouped_linear_planes.default, _grouped, 3, None),
):
    _takes = functools.partial(_refuses, axes=_axes)
    register(
        Kernel(
            "triton-planes", _operator, "cuda", _target, _takes, pack_planes, _arguments, unpack=unpack_planes,
            decode=decode_planes, note=float8_note, way=_how,
        )
    )  # fmt: skip
for _module, _name, _reference in (
    ("linear", "linear_planes", cuda_linear.linear_planes),
    ("linear", "linear_planes_split", cuda_linear.linear_planes_split),
    ("rows", "dequantize_planes", rows_planes.dequantize_planes),
    ("rows", "embedding_planes", rows_planes.embedding_planes),
    ("grouped", "grouped_linear_planes", grouped_planes.grouped_linear_planes),
    ("norm_quantize", "norm_quantize", norm_quantize.norm_quantize),
):
    for _full in (_name, f"{_name}_forward") if "linear_planes" in _name and "grouped" not in _name else (_name,):
        lib.impl(_full, launcher(_module, _name, _reference), "CUDA")
