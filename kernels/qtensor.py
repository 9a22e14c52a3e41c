"""The logical quantized value: what every pass, algorithm and file format works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from qcompile.kernels import numerics
from qcompile.kernels.cpu.build import ready
from qcompile.kernels.hqq import HalfQuadratic
from qcompile.kernels.qparams import Clip, choose
from qcompile.kernels.scheme import PerChannel, PerGroup, Scheme

#: Weights are encoded in slices of about this many elements, so that no float copy of a whole weight is ever held.
_SLICE = 1 << 18


class Chooser(Protocol):
    """Anything that finds scale and zero point of a weight."""

    def qparams(self, weight: Tensor, scheme: Scheme, /) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point, in the shapes and dtypes that the scheme gives a weight of that shape."""
        ...


#: How scale and zero point are found: by name, by the half-quadratic solver with one's own settings, or by an object.
How: TypeAlias = Clip | HalfQuadratic | Chooser


@dataclass(frozen=True)
class Squares:
    """Sums over a weight: of the squares of what quantizing moves its values by, and of the values' own."""

    error: float
    norm: float


@dataclass(frozen=True, eq=False)
class QTensor:
    """A float tensor held as codes, scale and zero point.

    Invariant: ``data`` is in the *storage* form of :class:`~qcompile.kernels.scheme.Scheme` (bit-packed along the last
    axis below 8 bits), never in the layout of a kernel; layouts are made from it last, by the pass that packs.

    Attributes:
        data: stored codes, shape ``scheme.data_shape(shape)``, dtype ``scheme.data_dtype``.
        scale: shape ``scheme.scale_shape(shape)``, dtype ``scheme.scale_dtype``.
        zero: like the scale (uint8 where the scheme is affine), or None.
        scheme: how the three give the float value back.
        shape: the shape of the float value.

    Raises:
        ValueError: tensors whose shapes or dtypes do not fit the scheme.

    Example:
        >>> w = torch.randn(8, 64)
        >>> q = QTensor.quantize(w, Scheme.parse("qint8/channel=0/symmetric/float32"))
        >>> bool((q.dequantize() - w).norm() < 0.01 * w.norm())
        True
    """

    data: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.shape):
            raise ValueError(f"a shape has no negative sizes, got {list(self.shape)}")
        check_parts(self.data, self.scale, self.zero, self.scheme, self.shape)

    @staticmethod
    def quantize(x: Tensor, scheme: Scheme, clip: How = "max") -> QTensor:
        """Quantize ``x`` by rounding to nearest.

        Args:
            clip: see :func:`~qcompile.kernels.qparams.choose`; or an object whose ``qparams(weight, scheme)`` gives scale
                and zero point. A large weight comes to it in slices of whole rows, where the scheme's runs allow that.

        Raises:
            TypeError: not a floating point tensor.
            ValueError: NaN or infinity in ``x``, a granularity that does not fit its shape, or an object's scale or zero
                point of a wrong shape or dtype.
        """
        return quantized(x, scheme, clip)[0]

    @staticmethod
    def empty(scheme: Scheme, shape: Sequence[int], device: torch.device | str = "cpu") -> QTensor:
        """A value whose codes, scale and zero point are not written yet; of no memory on the meta device."""
        data = torch.empty(scheme.data_shape(shape), dtype=scheme.data_dtype, device=device)
        scale = torch.empty(scheme.scale_shape(shape), dtype=scheme.scale_dtype, device=device)
        zero = None
        if scheme.mode != "symmetric":
            zero = torch.empty_like(scale, dtype=torch.uint8 if scheme.mode == "affine" else scheme.scale_dtype)
        return QTensor(data, scale, zero, scheme, tuple(shape))

    @staticmethod
    def from_qparams(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> QTensor:
        """Quantize ``x`` by rounding to the nearest code for a scale and a zero point that are given.

        Raises:
            TypeError: not a floating point tensor.
            ValueError: scale or zero point of a shape or dtype that the scheme does not give a tensor of this shape, or a
                scale or zero point outside its range.
        """
        if not x.is_floating_point():
            raise TypeError(f"only floating point tensors can be quantized, got {x.dtype}")
        x, scale, zero = x.detach(), scale.detach(), None if zero is None else zero.detach()
        check_qparams(scale, zero, scheme, x.shape)
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise ValueError("a scale must be finite and above zero")
        if zero is not None and scheme.mode == "affine" and bool((zero > scheme.qtype.levels - 1).any()):
            raise ValueError(f"a zero point of {scheme} is a code, at most {scheme.qtype.levels - 1}; got {int(zero.max())}")
        data = numerics.store(numerics.encode(x, scale, zero, scheme), scheme)
        return QTensor(data, scale, zero, scheme, tuple(x.shape))

    def codes(self) -> Tensor:
        """Unpacked codes: int8 (symmetric), uint8 (affine, shift) or a float8 dtype; the shape of the value."""
        return numerics.fetch(self.data, self.scheme, self.shape)

    def unsigned_codes(self) -> Tensor:
        """Unpacked codes as uint8; symmetric ones in offset binary (code + ``qtype.offset``)."""
        codes = self.codes()
        if self.scheme.qtype.is_float:
            return codes.view(torch.uint8)
        if self.scheme.mode != "symmetric":
            return codes
        return codes.view(torch.uint8) + self.scheme.qtype.offset  # which wraps, as int8 does

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float value."""
        return numerics.decode(self.codes(), self.scale, self.zero, self.scheme, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tensors take."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale, self.zero) if t is not None)

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return self.data.device

    def __repr__(self) -> str:
        return f"QTensor(shape={list(self.shape)}, scheme='{self.scheme}', {self.nbytes} bytes, device={self.device})"


def check_parts(
    data: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, shape: Sequence[int]
) -> None:
    """Raise a ValueError unless codes, scale and zero point have the shapes and dtypes that the scheme asks for."""
    _check_tensor("data", data, scheme.data_shape(shape), scheme.data_dtype, scheme, shape)
    check_qparams(scale, zero, scheme, shape)


def check_qparams(scale: Tensor, zero: Tensor | None, scheme: Scheme, shape: Sequence[int]) -> None:
    """Raise a ValueError unless scale and zero point have the shapes and dtypes that the scheme asks for."""
    _check_tensor("scale", scale, scheme.scale_shape(shape), scheme.scale_dtype, scheme, shape)
    if (zero is None) != (scheme.mode == "symmetric"):
        raise ValueError(f"scheme {scheme} {'takes no' if zero is not None else 'needs a'} zero point")
    if zero is not None:
        zero_dtype = torch.uint8 if scheme.mode == "affine" else scheme.scale_dtype
        _check_tensor("zero", zero, scheme.scale_shape(shape), zero_dtype, scheme, shape)


def _check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, scheme: Scheme, value_shape: Sequence[int]
) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"a value of shape {list(value_shape)} in scheme {scheme} has {name} of shape {list(shape)} and {dtype}; "
            f"got {list(tensor.shape)} and {tensor.dtype}"
        )


def quantized(x: Tensor, scheme: Scheme, clip: How = "max") -> tuple[QTensor, Squares | None]:
    """:meth:`QTensor.quantize`, and what a kernel found out about the error on the way; None where none did it."""
    x = x.detach()
    rows = max(1, _SLICE * x.shape[0] // max(1, x.numel())) if x.dim() > 1 else 0
    sliced = scheme.by_row and 0 < rows < x.shape[0]
    # A copy of what is not contiguous is made slice by slice.
    made = _by_kernel(x, scheme, clip) if x.is_contiguous() or not sliced else None
    if made is not None:
        return made
    if sliced:
        return _by_rows(x, scheme, clip, rows)
    parts = choose(x, scheme, clip) if isinstance(clip, str | HalfQuadratic) else clip.qparams(x, scheme)
    return QTensor.from_qparams(x, *parts, scheme), None


def _by_rows(x: Tensor, scheme: Scheme, clip: How, rows: int) -> tuple[QTensor, Squares | None]:
    """Quantize slice by slice into tensors that are there from the start.

    Parts that are kept, allocated between temporaries that are not, would leave holes in the heap that nothing fits.
    """
    whole, found = QTensor.empty(scheme, x.shape, x.device), []
    for start in range(0, x.shape[0], rows):
        part, squares = quantized(x[start : start + rows], scheme, clip)
        write_rows(whole, start, part)
        found.append(squares)
    known = [s for s in found if s is not None]
    return whole, Squares(sum(s.error for s in known), sum(s.norm for s in known)) if len(known) == len(found) else None


def _by_kernel(x: Tensor, scheme: Scheme, clip: How) -> tuple[QTensor, Squares] | None:
    """The same, bit for bit, by ``qcompile::quantize_weight``; None where it does not apply, or plain torch is to refuse.
    """
    by_channel = scheme.granularity == PerChannel(0) and (x.dim() == 2 or (x.dim() > 2 and not scheme.packed_bits))
    by_group = isinstance(scheme.granularity, PerGroup) and x.dim() > 0
    if not (by_channel or by_group) or scheme.qtype.is_float or not isinstance(clip, str) or clip != "max":
        return None
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.numel() == 0 or not ready():
        return None
    x = x.contiguous()
    matrix = x.view(x.shape[0], -1) if by_channel else x.view(-1, x.shape[-1])
    size = min(scheme.granularity.size, matrix.shape[1]) if isinstance(scheme.granularity, PerGroup) else 0
    data, scale, zero, squares = torch.ops.qcompile.quantize_weight(
        matrix, scheme.qtype.bits, size, scheme.mode, scheme.scale_dtype
    )
    error, norm = squares.sum(dim=0).tolist()
    if not math.isfinite(error + norm):
        return None
    shape = scheme.scale_shape(x.shape)
    parts = scale.view(shape), None if scheme.mode == "symmetric" else zero.view(shape)
    return QTensor(data.view(scheme.data_shape(x.shape)), *parts, scheme, tuple(x.shape)), Squares(error, norm)


def write_rows(whole: QTensor, start: int, part: QTensor) -> None:
    """Put ``part`` in the place of the rows of ``whole`` from ``start`` on; of schemes whose scales follow the rows."""
    at = slice(start, start + part.shape[0])
    whole.data[at], whole.scale[at] = part.data, part.scale
    if whole.zero is not None and part.zero is not None:
        whole.zero[at] = part.zero
