"""What is not quantized is left as it was, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Lambda
from harness import Outcome, error, program_of, quantize, verified
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from qcompile.options import Options
from qcompile.passes.pipeline import run


def _alone(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The rows, after making sure that nothing was quantized and nothing changed."""
    assert not outcome.quantized
    assert error(outcome.got, outcome.want) == 0
    return outcome.alone


def test_two_activations() -> None:
    outcome = quantize(Lambda(lambda x: x @ x.transpose(-1, -2)), torch.randn(2, 3, 16))
    assert _alone(outcome) == [("matmul", "", "both operands are activations")]


def test_attention_of_activations() -> None:
    x = torch.randn(1, 2, 5, 8)
    outcome = quantize(Lambda(lambda x: F.scaled_dot_product_attention(x, x, x)), x)
    assert _alone(outcome) == [("attention", "", "both operands are activations")]


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Linear(16, 8))).requires_grad_(False)
    ((op, weight, reason),) = _alone(quantize(model, torch.randn(3, 16)))
    assert op == "linear"
    assert reason.startswith("weight is computed at run time")
    assert weight in reason
    assert weight.startswith("0.")


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def test_parametrization() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    outcome = quantize(model.requires_grad_(False), torch.randn(3, 16))
    name = "0.parametrizations.weight.original"
    assert _alone(outcome) == [("linear", name, f"weight is computed at run time (by aten.mul.Tensor) from {name}")]


def test_low_rank_update() -> None:
    model = Lambda(lambda x, w, a, b: F.linear(x, w + b @ a), (8, 16), (2, 16), (8, 2))
    rows = _alone(quantize(model, torch.randn(3, 16)))
    assert rows == [
        ("matmul", "w1", "more than one operand is a weight (w1, w2)"),
        ("linear", "w0", "weight is computed at run time (by aten.add.Tensor) from w0, w1, w2"),
    ]


def test_low_rank_adapter_beside_the_weight_is_quantized() -> None:
    model = Lambda(lambda x, w, a, b: F.linear(x, w) + (x @ a.T) @ b.T, (8, 16), (2, 16), (8, 2))
    outcome = quantize(model, torch.randn(3, 16), exclude=["w1", "w2"])
    assert [name for _, name, _ in outcome.quantized] == ["w0"]
    assert outcome.alone == [("linear", "w1", "excluded by 'w1'"), ("linear", "w2", "excluded by 'w2'")]


def test_weight_that_receives_gradients() -> None:
    program = program_of(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), torch.randn(3, 16))
    next(c for c in program.constants.values() if c.name == "1.weight").receives_grad = True
    run(Options.parse({"min_elements": 0}).quantization(), program, check=True)
    assert [(d.weight, d.quantized) for d in program.decisions] == [("0.weight", True), ("1.weight", False)]
    assert str(program.decisions[1].reason).startswith("weight receives gradients")
    assert any(c.name == "1.weight" for c in program.constants.values())


def test_excluded_by_name_module_or_pattern() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    outcome = quantize(model, torch.randn(3, 16), exclude=["0", "*.weight"])
    assert _alone(outcome) == [
        ("linear", "0.weight", "excluded by '0'"),
        ("linear", "1.weight", "excluded by '*.weight'"),
        ("linear", "2.weight", "excluded by '*.weight'"),
    ]


def test_not_included() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    outcome = quantize(model, torch.randn(3, 16), include="1.*")
    assert outcome.quantized == [("linear", "1.weight", (8, 16))]
    assert outcome.alone == [("linear", "0.weight", "not among the included: '1.*'")]


def test_too_small() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    outcome = quantize(model, torch.randn(3, 16), min_elements=200)
    assert outcome.quantized == [("linear", "0.weight", (16, 16))]
    assert outcome.alone == [("linear", "1.weight", "too small to win: 128 elements, at least 200 pay")]


def test_too_small_for_one_row() -> None:
    """A linear that gets one row, whatever the input, is left alone up to 5 times as many elements."""
    model, reason = nn.Linear(16, 16), "too small to win with one row: 256 elements, at least 500 pay"
    outcome = quantize(model, torch.randn(1, 1, 16), min_elements=100)
    assert _alone(outcome) == [("linear", "weight", reason)]
    for x, options in (
        (torch.randn(1, 16), {"min_elements": 50}),
        (torch.randn(1, 2, 16), {"min_elements": 100}),
        (torch.randn(5, 16), {"min_elements": 100, "dynamic_shapes": ({0: torch.export.Dim("rows", max=9)},)}),
    ):
        assert quantize(model, x, **options).quantized == [("linear", "weight", (16, 16))]


def test_too_small_for_one_row_unless_others_read_more() -> None:
    model = Lambda(lambda x, w: F.linear(x[:1], w) + F.linear(x, w), (16, 16))
    outcome = quantize(model, torch.randn(3, 16), min_elements=100)
    assert len(outcome.quantized) == 2 and not outcome.alone


