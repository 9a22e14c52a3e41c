"""A scheme: everything that says how codes, scale and zero point give back a float value."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from qcompile.kernels.dtypes import QType, qtype

Mode: TypeAlias = Literal["symmetric", "affine", "shift"]


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor; the scale has shape ``()``."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of ``axis``; the scale has shape ``[shape[axis]]``."""

    axis: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise ValueError(f"the axis of channels is a whole number, got {self.axis!r}")

    def __str__(self) -> str:
        return f"channel={self.axis}"


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of ``size`` elements of the last axis (the last run may be short).

    The scale has shape ``[*shape[:-1], ceil(shape[-1] / size)]``.
    """

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"a group holds at least one element, got group size {self.size!r}")

    def __str__(self) -> str:
        return f"group={self.size}"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each ``rows`` x ``cols`` block of the last two axes (blocks at the edge may be short).

    The scale has shape ``[*shape[:-2], ceil(shape[-2] / rows), ceil(shape[-1] / cols)]``.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for side in (self.rows, self.cols):
            if isinstance(side, bool) or not isinstance(side, int) or side < 1:
                raise ValueError(f"a block is at least 1 x 1, got {self.rows!r} x {self.cols!r}")

    def __str__(self) -> str:
        return f"block={self.rows}x{self.cols}"


Granularity: TypeAlias = PerTensor | PerChannel | PerGroup | PerBlock

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODES: tuple[Mode, ...] = ("symmetric", "affine", "shift")


@dataclass(frozen=True)
class Scheme:
    """How a float tensor is held in codes. Frozen and hashable; ``str(scheme)`` and :meth:`parse` are inverse.

    With ``u`` the code and ``s`` its scale, the float value is

    ============  =====================  ==========================================
    mode          value                  zero point
    ============  =====================  ==========================================
    symmetric     ``u * s``              none; integer codes are signed
    affine        ``(u - zero) * s``     uint8, in code units; codes are unsigned
    shift         ``u * s + zero``       like the scale, in value units; unsigned
    ============  =====================  ==========================================

    Raises:
        TypeError: a qtype or granularity of a wrong type (names go through :func:`~qcompile.kernels.dtypes.qtype`).
        ValueError: an unknown mode or scale dtype, or a float8 dtype that is not symmetric.

    Example:
        >>> from qcompile.kernels import Scheme, PerGroup, qint4
        >>> str(Scheme(qint4, PerGroup(32), "affine", torch.float16))
        'qint4/group=32/affine/float16'
    """

    qtype: QType
    granularity: Granularity = PerChannel(0)
    mode: Mode = "symmetric"
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.qtype, QType):
            raise TypeError(f"qtype must be a quantized dtype such as qcompile.qint4, got {self.qtype!r}")
        if not isinstance(self.granularity, PerTensor | PerChannel | PerGroup | PerBlock):
            raise TypeError(
                f"granularity must be PerTensor(), PerChannel(axis), PerGroup(size) or PerBlock(rows, cols), "
                f"got {self.granularity!r}"
            )
        if self.mode not in MODES:
            raise ValueError(f"unknown quantization mode {self.mode!r}; allowed: {', '.join(MODES)}")
        if self.qtype.is_float and self.mode != "symmetric":
            raise ValueError(f"{self.qtype} codes are signed floats: mode must be 'symmetric', got {self.mode!r}")
        if self.scale_dtype not in SCALE_DTYPES.values():
            raise ValueError(f"scale dtype {self.scale_dtype} is not one of {', '.join(SCALE_DTYPES)}")

    def __str__(self) -> str:
        return f"{self.qtype.name}/{self.granularity}/{self.mode}/{str(self.scale_dtype).removeprefix('torch.')}"

    @property
    def by_row(self) -> bool:
        """Whether each row of a matrix has scales of its own, so that it can be quantized and decoded by itself."""
        return isinstance(self.granularity, PerGroup) or self.granularity == PerChannel(0)

    @staticmethod
    def parse(text: str) -> Scheme:
        """The scheme that ``str()`` printed as ``text``.

        Raises:
            ValueError: the text is not a scheme; the message shows the form.
        """
        return _parse(text)

    @property
    def code_dtype(self) -> torch.dtype:
        """The torch dtype of unpacked codes."""
        if self.qtype.is_float or self.mode == "symmetric":
            return self.qtype.dtype
        return torch.uint8

    @property
    def packed_bits(self) -> bool:
        """Whether several codes share a byte in storage."""
        return self.qtype.bits < 8

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scale (and of the zero point) of a tensor of ``shape``.

        Raises:
            ValueError: the granularity does not fit the shape.
        """
        shape = tuple(shape)
        match self.granularity:
            case PerTensor():
                return ()
            case PerChannel(axis=axis):
                if not -len(shape) <= axis < len(shape):
                    raise ValueError(f"per channel of axis {axis} does not fit a tensor of shape {list(shape)}")
                return (shape[axis],)
            case PerGroup(size=size):
                if not shape:
                    raise ValueError("groups need a tensor of at least one axis, got a scalar")
                return (*shape[:-1], -(-shape[-1] // size))
            case PerBlock(rows=rows, cols=cols):
                if len(shape) < 2:
                    raise ValueError(f"blocks need a tensor of at least two axes, got shape {list(shape)}")
                return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // cols))
        raise TypeError(f"unknown granularity {self.granularity!r}")

    def data_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the stored codes of a tensor of ``shape``: bit-packed along the last axis below 8 bits."""
        shape = tuple(shape)
        if not self.packed_bits:
            return shape
        if not shape:
            raise ValueError(f"{self.qtype} packs codes along the last axis; a scalar has none")
        return (*shape[:-1], -(-shape[-1] * self.qtype.bits // 8))

    @property
    def data_dtype(self) -> torch.dtype:
        """The torch dtype of the stored codes."""
        return torch.uint8 if self.packed_bits else self.code_dtype

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of codes, scale and zero point of a tensor of ``shape``."""
        groups = _product(self.scale_shape(shape))
        width = self.scale_dtype.itemsize
        per_group = width + {"symmetric": 0, "affine": 1, "shift": width}[self.mode]
        return _product(self.data_shape(shape)) + groups * per_group


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Scheme:
    form = "QTYPE/GRANULARITY/MODE/SCALE_DTYPE, as in 'qint4/group=32/affine/float16'"
    parts = text.split("/") if isinstance(text, str) else []
    if len(parts) != 4:
        raise ValueError(f"not a quantization scheme: {text!r}; the form is {form}")
    name, granularity_text, mode, scale_name = parts
    kind, _, value = granularity_text.partition("=")
    granularity: Granularity
    try:
        if kind == "tensor" and not value:
            granularity = PerTensor()
        elif kind == "channel":
            granularity = PerChannel(int(value))
        elif kind == "group":
            granularity = PerGroup(int(value))
        elif kind == "block":
            rows, cols = value.split("x")
            granularity = PerBlock(int(rows), int(cols))
        else:
            raise ValueError(f"unknown granularity {granularity_text!r}")
    except ValueError as error:
        raise ValueError(f"not a quantization scheme: {text!r} ({error}); the form is {form}") from error
    if scale_name not in SCALE_DTYPES:
        raise ValueError(f"not a quantization scheme: {text!r}; scale dtype must be one of {', '.join(SCALE_DTYPES)}")
    if mode not in MODES:
        raise ValueError(f"not a quantization scheme: {text!r}; mode must be one of {', '.join(MODES)}")
    return Scheme(qtype(name), granularity, mode, SCALE_DTYPES[scale_name])
