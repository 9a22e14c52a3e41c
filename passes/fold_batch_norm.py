"""A batch norm in inference is a factor and a summand for each channel: they go into the convolution before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.kernels.ops.conv import matrix_shape
from qcompile.kernels.scheme import PerBlock, PerChannel, PerTensor, Scheme
from qcompile.passes.base import Pass
from qcompile.passes.program import Constant, Program, inherit, normalized

aten = torch.ops.aten
qc = torch.ops.qcompile

_FLOAT16_NORMAL = 2.0**-14  # below it float16 loses digits


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold a batch norm with fixed statistics into the quantized convolution that it alone reads::

        conv(x, data, scale, zero, bias) ─► batch_norm(γ, β, mean, var)

        ->   conv(x, data, scale · a, zero, bias · a + b),   a = γ / √(var + eps),   b = β - mean · a

    Codes stay as they are: a factor of a channel is a factor of its scales. So this is the same function up to rounding,
    wherever the codes came from.

    Before: fused. After: as before; only for inference, and where all statistics are constants.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many were folded."""
        if not program.inference:
            return 0
        count = 0
        for node in program.calls(aten.batch_norm.default):
            count += _fold(program, node)
        program.clean()
        return count


def _fold(program: Program, node: fx.Node) -> bool:
    norm = normalized(node)
    conv = norm["input"]
    if norm["training"] or not isinstance(conv, fx.Node) or conv.target is not qc.conv.default or len(conv.users) != 1:
        return False
    args = normalized(conv)
    if args["activation"] != "none" or args["add"] is not None:
        return False
    scheme = Scheme.parse(args["scheme"])
    if isinstance(scheme.granularity, PerBlock):
        return False
    names = ("weight", "bias", "running_mean", "running_var")
    statistics = {k: _fixed(program, norm[k]) for k in names if norm[k] is not None}
    parts = {k: _fixed(program, args[k]) for k in ("scale", "zero", "bias") if args[k] is not None}
    if not {"running_mean", "running_var"} <= statistics.keys() or None in (*statistics.values(), *parts.values()):
        return False
    rows, _ = matrix_shape(args["weight_shape"], args["transposed"], args["groups"])
    held = {k: c for k, c in (*statistics.items(), *(("conv_" + k, c) for k, c in parts.items())) if c is not None}
    fold = _Folded(program, held, norm["eps"], scheme, rows)
    scheme = replace(
        scheme,
        granularity=PerChannel(0) if isinstance(scheme.granularity, PerTensor) else scheme.granularity,
        scale_dtype=fold.scale_dtype(),
    )
    scale = fold.add("scale", lambda t: fold.by_row(t).to(scheme.scale_dtype))
    zero = args["zero"]
    if scheme.mode == "shift":
        zero = fold.add("zero", lambda t: fold.by_row(t).to(scheme.scale_dtype))
    elif zero is not None and isinstance(Scheme.parse(args["scheme"]).granularity, PerTensor):
        zero = fold.add("zero", lambda t: t.reshape(1).expand(rows).contiguous())
    bias = fold.add_bias(args["x"].meta["val"].dtype)
    with program.graph.inserting_before(node):
        changed = {**args, "scale": scale, "zero": zero, "bias": bias, "scheme": str(scheme)}
        new = program.call(qc.conv.default, *changed.values(), like=node)
    inherit(new, conv)
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
    program.graph.erase_node(conv)
    return True


def _fixed(program: Program, node: object) -> Constant | None:
    """The constant behind an argument, if nothing changes its values while the program is in use."""
    constant = program.constant(node)
    return None if constant is None or constant.mutated or constant.receives_grad else constant


@dataclass(frozen=True)
class _Folded:
    """The constants that take the place of a convolution's own.

    Attributes:
        held: the batch norm's constants by their names, the convolution's with ``conv_`` in front.
        rows: output channels.
    """

    program: Program
    held: dict[str, Constant]
    eps: float
    scheme: Scheme
    rows: int

    def factor(self) -> Tensor:
        """``a``, float32."""
        gamma = self.held.get("weight")
        a = (self.held["running_var"].tensor.detach().float() + self.eps).rsqrt()
        return a if gamma is None else a * gamma.tensor.detach().float()

    def by_row(self, part: Tensor) -> Tensor:
        """A scale, or a zero point in value units, times the factor of its row; float32."""
        a = self.factor()
        part = part.float()
        return a * part if part.dim() < 2 else a[:, None] * part

    def scale_dtype(self) -> torch.dtype:
        """That of the scale, or float32 where the products would lose digits in it."""
        if self.scheme.scale_dtype != torch.float16:
            return torch.float32
        a, scale = self.factor().abs(), self.held["conv_scale"].tensor
        if scale.is_meta:  # only its shape is left: what was decided when it was folded first
            key = self._key("scale", torch.float16)
            return torch.float16 if key in self.program.memo else torch.float32
        products = self.by_row(scale).abs()
        fits = bool(products.max() <= torch.finfo(torch.float16).max)
        fits = fits and bool(a.all()) and bool((products[products > 0] >= _FLOAT16_NORMAL).all())
        return torch.float16 if fits else torch.float32

    def add(self, part: str, make: Any) -> fx.Node:
        """A new constant from the convolution's ``part``."""
        constant = self.held["conv_" + part]
        dtype = self.scale_dtype() if part == "scale" else None
        key = self._key(part, dtype)
        tensor = self.program.remember(key, lambda: make(constant.tensor), constant.tensor)
        return self.program.add_constant(f"{constant.name}_folded", tensor, identity=key)

    def add_bias(self, dtype: torch.dtype) -> fx.Node:
        """The new bias."""

        def make() -> Tensor:
            a, beta, own = self.factor(), self.held.get("bias"), self.held.get("conv_bias")
            b = -self.held["running_mean"].tensor.detach().float()
            if own is not None:
                b = b + own.tensor.detach().float()
            b = b * a
            return (b if beta is None else b + beta.tensor.detach().float()).to(dtype)

        key = self._key("bias", dtype)
        name = self.held["running_mean"].name.rpartition(".")[0]
        tensor = self.program.remember(key, make)
        return self.program.add_constant(f"{name}.folded_bias" if name else "folded_bias", tensor, identity=key)

    def _key(self, part: str, dtype: torch.dtype | None) -> tuple[object, ...] | None:
        identities = tuple(c.identity for c in self.held.values())
        return None if None in identities else ("folded", part, dtype, self.eps, *identities)