@pytest.mark.parametrize("rows", [(4, 1), (1, 4)])
def test_graphs_of_one_row_and_of_several_share_a_small_weight(rows: tuple[int, int]) -> None:
    """The first one may have released the float weight; then the other has to read the codes."""
    torch._dynamo.reset()
    model = nn.Linear(16, 16)
    inputs = [torch.randn(m, 16) for m in rows]
    with torch.no_grad():
        want = [model(x) for x in inputs]
        compiled = torch.compile(model, backend="qcompile", dynamic=False, options={"min_elements": 100, "exact": True})
        for x, y in zip(inputs, want, strict=True):
            assert error([compiled(x)], [y]) < 0.02


class Buffer(nn.Module):
    """A matrix in a buffer; ``write`` also writes to it."""

    def __init__(self, write: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("matrix", torch.randn(8, 16).mul(10).to(dtype))
        self.matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.matrix)
        if self.write:
            self.matrix.copy_(x[:8])
        return y


def test_buffer_unless_included() -> None:
    x = torch.randn(9, 16)
    reason = "a buffer, not a parameter (name it in `include` to quantize it)"
    assert _alone(quantize(Buffer(), x)) == [("linear", "matrix", reason)]
    assert quantize(Buffer(), x, include="matrix").quantized == [("linear", "matrix", (8, 16))]


def test_buffer_that_the_graph_writes_to() -> None:
    x = torch.randn(9, 16)
    outcome = quantize(Buffer(write=True), x, include="matrix")
    assert not outcome.quantized
    assert outcome.alone == [("linear", "matrix", "the graph writes to the weight")]


class Cache(nn.Module):
    """Keys and values in buffers that each call writes one row of."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("keys", torch.zeros(1, 8, 16))
        self.register_buffer("values", torch.zeros(1, 8, 16))
        self.keys: Tensor
        self.values: Tensor

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        self.keys.index_copy_(1, place, k)
        self.values.index_copy_(1, place, v)
        return (q @ self.keys.transpose(1, 2)).softmax(-1) @ self.values


def test_cache_is_left_and_still_written() -> None:
    x, place = torch.randn(1, 1, 16), torch.tensor([3])
    outcome = quantize(Cache(), x, place)
    assert outcome.quantized == [("linear", "qkv.weight", (48, 16))]
    assert [(r[0], r[2]) for r in outcome.alone] == [("matmul", "both operands are activations")] * 2
    module = outcome.qep.module()
    module(x, place)
    assert [bool(row.any()) for row in module.get_buffer("keys")[0]] == [i == 3 for i in range(8)]


def test_integer_weight() -> None:
    x = torch.randint(-5, 5, (3, 16))
    assert _alone(quantize(Buffer(dtype=torch.int64), x, include="matrix")) == [
        ("linear", "matrix", "weight is int64, not float32, float16 or bfloat16")
    ]


def test_float64_weight() -> None:
    x = torch.randn(3, 16, dtype=torch.float64)
    assert _alone(quantize(nn.Linear(16, 8).double(), x)) == [
        ("linear", "weight", "weight is float64, not float32, float16 or bfloat16")
    ]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_that_matches_nothing_raises(option: str) -> None:
    with pytest.raises(ValueError, match=r"no weight matches 'head\.\*'; the program's weights are: 0\.weight"):
        quantize(nn.Sequential(nn.Linear(16, 8)), torch.randn(3, 16), **{option: ["0.weight", "head.*"]})


@pytest.mark.parametrize(
    ("equation", "weight"),
    [("bsd,edf->bsf", (4, 16, 8)), ("bsd,d->bsd", (16,)), ("bsd,dd->bs", (16, 16)), ("bsd,ef->bsdef", (4, 5))],
)
def test_products_that_are_no_linear(equation: str, weight: tuple[int, ...]) -> None:
    model = Lambda(lambda x, w: torch.einsum(equation, x, w), weight)
    ((op, name, reason),) = _alone(quantize(model, torch.randn(2, 3, 16)))
    assert (op, name) == ("einsum", "w0")
    assert reason == f"a product of the form {equation} is not a linear"


def test_einsum_of_three() -> None:
    model = Lambda(lambda x, a, b: torch.einsum("bsd,dr,rk->bsk", x, a, b), (16, 4), (4, 8))
    ((op, name, reason),) = _alone(quantize(model, torch.randn(2, 3, 16)))
    assert (op, name) == ("einsum", "w0")
    assert reason == "an einsum of 3 operands"


def test_nan_names_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"parameter '0\.weight' cannot be quantized to qint8.*NaN"), verified():
        quantize(model, torch.randn(3, 16))


def test_the_program_given_is_untouched() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU()), torch.randn(3, 16)
    outcome = quantize(model, x)
    assert set(outcome.ep.state_dict) == {"0.weight", "0.bias"}
    assert "aten.linear" in _names(outcome.ep)
    assert torch.equal(outcome.ep.module()(x), model(x))


def _names(ep: Any) -> set[str]:
    return {str(n.target).removesuffix(".default") for n in ep.graph.nodes}
