"""Which kernel computes which operator: one table, by operator and device, tried from the last entry to the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme

#: Logical operators that a kernel can be registered for.
OPERATORS = (
    "linear", "linear_split", "linear_quantized", "linear_quantized_split", "embedding", "conv", "grouped_linear",
)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A weight in a kernel's layout.

    Attributes:
        tensors: what the program will hold; None for one that this weight does not have.
        sizes: what the kernel must know besides (bits, group size, …).
    """

    tensors: tuple[Tensor | None, ...]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Kernel:
    """A kernel for one operator on one kind of device.

    Attributes:
        name: what the report calls it.
        operator: the logical operator that it computes, one of :data:`OPERATORS`.
        device: a torch device type, ``"cpu"``.
        target: the packed operator that the program will call.
        refuses: why it cannot take a weight of this scheme and shape with activations of this dtype; None if it can.
        pack: from the logical weight to its layout; ``parts`` are the rows of stacked siblings, or for a convolution the
            weight's own shape followed by its groups; ``glu`` says that gate and up rows are stacked.
        arguments: the packed operator's arguments, from the packed tensors (as they stand in the program) and the
            logical operator's arguments by name, and ``exact``: whether activations must stay float.
        prepare: called before the kernel is first used in a program: builds or loads what it needs.
        rounds: names of the quantized dtypes to which it can round activations itself, by ``x_scale`` (a float32 scalar) or
            ``per_row`` among the logical arguments.
        unpack: the inverse of ``pack``, given what it returned, the scheme and shape of the weight, parts and glu.
        decode: the float matrix from the packed tensors and sizes, by one operator; a module that was quantized eagerly is
            packed for a kernel other than ``cpu-tiled`` only where this is given.
        note: what the report adds to the name, of a weight that it takes: what the device has to do another way, say.
        way: what it adds of a call on these activations (of which all but the values is known), where calls are not alike.
        refuses_call: why it cannot take a call of the logical operator with these arguments; None if it can.
    """

    name: str
    operator: str
    device: str
    target: torch._ops.OpOverload
    refuses: Callable[[Scheme, Sequence[int], torch.dtype], str | None]
    pack: Callable[[QTensor, Sequence[int] | None, bool], Packed]
    arguments: Callable[[Sequence[Any], Mapping[str, int], Mapping[str, Any]], tuple[Any, ...]]
    prepare: Callable[[], object] | None = None
    unpack: Callable[[Packed, Scheme, Sequence[int], Sequence[int] | None, bool], QTensor] | None = None
    rounds: tuple[str, ...] = ()
    decode: Callable[[Sequence[Any], Mapping[str, int], torch.dtype], Tensor] | None = None
    refuses_call: Callable[[Mapping[str, Any]], str | None] | None = None
    note: Callable[[Scheme, Sequence[int], torch.dtype], str | None] | None = None
    way: Callable[[Scheme, Sequence[int], Tensor], str | None] | None = None

    def described(self, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype, x: Tensor | None = None) -> str:
        """The name as the report shows it for a weight, and for the activations x where they are known."""
        notes = [None if self.note is None else self.note(scheme, shape, dtype)]
        notes.append(None if self.way is None or x is None else self.way(scheme, shape, x))
        said = "; ".join(note for note in notes if note is not None)
        return f"{self.name} ({said})" if said else self.name


_table: list[Kernel] = []


def register(kernel: Kernel) -> Kernel:
    """Add a kernel; it is tried before those registered earlier for the same operator and device.

    Raises:
        ValueError: an unknown operator, or a name that is taken.
    """
    if kernel.operator not in OPERATORS:
        raise ValueError(f"kernel {kernel.name!r} is for {kernel.operator!r}; allowed: {', '.join(OPERATORS)}")
    if any(k.name == kernel.name and k.operator == kernel.operator and k.device == kernel.device for k in _table):
        raise ValueError(f"a kernel {kernel.name!r} for {kernel.operator} on {kernel.device} is registered already")
    _table.append(kernel)
    return kernel


def unregister(kernel: Kernel) -> None:
    """Take a kernel out of the table again."""
    _table.remove(kernel)


def kernels(operator: str | None = None, device: str | None = None) -> list[Kernel]:
    """The table, in the order in which it is tried."""
    return [k for k in reversed(_table) if operator in (None, k.operator) and device in (None, k.device)]


def choose(
    operator: str,
    device: str,
    scheme: Scheme,
    shape: Sequence[int],
    dtype: torch.dtype,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[Kernel | None, str]:
    """The kernel for an operator (called with ``arguments``, where known), or None with the reasons why none takes it."""
    candidates = kernels(operator, device)
    if not candidates:
        return None, f"no kernel for {operator} on {device}"
    reasons = []
    for kernel in candidates:
        reason = kernel.refuses(scheme, shape, dtype)
        if reason is None and arguments is not None and kernel.refuses_call is not None:
            reason = kernel.refuses_call(arguments)
        if reason is None:
            return kernel, ""
        reasons.append(f"{kernel.name}: {reason}")
    return None, "; ".join(reasons)
