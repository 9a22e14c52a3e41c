"""A module that holds codes gives the program that quantizing the float module's graph gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import compile_without_inductor, error, export, quantize, tensors, ungathered, verified
from packed_modules import Weight, with_codes
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from qcompile.export import lowered
from qcompile.kernels import Scheme
from qcompile.options import Options
from qcompile.passes.decision import Decision
from qcompile.report import rows_of


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 97), nn.Linear(97, 33, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """Attention with queries, keys and values of one input, and a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(-2, -3) for y in (self.q(x), self.k(x), self.v(x)))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.back = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.grouped(torch.relu(self.first(x))))


class Tied(nn.Module):
    """A table that is looked up, and read again by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.table(tokens)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[int, Any]]] = {
    "mlp": (Mlp, torch.randn(5, 64), {0: Dim("rows")}),
    "block": (Block, torch.randn(2, 5, 64), {0: Dim("batch"), 1: Dim("length")}),
    "convolutions": (Convolutions, torch.randn(2, 4, 9, 9), {0: Dim("batch")}),
    "tied": (Tied, torch.randint(50, (2, 7)), {0: Dim("batch"), 1: Dim("length")}),
}


def _model(name: str) -> tuple[nn.Module, Tensor, dict[int, Any]]:
    torch.manual_seed(0)
    make, x, dynamic = MODELS[name]
    return make().eval().requires_grad_(False), x, dynamic


def _calls(ep: ExportedProgram) -> list[str]:
    return [str(n.target) for n in ep.graph.nodes if n.op == "call_function"]


def _rows(rows: list[Decision]) -> list[tuple[Any, ...]]:
    """What rows of both ways must have in common: all but the error, which needs the float weight.

    A tied weight has two names, and torch.export takes either.
    """
    done = [replace(r, weight=r.weight.replace("head", "table")) for r in rows if r.quantized]
    return sorted((r.op, r.weight, r.shape, r.scheme, r.kernel, r.bytes, r.float_bytes, r.shared) for r in done)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("qcompile")]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("weights", ["qint8", "qint4"])
@pytest.mark.parametrize("name", MODELS)
def test_export(name: str, weights: str, packed: bool, dynamic: bool) -> None:
    model, x, sizes = _model(name)
    shapes = (sizes,) if dynamic else None
    want = quantize(model, x, strict=True, dynamic_shapes=shapes, weights=weights)
    got = quantize(with_codes(model, weights, packed), x, strict=True, dynamic_shapes=shapes, weights=weights)
    assert _calls(got.qep) == _calls(want.qep)
    assert _rows(got.rows) == _rows(want.rows) and all(r.error is None for r in got.rows)
    assert error(got.got, want.got) == 0
    assert error(got.want, want.got) < 0.02  # eager kernels round activations
    with verified():
        one, other = lowered(got.qep), lowered(want.qep)
    assert _calls(one) == _calls(other)
    assert error(tensors(one.module()(x)), tensors(other.module()(x))) == 0
    if packed and name != "tied":
        assert sorted(one.state_dict) == sorted(other.state_dict)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_dynamo(name: str, packed: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, x, _ = _model(name)
    coded = with_codes(model, "qint4", packed)
    before = {n: b.clone() for n, b in coded.named_buffers()}
    with caplog.at_level(logging.WARNING):
        got, rows = compile_without_inductor(coded, x, weights="qint4")
    assert not _said(caplog)
    want, wanted = compile_without_inductor(model, x, weights="qint4")
    assert _rows(rows) == _rows(wanted) and error(tensors(got), tensors(want)) == 0
    # Buffers are still the module's own.
    assert all(torch.equal(b, before[n]) for n, b in coded.named_buffers())
    assert error(tensors(coded(x)), tensors(want)) < 0.02


@pytest.mark.parametrize("name", ["block", "tied"])
def test_compiled_by_inductor(name: str) -> None:
    model, x, _ = _model(name)
    coded = with_codes(model, "qint4")
    with verified(), torch.no_grad():
        compiled = torch.compile(coded, backend="qcompile", dynamic=True)
        want = torch.compile(model, backend="qcompile", dynamic=True, options={"weights": "qint4", "min_elements": 0})
        for length in (x.shape[1], 11):
            again = x[:, :1].repeat(1, length, *[1] * (x.dim() - 2))
            torch.testing.assert_close(compiled(again), want(again), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_lowered_without_being_quantized_again(name: str) -> None:
    model, x, _ = _model(name)
    want = quantize(model, x, weights="qint4", strict=True)
    ep = export(with_codes(model, "qint4"), x, strict=True)
    with verified():
        got = lowered(ep)
    assert _calls(got) == _calls(lowered(want.qep))
    assert error(tensors(got.module()(x)), tensors(lowered(want.qep).module()(x))) == 0
    assert _rows(list(rows_of(got.graph)))


def test_what_is_float_is_quantized_as_asked_and_the_rest_stays() -> None:
    model = Mlp().eval().requires_grad_(False)
    coded = with_codes(model, "qint4")
    coded.down = model.down
    rows = {r.weight: r for r in quantize(coded, torch.randn(3, 64), weights="qint8").rows}
    assert rows["up.weight"].scheme is not None and rows["up.weight"].scheme.startswith("qint4")
    assert rows["down.weight"].scheme is not None and rows["down.weight"].scheme.startswith("qint8")


def test_nothing_is_said_of_nothing_to_quantize(caplog: pytest.LogCaptureFixture) -> None:
    model, x, _ = _model("mlp")
    ep = export(with_codes(model), x)
    with caplog.at_level(logging.WARNING):
        qcompile.quantize(ep, exclude="up")
    assert not _said(caplog)
    with pytest.raises(ValueError, match="no weight matches 'nowhere'"):
        qcompile.quantize(ep, exclude="nowhere")


class Products(nn.Module):
    """Ways to write a product with a decoded matrix."""

    def __init__(self, how: str, packed: bool) -> None:
        super().__init__()
        self.how, self.bias = how, nn.Parameter(torch.randn(48))
        self.w = Weight(torch.randn(48, 64), Scheme.parse("qint8/group=32/symmetric/float16"), packed)

    def forward(self, x: Tensor) -> Tensor:
        w = self.w()
        match self.how:
            case "matmul":
                return x @ w.t()
            case "addmm":
                return torch.addmm(self.bias, x, w.t())
            case "einsum":
                return torch.einsum("bk,nk->bn", x, w)
            case "bmm":
                return torch.bmm(x.view(2, -1, 64), w.view(2, 24, 64).transpose(1, 2))
            case "rows":
                return nn.functional.linear(x, w[16:40], self.bias[16:40])
            case "chunks":
                a, b = w.chunk(2)
                return x @ a.t() + x @ b.t()
            case "half":
                return nn.functional.linear(x.bfloat16(), w.bfloat16())
            case "wrong way":
                return x[:, :48] @ w
        raise AssertionError(self.how)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["matmul", "addmm", "einsum", "bmm", "rows", "chunks", "half"])
def test_products_of_a_decoded_matrix_fuse(how: str, packed: bool) -> None:
    outcome = quantize(Products(how, packed).eval().requires_grad_(False), torch.randn(6, 64))
    assert "qcompile.dequantize" not in outcome.ops and "qcompile.dequantize_tiled" not in outcome.ops
    assert outcome.quantized and all(w.startswith("w") for _, w, _ in outcome.quantized)
    assert error(outcome.got, outcome.want) < (1e-2 if how == "half" else 1e-5)
    assert error(outcome.lowered(), outcome.want) < (1e-2 if how == "half" else 1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_a_matrix_that_is_read_across_its_groups_stays_decoded(packed: bool) -> None:
    outcome = quantize(Products("wrong way", packed).eval().requires_grad_(False), torch.randn(6, 64))
    assert outcome.ops["qcompile.dequantize"] == 1 and not outcome.quantized
    assert [(op, w) for op, w, _ in outcome.alone] == [("matmul", "w")] and "another arrangement" in outcome.alone[0][2]
    assert error(outcome.got, outcome.want) < 1e-6


@pytest.mark.parametrize(("activations", "said"), [(0.03, "qint8 static"), ("qint8", "qint8 dynamic")])
@pytest.mark.parametrize("packed", [True, False])
def test_rounded_activations_are_the_kernels_business(activations: Any, said: str, packed: bool) -> None:
    model, _, _ = _model("block")
    # An input of its own: in one of some ten, a value lies so near the middle of two codes that it may go either way.
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(5))
    outcome = quantize(with_codes(model, "qint8", packed, activations=activations), x, weights="qint8")
    assert outcome.ops["qcompile.linear"] == 7 and "qcompile.dequantize" not in outcome.ops
    assert [r.activations for r in outcome.rows if r.quantized] == [said] * 7
    assert f"activations {said}" in str(qcompile.report(outcome.qep)) and said in qcompile.report(outcome.qep).to_html()
    assert Decision.from_dict(outcome.rows[0].to_dict()).activations == outcome.rows[0].activations
    with verified(), ungathered():
        program = lowered(outcome.qep, Options.parse({"exact": True}))
    # Queries, keys and values, and gate and up, read one rounded tensor each; then o and down.
    tiled = [n for n in program.graph.nodes if "tiled" in str(n.target)]
    assert not any("fake_quantize" in c for c in _calls(program)) and len(tiled) == 4
    assert all((n.args[-2] is not None, n.args[-1]) == (said.endswith("static"), said.endswith("dynamic")) for n in tiled)
    assert error(tensors(program.module()(x)), outcome.got) < 1e-5


def test_scales_that_differ_keep_siblings_apart() -> None:
    model, x, _ = _model("block")
    coded = with_codes(model, "qint8", activations=0.03)
    coded.k.input_scale.fill_(0.04)
    with verified(), ungathered():
        program = lowered(quantize(coded, x).qep)
    assert sum("tiled" in str(n.target) for n in program.graph.nodes) == 5


def test_a_written_scale_is_noticed() -> None:
    """Scales were equal when the graph was compiled; one of them no longer is."""
    model, x, _ = _model("block")
    coded = with_codes(model, "qint8", activations=0.03)
    with torch.no_grad():
        compiled = torch.compile(coded, backend="qcompile", options={"exact": True})
        compiled(x)
        for name in ("q", "k"):
            coded.get_submodule(name).input_scale.mul_(3)
            assert error([compiled(x)], [coded(x)]) < 0.02


def test_written_codes_are_noticed() -> None:
    model, x, _ = _model("block")
    coded = with_codes(model, "qint4")
    with torch.no_grad():
        compiled = torch.compile(coded, backend="qcompile")
        compiled(x)
        for name in ("q.weight.scale", "o.weight.scale"):
            coded.get_buffer(name).mul_(0.5)
            assert error([compiled(x)], [coded(x)]) < 0.02


def test_a_later_graph_gets_codes_that_the_first_gave_up() -> None:
    """The first graph stacks three siblings and keeps the stack only; the second one stacks two of them, and decodes one."""
    model, x, _ = _model("block")
    coded = with_codes(model, "qint4")

    def two(x: Tensor) -> Tensor:
        return coded.q(x) * coded.k(x) + coded.v.weight().sum()

    with torch.no_grad():
        torch.compile(coded, backend="qcompile")(x)
        got = torch.compile(two, backend="qcompile")(x)
        assert error([got], [two(x)]) < 0.02


def test_packed_weights_are_not_held_twice() -> None:
    model, x, _ = _model("mlp")
    coded = with_codes(model, "qint4")
    with verified():
        program = lowered(export(coded, x))
    held = {t.data_ptr() for t in program.state_dict.values()}
    assert {coded.up.weight.codes.data_ptr(), coded.down.weight.codes.data_ptr()} <= held




@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_eager_modules_give_the_graph_of_the_float_model(name: str, strict: bool) -> None:
    model, x, sizes = _model(name)
    want = quantize(model, x, strict=strict, dynamic_shapes=(sizes,), weights="qint4")
    frozen = qcompile.freeze(qcompile.quantize(_model(name)[0], weights="qint4", min_elements=0))
    got = quantize(frozen, x, strict=strict, dynamic_shapes=(sizes,), weights="qint8")
    assert _calls(got.qep) == _calls(want.qep) and _rows(got.rows) == _rows(want.rows)
    assert error(got.got, want.got) == 0
    with verified():
        one, other = lowered(got.qep), lowered(want.qep)
    assert _calls(one) == _calls(other) and error(tensors(one.module()(x)), tensors(other.module()(x))) == 0


@pytest.mark.parametrize("name", MODELS)
def test_eager_modules_with_activations_compile(name: str) -> None:
    model, x, _ = _model(name)
    frozen = qcompile.quantize(model, weights="qint8", activations="qint8", min_elements=0)
    with torch.no_grad():
        with qcompile.Calibration():
            frozen(x)
        qcompile.freeze(frozen)
        want = frozen(x)
        got, rows = compile_without_inductor(frozen, x, exact=True)
    assert error(tensors(got), tensors(want)) < 0.02
    products = [r for r in rows if r.op in ("linear", "conv")]
    assert products and all(r.quantized and r.activations == "qint8 static" for r in products)
    # Still whole, and still itself.
    assert error(tensors(frozen(x)), tensors(want)) == 0
