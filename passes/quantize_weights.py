"""Float weights out, codes in."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qcompile.kernels.measured import measured
from qcompile.kernels.memory import Meter
from qcompile.kernels.qparams import Clip
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme
from qcompile.passes.base import Pass
from qcompile.passes.program import Constant, Program, Site

log = logging.getLogger("qcompile.passes")


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize every weight that has a scheme, once, by rounding to nearest::

        W ──► linear     ->     data, scale, zero ──► dequantize ──► linear

    Attributes:
        clip: ``"max"`` covers the full range of each group; ``"mse"`` looks for the range with the least squared error;
            ``"hqq"`` goes on from there with the half-quadratic solver.

    Before: sites have decisions. After: the sites' weights come from ``qcompile.dequantize``; a float weight that nothing
    else reads is gone; each decision has its bytes and relative error.
    """

    clip: Clip = "max"

    def run(self, program: Program) -> int:
        """Rewrite; returns how many weights were quantized."""
        by_weight: dict[str, list[Site]] = {}
        for site in program.sites:
            if site.decision.quantized:
                by_weight.setdefault(site.weight.name, []).append(site)
        meter = Meter()
        for sites in program.track(by_weight.values(), "quantizing"):
            self._weight(program, sites)
            meter.add(sites[0].decision.float_bytes)
        program.clean()
        return len(by_weight)

    def _weight(self, program: Program, sites: list[Site]) -> None:
        node = sites[0].weight
        constant = program.constants[node.name]
        quantized, error = self._quantized(program, constant, Scheme.parse(str(sites[0].decision.scheme)))
        for site in sites:
            site.decision.scheme = str(quantized.scheme)
            site.decision.bytes, site.decision.error = quantized.nbytes, error
        dequantized = insert(program, constant, quantized, node.meta["val"].dtype, self.clip)
        uses = {use for site in sites for use in site.uses}
        node.replace_all_uses_with(dequantized, delete_user_cb=lambda user: user in uses)

    def _quantized(self, program: Program, constant: Constant, scheme: Scheme) -> tuple[QTensor, float]:
        key = None if constant.identity is None else ("weight", constant.identity, scheme, self.clip)
        if key is not None and key in program.memo:
            return program.memo[key]
        if constant.tensor.is_meta:
            raise ValueError(
                f"parameter {constant.name!r} was released after it was quantized to another scheme; compile with "
                f"keep_float=True to quantize one model in several ways"
            )
        try:
            made = _quantize(constant.tensor, scheme, self.clip)
        except ValueError as error:
            raise ValueError(f"parameter {constant.name!r} cannot be quantized to {scheme}: {error}") from error
        if key is not None:
            program.memo[key] = made
        return made


def insert(program: Program, constant: Constant, quantized: QTensor, dtype: torch.dtype, how: str = "") -> fx.Node:
    """Add the constants of a quantized value and the call that dequantizes them; returns that call.

    Args:
        how: tells apart values of one scheme that were found in different ways.
    """
    identity = None if constant.identity is None else ("q", constant.identity, quantized.scheme, how)

    def part(suffix: str, tensor: Tensor) -> fx.Node:
        return program.add_constant(f"{constant.name}_{suffix}", tensor, identity=identity and (*identity, suffix))

    data, scale = part("data", quantized.data), part("scale", quantized.scale)
    zero = None if quantized.zero is None else part("zero", quantized.zero)
    with program.graph.inserting_before(program.first_call()):
        return program.call(
            torch.ops.qcompile.dequantize.default,
            data,
            scale,
            zero,
            str(quantized.scheme),
            list(quantized.shape),
            dtype,
        )


def _quantize(tensor: Tensor, scheme: Scheme, clip: Clip) -> tuple[QTensor, float]:
    try:
        return measured(tensor, scheme, clip)
    except ValueError:
        # Only a scale beyond float16 is mended, by a wider one; the report shows the scheme that was taken.
        if scheme.scale_dtype != torch.float16 or not bool(torch.isfinite(tensor).all()):
            raise
        return measured(tensor, replace(scheme, scale_dtype=torch.float32), clip)
