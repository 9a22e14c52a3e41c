"""A frozen convolution on the CPU's kernels: packed for them when it is first called, where that pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.kernels.dispatch import choose
from qcompile.kernels.layouts.conv import choose_order
from qcompile.kernels.layouts.logical import group_size

if TYPE_CHECKING:
    from qcompile.eager.weight import QWeight

__all__ = ["Convolution", "convolution_of"]

#: Up to so many elements a weight that is decoded stays so: decoding it at each call would cost a tenth of the convolution.
_KEPT = 65536


class Convolution:
    """One weight under one window (stride, padding, dilation, groups).

    The packed codes are a second copy of those that the weight holds, which state dicts and tracers read. It is the
    weight's (:class:`~qcompile.eager.weight.QWeight`) to forget it when its own codes change.

    Args:
        held: the weight.
        module: an ``nn.Conv1d`` or ``nn.Conv2d`` that has it.
    """

    def __init__(self, held: QWeight, module: Any) -> None:
        self._held, self._shape = held, held.shape
        self._window = (module.stride, module.dilation, module.groups)
        self._around = list(module._reversed_padding_repeated_twice)
        self._mode = module.padding_mode
        self._arguments = {
            "x": None, "bias": None, "weight_shape": list(held.shape), "stride": list(module.stride),
            "padding": [0] * len(module.stride), "dilation": list(module.dilation), "groups": module.groups,
            "pad": self._around if self._mode == "zeros" else [], "transposed": False,
            "activation": "none", "add": None, "after": "none", "exact": False,
        }  # fmt: skip
        self._kernel, _ = choose("conv", "cpu", held.scheme, held.shape, held.dtype, self._arguments)
        self._packed: tuple[Any, ...] | None = None
        self._decoded: Tensor | None = None
        self._seen: tuple[Any, bool] = (None, False)
        if self._kernel is not None:
            name = self._kernel.target._schema.name.removeprefix("qcompile::")
            self._forward = getattr(torch.ops.qcompile, f"{name}_forward").default._op

    @property
    def kernel_name(self) -> str | None:
        """The kernel for it, or None."""
        return None if self._kernel is None else self._kernel.name

    @property
    def is_packed(self) -> bool:
        """Whether a call has paid."""
        return self._packed is not None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The convolution of a batch, laid out as torch's own; None where decoding the weight is better."""
        kernel = self._kernel
        if kernel is None or type(x) is not Tensor or x.device.type != "cpu" or x.dtype != self._held.dtype:
            return None
        if x.dim() != len(self._shape):
            return None
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        if self._seen[0] != (x.shape, last):
            self._seen = ((x.shape, last), self._pays(x.shape, last))
        if not self._seen[1]:
            return None
        if self._packed is None:
            self._packed = self._pack()
        codes, scale, zero, *rest = self._packed
        if self._mode != "zeros":
            x = F.pad(x, self._around, mode=self._mode)
        graded = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        y: Tensor = (kernel.target if graded else self._forward)(x, codes, scale, zero, bias, *rest)
        return y if last else y.contiguous()

    def weight(self) -> Tensor:
        """The float weight, for torch's own convolution."""
        if self._decoded is not None:
            return self._decoded
        if math.prod(self._shape) > _KEPT:
            return self._held.dequantize()
        with torch.inference_mode(False):  # it is kept, for uses that autograd records
            weight = self._held.dequantize()
        if type(weight) is Tensor:
            self._decoded = weight
        return weight

    def _pack(self) -> tuple[Any, ...]:
        kernel, held = self._kernel, self._held
        if kernel is None:
            raise RuntimeError("no kernel takes this convolution")
        if kernel.prepare is not None:
            kernel.prepare()
        with torch.inference_mode(False):  # it is kept, for uses that autograd records
            packed = kernel.pack(held.logical(), [*held.shape, self._window[2]], False)
        _, codes, scale, zero, _, *rest = kernel.arguments(packed.tensors, packed.sizes, self._arguments)
        return (codes, scale, zero, *rest)

    def _pays(self, shape: Sequence[int], last: bool) -> bool:
        """Whether the kernel is faster than decoding the weight for torch's convolution, held to AVX2 with two threads.

        The kernel wins on each multiply-add, a tenth of a nanosecond where channels have kernels of their own, a hundredth
        of that elsewhere, and decodes nothing. What it loses is the way from and to torch's layout, a third of a nanosecond
        a value, and patches to gather where it cannot round each pixel once for all that read it.
        """
        stride, dilation, groups = self._window
        channels, kernel = self._shape[1], self._shape[2:]
        around = [sum(self._around[2 * i : 2 * i + 2]) for i in reversed(range(len(kernel)))]
        sizes = [
            (size + pad - step * (taps - 1) - 1) // by + 1
            for size, pad, taps, step, by in zip(shape[2:], around, kernel, dilation, stride, strict=True)
        ]
        if shape[1] != channels * groups or not math.prod(shape) or min(sizes) < 1:
            return False  # torch's own operator says what is wrong
        positions, columns = shape[0] * math.prod(sizes), channels * math.prod(kernel)
        weights = self._shape[0] * columns
        order = choose_order(self._shape, group_size(self._held.scheme, columns))
        gathered = positions * columns * groups if order != "channels" and math.prod(kernel) > 1 else 0
        depthwise = channels == 1 and groups == self._shape[0]
        moved = positions * self._shape[0] + (0 if last else math.prod(shape))
        if depthwise:
            return moved < positions * weights / 8
        return 1.25 * gathered + moved < positions * weights / 100 + weights


def convolution_of(held: QWeight, module: Any) -> Convolution:
    """The weight under the module's window, made once."""
    window = (module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    made = held.convolutions.get(window)
    if made is None:
        made = held.convolutions[window] = Convolution(held, module)
    return made
