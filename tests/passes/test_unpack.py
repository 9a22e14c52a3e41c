"""Unpack gives back the values that were packed, once for each weight, and leaves alone what it has to."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from harness import error, export, operators, program_of, quantize, verified
from packed_modules import Weight, ops, packed_parts, with_codes
from torch import Tensor, nn

from qcompile.capture_export import to_exported
from qcompile.compiling import cache
from qcompile.kernels import QTensor, Scheme
from qcompile.passes.merge_fake_quantize import MergeFakeQuantize
from qcompile.passes.pipeline import run
from qcompile.passes.program import Program, normalized
from qcompile.passes.unpack import Unpack

qc, aten = torch.ops.qcompile, torch.ops.aten


class Reads(nn.Module):
    """One packed weight, read by all three operators."""

    def __init__(self, scheme: str, rows: int, columns: int, dtype: torch.dtype = torch.float32, **epilogue: Any) -> None:
        super().__init__()
        self.q = QTensor.quantize(torch.randn(rows, columns), Scheme.parse(scheme))
        (codes, scale, zero), self.sizes = packed_parts(self.q)
        for name, part in (("codes", codes), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, part)
        self.rows, self.columns, self.dtype, self.epilogue = rows, columns, dtype, epilogue

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        weight = (self.codes, self.scale, self.zero)
        shape = (self.rows, self.columns)
        return (
            ops.linear_tiled(x, *weight, None, *self.sizes, self.rows, **self.epilogue),
            ops.embedding_tiled(tokens, *weight, *self.sizes, *shape, self.dtype),
            ops.dequantize_tiled(*weight, *self.sizes, *shape, self.dtype),
        )


def _unpacked(model: Reads) -> tuple[Program, list[Any]]:
    x, tokens = torch.randn(3, model.columns, dtype=model.dtype), torch.randint(model.rows, (4,))
    ep = export(model, x, tokens)
    program = program_of(model, x, tokens)
    with verified():
        run([Unpack()], program)
    return program, [to_exported(program, ep).module()(x, tokens), model, x, tokens]


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (16, 32), (33, 97), (160, 193)])
@pytest.mark.parametrize(
    ("scheme", "back"),
    [
        ("qint8/group=32/symmetric/float16", "qint8"),
        ("qint8/channel=0/symmetric/float32", "qint8"),
        ("qint8/group=64/affine/bfloat16", "qint8"),
        ("qint4/group=32/affine/float16", "qint4"),
        ("qint4/group=48/shift/float32", "qint4"),
        ("qint2/group=32/symmetric/float16", "qint2"),
        ("qint3/group=32/symmetric/float16", "qint3"),
        ("qint3/group=32/affine/float16", "qint3"),
        ("qint5/group=32/symmetric/float32", "qint5"),
        ("qint6/tensor/affine/float32", "qint6"),
        ("qfloat8_e4m3fn/channel=0/symmetric/float32", "qfloat8_e4m3fn"),
        ("qfloat8_e5m2/group=32/symmetric/float16", "qfloat8_e5m2"),
    ],
)
def test_values_are_those_that_were_packed(scheme: str, back: str, shape: tuple[int, int]) -> None:
    model = Reads(scheme, *shape)
    program, (got, _, x, tokens) = _unpacked(model)
    (dequantize,) = program.calls(qc.dequantize.default)
    args = normalized(dequantize)
    assert args["scheme"].startswith(back) and not program.calls(qc.linear_tiled.default)
    assert [n.target for n in program.calls()] == [
        qc.dequantize.default, aten.linear.default, aten.embedding.default
    ]  # fmt: skip
    value = model.q.dequantize()
    assert torch.equal(got[2], value) and torch.equal(got[1], value[tokens])
    torch.testing.assert_close(got[0], x @ value.t(), rtol=1e-4, atol=1e-4)
    if back == scheme.partition("/")[0] and "tensor" not in scheme:
        data = program.constants[args["data"].name].tensor
        assert torch.equal(data, model.q.data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = Reads("qint4/group=32/affine/float16", 33, 97, dtype)
    program, (got, *_) = _unpacked(model)
    assert len(program.calls(qc.dequantize.default)) == 1
    assert torch.equal(got[2], model.q.dequantize(dtype))


def test_a_second_dtype_shares_the_codes() -> None:
    model = Reads("qint4/group=32/affine/float16", 33, 96)
    model.dtype = torch.bfloat16
    program = program_of(model, torch.randn(3, 96), torch.randint(33, (4,)))
    assert Unpack().run(program) == 3
    calls = program.calls(qc.dequantize.default)
    assert len(calls) == 2 and len({c.args[0] for c in calls}) == 1


@pytest.mark.parametrize("epilogue", [{"activation": "silu"}, {"exact": True}])
def test_a_linear_with_an_epilogue_stays(epilogue: dict[str, Any]) -> None:
    program, _ = _unpacked(Reads("qint4/group=32/affine/float16", 33, 97, **epilogue))
    assert len(program.calls(qc.linear_tiled.default)) == 1 and not program.calls(qc.embedding_tiled.default)


class Given(nn.Module):
    def forward(self, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return ops.linear_tiled(x, codes, scale, None, None, 8, 0, 16)


class Written(Reads):
    def forward(self, x: Tensor, tokens: Tensor) -> Any:
        self.scale.mul_(2)
        return super().forward(x, tokens)


def test_codes_that_are_no_constants_stay() -> None:
    q = QTensor.quantize(torch.randn(16, 64), Scheme.parse("qint8/channel=0/symmetric/float32"))
    (codes, scale, _), _ = packed_parts(q)
    program = program_of(Given(), torch.randn(3, 64), codes, scale)
    assert Unpack().run(program) == 0 and len(program.calls(qc.linear_tiled.default)) == 1
    written = program_of(Written("qint8/group=32/symmetric/float16", 16, 64), torch.randn(3, 64), torch.tensor([1]))
    assert Unpack().run(written) == 0


def test_rows_in_packed_order_stay() -> None:
    """All rows of a stack, padding included, are no matrix that anybody wrote down."""

    class Some(Reads):
        def forward(self, x: Tensor, tokens: Tensor) -> Any:
            return ops.dequantize_tiled(self.codes, self.scale, self.zero, *self.sizes, 5, self.columns, self.dtype)

    program = program_of(Some("qint8/group=32/symmetric/float16", 40, 64), torch.randn(3, 64), torch.tensor([1]))
    assert Unpack().run(program) == 0


def test_a_float_program_stays_as_it_is() -> None:
    program = program_of(nn.Linear(8, 8).requires_grad_(False), torch.randn(2, 8))
    before = operators(program.module)
    assert Unpack().run(program) == 0 and operators(program.module) == before


def test_what_was_unpacked_goes_with_the_module() -> None:
    model = with_codes(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False), "qint4")
    with torch.no_grad():
        torch.compile(model, backend="qcompile")(torch.randn(2, 64))
    assert any(key[0] == "unpacked" for key in cache)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not any(key[0] == "unpacked" for key in cache)


class Rounded(nn.Module):
    def __init__(self, scales: list[float], kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        for i, scale in enumerate(scales):
            self.register_buffer(f"s{i}", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        dynamic = [ops.fake_quantize_dynamic(x, k) for k in self.kinds]
        static = [ops.fake_quantize(x, s, "qint8") for s in self.buffers()]
        return torch.stack([*dynamic, *static])


@pytest.mark.parametrize(
    ("scales", "kinds", "merged", "left"),
    [
        ([0.1, 0.1, 0.1], [], 2, 1),
        ([0.1, 0.2, 0.1], [], 1, 2),
        ([], ["qint8", "qint8", "qfloat8_e4m3fn"], 1, 2),
        ([0.1], ["qint8"], 0, 2),
    ],
)
def test_equal_roundings_are_merged(scales: list[float], kinds: list[str], merged: int, left: int) -> None:
    model, x = Rounded(scales, kinds), torch.randn(3, 33)
    ep, program = export(model, x), program_of(model, x)
    assert MergeFakeQuantize().run(program) == merged
    assert len(program.calls(qc.fake_quantize.default, qc.fake_quantize_dynamic.default)) == left
    assert torch.equal(to_exported(program, ep).module()(x), model(x))


def test_a_scale_that_the_graph_writes_is_not_compared() -> None:
    class Calibrates(Rounded):
        def forward(self, x: Tensor) -> Tensor:
            self.s0.fill_(0.5)
            return super().forward(x)

    assert MergeFakeQuantize().run(program_of(Calibrates([0.1, 0.1], []), torch.randn(3, 8))) == 0


def test_a_table_alone() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Weight(torch.randn(50, 64), Scheme.parse("qint8/group=32/symmetric/float16"), True)

        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.embedding(tokens, self.table())

    outcome = quantize(Table(), torch.randint(50, (2, 3)))
    assert outcome.quantized == [("embedding", "table", (50, 64))] and outcome.ops["qcompile.embedding"] == 1
    assert error(outcome.got, outcome.want) == 0
