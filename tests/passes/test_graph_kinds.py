"""The same modules by other ways in: core aten operators, dynamic sizes, other dtypes, Dynamo; and compiled by Inductor."""

from __future__ import annotations

import pytest
import torch
from cases import QUANTIZED, Attention, Case, First, Lambda
from harness import compile_without_inductor, error, quantize, tensors
from torch import Tensor, nn

BATCHED = ("linears", "x @ w", "matmul 3-d", "transposed storage", "einsum bsd,dk->bsk", "einsum bshk,hkd->bsd", "conv2d",
           "embedding", "tied", "routed", "self attention")  # fmt: skip
LOW = ("linears", "x @ w", "addmm scaled", "einsum bsd,dk->bsk", "bmm", "matmul with a stack", "conv1d", "conv_transpose2d",
       "embedding", "tied", "self attention", "lstm")  # fmt: skip
COMPILED = (
    "linears",
    "x @ w",
    "bmm",
    "conv2d",
    "conv_transpose2d",
    "tied",
    "routed",
    "self attention",
    "gru in two directions",
)

#: Decomposed to a product element by element and a sum, which is no matmul any more.
NO_MATMUL = ("w @ vector", "mv")


def _named(*names: str) -> list[Case]:
    cases = {case.name: case for case in QUANTIZED}
    return [cases[name] for name in names]


def _whole(names: list[str]) -> set[str]:
    """Names of weights, without which part of them."""
    return {name.partition("[")[0] for name in names}


@pytest.mark.parametrize("case", [c for c in QUANTIZED if c.name not in NO_MATMUL], ids=lambda c: c.name)
def test_core_aten(case: Case) -> None:
    model, inputs = case.make()
    outcome = quantize(model, *inputs, before=lambda ep: ep.run_decompositions())
    assert _whole([w for _, w, _ in outcome.quantized]) == _whole([w for _, w, _ in case.rows])
    assert 0 < error(outcome.got, outcome.want) < 6 * outcome.worst_weight
    assert error(outcome.lowered(), outcome.got) < 1e-5


@pytest.mark.parametrize("case", _named(*BATCHED), ids=lambda c: c.name)
def test_dynamic_first_size(case: Case) -> None:
    model, inputs = case.make()
    size = torch.export.Dim("size", min=2, max=64)
    shapes: tuple[object, ...] = tuple({0: size} for _ in inputs)
    if isinstance(model, Lambda):
        shapes = (shapes,)  # one argument that takes all inputs
    inputs = tuple(torch.cat([x, x]) for x in inputs)
    outcome = quantize(model, *inputs, dynamic_shapes=shapes)
    assert outcome.quantized == list(case.rows)
    for times in (1, 3):
        longer = tuple(torch.cat([x] * times) for x in inputs)
        want = tensors(model(*longer))
        assert 0 < error(tensors(outcome.qep.module()(*longer)), want) < 6 * outcome.worst_weight


@pytest.mark.parametrize("weight", [(4, 16, 8), (16, 8)], ids=["stack", "matrix"])
@pytest.mark.parametrize("swap", [False, True])
def test_dynamic_size_in_core_aten(weight: tuple[int, ...], swap: bool) -> None:
    # A batched product of a repeated weight, repeated as often as the input is long.
    model = Lambda(lambda x, w: w.mT @ x.mT if swap else x @ w, weight).requires_grad_(False)
    size = torch.export.Dim("size", min=2, max=64)
    outcome = quantize(
        model, torch.randn(3, 4, 5, 16), dynamic_shapes=(({0: size},),), before=lambda ep: ep.run_decompositions()
    )
    assert [w for _, w, _ in outcome.quantized] == ["w0"]
    longer = torch.randn(7, 4, 5, 16)
    assert 0 < error(tensors(outcome.qep.module()(longer)), tensors(model(longer))) < 6 * outcome.worst_weight


@pytest.mark.parametrize("case", _named(*LOW), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    model, inputs = case.make()
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    outcome = quantize(model.to(dtype), *inputs)
    assert outcome.quantized == list(case.rows)
    # The float model rounds as much as bfloat16 does, at a few places.
    assert 0 < error(outcome.got, outcome.want) < 6 * outcome.worst_weight + 4 * torch.finfo(dtype).eps
    assert error(outcome.lowered(), outcome.want) < 6 * outcome.worst_weight + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("case", QUANTIZED, ids=lambda c: c.name)
def test_dynamo(case: Case) -> None:
    model, inputs = case.make()
    want = tensors(model(*inputs))
    with torch._dynamo.config.patch(allow_rnn=True):
        results, rows = compile_without_inductor(model, *inputs, exact=True)
    quantized = [row for row in rows if row.quantized]
    assert [(r.op, r.shape) for r in quantized] == [(op, shape) for op, _, shape in case.rows]
    assert len({r.weight for r in quantized}) == len({weight for _, weight, _ in case.rows})
    assert 0 < error(tensors(results), want) < 6 * max(r.error or 0.0 for r in quantized)


@pytest.mark.parametrize("case", _named(*COMPILED), ids=lambda c: c.name)
def test_compiled(case: Case) -> None:
    model, inputs = case.make()
    outcome = quantize(model, *inputs)
    assert error(outcome.compiled(), outcome.got) < 1e-5


@pytest.mark.parametrize("fast", [False, True])
def test_attention_fast_path(fast: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        outcome = quantize(Attention().eval().requires_grad_(False), torch.randn(2, 5, 32), torch.randn(2, 7, 32))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert {w for _, w, _ in outcome.quantized} == {"mha.in_proj_weight", "mha.out_proj.weight"}
    assert 0 < error(outcome.got, outcome.want) < 6 * outcome.worst_weight


def test_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval().requires_grad_(False)
    outcome = quantize(layer, torch.randn(2, 5, 32))
    assert {w for _, w, _ in outcome.quantized} == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
    }  # fmt: skip
    assert 0 < error(outcome.got, outcome.want) < 6 * outcome.worst_weight


@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU])
def test_unrolled_recurrence_names_its_weights(module: type[nn.Module]) -> None:
    model = First(module(16, 8, batch_first=True)).eval().requires_grad_(False)
    outcome = quantize(model, torch.randn(2, 5, 16), before=lambda ep: ep.run_decompositions())
    assert {w for _, w, _ in outcome.quantized} == {"inner.weight_ih_l0", "inner.weight_hh_l0"}
    assert not [row for row in outcome.alone if row[2] != "both operands are activations"]


class Mapped(nn.Module):
    """A linear whose result goes through ``torch.vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * row.sum())(self.linear(x))


def test_vmap_in_dynamo() -> None:
    model, x = Mapped().requires_grad_(False), torch.randn(3, 16)
    want = tensors(model(x))
    results, (row,) = compile_without_inductor(model, x, exact=True)
    assert (row.weight, row.quantized) == ("linear.weight", True)
    assert 0 < error(tensors(results), want) < 6 * (row.error or 0.0)


def test_one_copy_of_a_tied_weight() -> None:
    (case,) = _named("tied")
    model, inputs = case.make()
    held = quantize(model, *inputs).qep.state_dict
    assert sorted(held) == ["head.weight_data", "head.weight_scale"]


def test_groups_of_odd_sizes() -> None:
    model = Lambda(lambda x, w: x @ w, (97, 7)).requires_grad_(False)
    outcome = quantize(model, torch.randn(3, 97), weights="qint4", group_size=32)
    assert outcome.rows[0].scheme == "qint4/group=32/affine/float16"
    assert 0 < error(outcome.got, outcome.want) < 3 * outcome.worst_weight
    assert error(outcome.lowered(), outcome.got) < 1e-5
