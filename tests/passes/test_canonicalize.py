"""Every way of writing a product with a weight is found, quantized, named and close to the float model."""

from __future__ import annotations

import pytest
from cases import QUANTIZED, Case
from harness import error, quantize


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
