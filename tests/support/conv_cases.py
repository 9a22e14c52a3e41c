"""Convolutions to test the kernels with: windows, schemes, and a packed weight beside what it stands for in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from oracle import data
from torch import Tensor

from qcompile.kernels import PerBlock, PerChannel, PerGroup, PerTensor, QTensor, Scheme, qint2, qint3, qint4, qint5, qint8
from qcompile.kernels.dispatch import Kernel, kernels
from qcompile.kernels.ops.conv_depthwise import conv_depthwise
from qcompile.kernels.ops.conv_tiled import conv_tiled

HALF = torch.float16
SCHEMES = [
    Scheme(qint8, PerChannel(0)),
    Scheme(qint8, PerGroup(32), "symmetric", HALF),
    Scheme(qint4, PerGroup(288), "affine", HALF),
    Scheme(qint4, PerGroup(48), "shift"),
    Scheme(qint3, PerTensor()),
    Scheme(qint2, PerBlock(8, 64), "affine"),
    Scheme(qint5, PerChannel(0), "affine"),
]


@dataclass(frozen=True)
class Case:
    """A convolution: sizes of x without the batch, then the weight's window; padding before and after."""

    channels: int
    size: tuple[int, ...]
    out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def shape(self) -> list[int]:
        return [self.out, self.channels // self.groups, *self.kernel]

    @property
    def window(self) -> tuple[list[int], list[int], list[int]]:
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return (
            list(self.stride or ones),
            [*(self.before or zeros), *(self.after or self.before or zeros)],
            list(self.dilation or ones),
        )


DENSE = [
    Case(1, (1, 1), 1, (1, 1)),
    Case(3, (17, 19), 32, (3, 3), (2, 2), (1, 0), (1, 2)),
    Case(64, (9, 7), 48, (3, 3), before=(1, 1)),
    Case(97, (7, 1), 33, (5, 1), before=(2, 0), dilation=(2, 1)),
    Case(160, (9, 7), 7, (1, 1), (2, 1), (0, 1), (0, 0)),
    Case(193, (7, 7), 20, (1, 1)),
    Case(96, (6, 6), 64, (3, 3), before=(1, 1), groups=2),
    Case(48, (9, 9), 48, (3, 2), (2, 1), (1, 1), dilation=(1, 2), groups=3),
    Case(80, (23,), 40, (3,), (2,), (1,)),
]
DEPTHWISE = [
    Case(1, (3, 3), 1, (3, 3), groups=1),
    Case(7, (9, 9), 7, (3, 3), before=(1, 1), groups=7),
    Case(160, (14, 15), 160, (5, 5), (2, 2), (1, 2), (2, 2), groups=160),
    Case(193, (7, 7), 193, (3, 3), (2, 1), after=(1, 1), before=(0, 0), dilation=(2, 1), groups=193),
    Case(32, (2, 3), 32, (7, 7), before=(6, 3), groups=32),
    Case(48, (31,), 48, (9,), before=(4,), groups=48),
]


@dataclass(frozen=True)
class Packed:
    """A quantized and packed weight, with the float64 weight that it stands for."""

    case: Case
    kernel: Kernel
    value: QTensor
    weight: Tensor
    call: Callable[..., Tensor]
    arguments: Callable[..., tuple[Any, ...]]

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        stride, padding, dilation = self.case.window
        axes = len(stride)
        edges = [n for i in reversed(range(axes)) for n in (padding[i], padding[axes + i])]
        held = None if bias is None else bias.double()
        padded = torch.constant_pad_nd(x.double(), edges)
        return torch.convolution(
            padded, self.weight, held, stride, [0] * axes, dilation, False, [0] * axes, self.case.groups
        )  # fmt: skip

    def error(self, y: Tensor, expected: Tensor, x: Tensor) -> float:
        """The norm of the error over the norm that the result has when nothing cancels."""
        squared = Packed(self.case, self.kernel, self.value, self.weight**2, self.call, self.arguments)
        return float((y.double() - expected).norm() / squared.expected(x.double() ** 2).sum().sqrt())


def packed(case: Case, scheme: Scheme, *, depthwise: bool = False, reference: bool = False) -> Packed:
    name = "cpu-depthwise" if depthwise else "cpu-conv"
    (kernel,) = [k for k in kernels("conv", "cpu") if k.name == name]
    value = QTensor.quantize(data(*case.shape).flatten(1), scheme)
    made = kernel.pack(value, [*case.shape, case.groups], False)
    op: Any = conv_depthwise if depthwise else conv_tiled
    target = op if reference else kernel.target

    def arguments(x: Tensor, bias: Tensor | None = None, **options: Any) -> tuple[Any, ...]:
        stride, padding, dilation = case.window
        logical = {
            "x": x, "bias": bias, "weight_shape": case.shape, "stride": stride, "padding": [0] * len(stride),
            "dilation": dilation, "groups": case.groups, "activation": "none", "add": None, "after": "none",
            "pad": [n for i in reversed(range(len(stride))) for n in (padding[i], padding[len(stride) + i])],
            "exact": False, **options,
        }  # fmt: skip
        return *kernel.arguments(made.tensors, made.sizes, logical), options.get("out_scale"), options.get("dtype")

    def call(x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return target(*arguments(x, bias, **options))

    return Packed(case, kernel, value, value.dequantize().double().view(case.shape), call, arguments)
