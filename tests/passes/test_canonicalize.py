"""Every way of writing a product with a weight is found, quantized, named and close to the float model."""

from __future__ import annotations

import pytest
import torch
from cases import QUANTIZED, Case
from harness import error, quantize

import qcompile


@pytest.mark.parametrize("case", QUANTIZED, ids=lambda c: c.name)
def test_is_quantized(case: Case) -> None:
    model, inputs = case.make()
    outcome = quantize(model, *inputs)

    assert outcome.quantized == list(case.rows)
    assert {op: outcome.ops[op] for op in case.ops} == case.ops
    matmuls = [row for row in outcome.alone if row[2] != "both operands are activations"]
    assert matmuls == [row for row in case.alone if row[2] != "both operands are activations"]

    # The result's relative error is that of the weights, here and there amplified; a wrong layout gives one near 1.
    assert 0 < error(outcome.got, outcome.want) < 6 * outcome.worst_weight
    assert error(outcome.lowered(), outcome.got) < 1e-5
    assert error(outcome.lowered(exact=False), outcome.want) < 0.05


class _TwoOrders(torch.nn.Module):
    """One weight in two products, each of which needs a copy of it in another order, laid out alike."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(8, 8, 8, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.einsum("nac,abcd->nbd", x, self.w), torch.einsum("nad,abcd->nbc", x, self.w)


def test_copies_in_two_orders_are_two_weights() -> None:
    model, x = _TwoOrders().eval(), torch.randn(3, 8, 8)
    with torch.no_grad():
        quantized = qcompile.quantize(torch.export.export(model, (x,)), "qint8").module()
        for got, want in zip(quantized(x), model(x), strict=True):
            assert (got - want).norm() < 0.02 * want.norm()
