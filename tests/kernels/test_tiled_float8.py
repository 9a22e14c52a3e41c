"""float8 codes in the tiled layout, on every instruction set of the machine: products without rounding, exact lookups."""

from __future__ import annotations

import pytest
import torch
from oracle import data
from tiled_weights import FLOAT8, Weights, error, random_float8
from torch import Tensor

from qcompile.kernels.cpu import build
from qcompile.kernels.layouts.tiled import pack, unpack
from qcompile.kernels.ops.linear_tiled import linear_tiled as reference

OPS = torch.ops.qcompile
SHAPES = [(97, 97, 32), (160, 193, 48), (64, 512, 128), (33, 160, 0), (7, 1, 0), (1, 7, 16)]
EXACT = 1e-5


def run(w: Weights, x: Tensor, **options: object) -> Tensor:
    return OPS.linear_tiled(x, *w.args, None, 8, w.tiled.group_size, w.tiled.rows, **options)


@pytest.mark.parametrize("codes", FLOAT8)
def test_any_shape_and_number_of_rows(isa: str, codes: torch.dtype) -> None:
    for n, k, group in SHAPES:
        w = random_float8(n, k, group, codes)
        for m in (0, 1, 2, 3, 5, 16, 33):
            x = data(m, k, seed=m)
            y = run(w, x)
            assert y.shape == (m, n)
            if m:
                expected = x.double() @ w.matrix.T
                assert error(y, expected, x, w.matrix) <= EXACT, (n, k, group, m)
                assert torch.equal(y, run(w, x, exact=True))
        x = data(5, k)
        assert error(reference(x, *w.args, None, 8, group, n), x.double() @ w.matrix.T, x, w.matrix) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_types_of_input_and_scale(isa: str, dtype: torch.dtype) -> None:
    bound = {torch.float32: EXACT, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for codes in FLOAT8:
        w = random_float8(45, 130, 64, codes, dtype=dtype)
        for m in (1, 2, 6):
            x = data(m, 130, dtype=dtype) / 16
            assert error(run(w, x), x.double() @ w.matrix.T, x, w.matrix) <= bound


@pytest.mark.parametrize("codes", FLOAT8)
def test_every_code(isa: str, codes: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(codes)
    w = pack(every.view(16, 16).repeat(1, 2), torch.ones(16, 1), None, 8, 0)
    table = every.float().view(16, 16).repeat(1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        got = OPS.dequantize_tiled(w.codes, w.scale, None, 8, 0, 16, 32, dtype)
        torch.testing.assert_close(got, table.to(dtype), rtol=0, atol=0, equal_nan=True)
    index = torch.tensor([15, 0, 7])
    got = OPS.embedding_tiled(index, w.codes, w.scale, None, 8, 0, 16, 32, torch.float32)
    torch.testing.assert_close(got, table[index], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(unpack(w)[0].view(torch.uint8), every.view(torch.uint8).view(16, 16).repeat(1, 2))
    # one column at a time: each code by itself, infinity and NaN among them
    for column in (0, 1, 2, 3, 15):
        single = pack(every.view(16, 16)[:, column : column + 1].contiguous(), torch.full((16, 1), 0.5), None, 8, 0)
        for m in (1, 2, 5):
            y = OPS.linear_tiled(torch.full((m, 1), 3.0), single.codes, single.scale, None, None, 8, 0, 16)
            expected = (every.float().view(16, 16)[:, column] * 1.5).expand(m, 16)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("codes", FLOAT8)
def test_nan_shows_in_its_row_only(isa: str, codes: torch.dtype) -> None:
    nan = torch.tensor([0x80 if codes == torch.float8_e4m3fnuz else 0x7F], dtype=torch.uint8).view(codes)
    assert nan.float().isnan()
    for m in (1, 2, 7):
        x = data(m, 100)
        w = random_float8(20, 100, 32, codes)
        value = unpack(w.tiled)[0].view(torch.uint8)
        value[17, 99] = nan.view(torch.uint8)
        bad = pack(value.view(codes), unpack(w.tiled)[1], None, 8, 32)
        y = OPS.linear_tiled(x, bad.codes, bad.scale, None, None, 8, 32, 20)
        assert y[:, 17].isnan().all()
        assert y[:, [*range(17), 18, 19]].isfinite().all()
        x[m - 1, 3] = float("inf")
        y = run(w, x)
        assert not y[m - 1].isfinite().any() and y[: m - 1].isfinite().all()


def test_siblings_gates_and_gradients() -> None:
    for codes in FLOAT8:
        x = data(3, 97)
        w = random_float8(94, 97, 32, codes, parts=(40, 5, 49))
        outputs = OPS.linear_tiled_split(x, *w.args, None, 8, 32, (40, 5, 49))
        assert error(torch.cat(outputs, -1), x.double() @ w.matrix.T, x, w.matrix) <= EXACT
        g = random_float8(40, 97, 32, codes, glu=True)
        y = OPS.linear_tiled(x / 1000, *g.args, None, 8, 32, 20, activation="silu", glu=True)
        both = x.double() / 1000 @ g.matrix.T
        torch.testing.assert_close(y.double(), torch.nn.functional.silu(both[:, :20]) * both[:, 20:], rtol=1e-4, atol=1e-4)
        w = random_float8(20, 97, 32, codes)
        leaf = x.clone().requires_grad_()
        run(w, leaf).sum().backward()
        torch.testing.assert_close(leaf.grad.double(), w.matrix.sum(0).expand(3, -1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_activations_that_are_rounded_on_purpose(isa: str, rows: int) -> None:
    w, x = random_float8(30, 97, 32, torch.float8_e4m3fn), data(rows, 97)
    scale = torch.tensor(0.05)
    static = (x.double() / 0.05).round().clamp(-127, 127) * 0.05
    assert error(run(w, x, x_scale=scale), static @ w.matrix.T, static, w.matrix) <= EXACT
    own = x.abs().amax(-1, keepdim=True).double() / 127
    by_row = (x.double() / own).round() * own
    assert error(run(w, x, per_row=True), by_row @ w.matrix.T, by_row, w.matrix) <= 1e-4
    x[rows - 1] = 0
    assert torch.equal(run(w, x, per_row=True)[rows - 1], torch.zeros(30))
    x[0, 0] = float("nan")
    for options in ({"per_row": True}, {"x_scale": scale}):
        y = run(w, x, **options)
        assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "bits must be 8|codes must be"),
        ({"zero": torch.zeros(2, 1, 16, dtype=torch.uint8)}, "zero must be None"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    build.ensure_loaded()
    w = random_float8(20, 32, 0, torch.float8_e5m2)
    given = {"codes": w.tiled.codes, "scale": w.tiled.scale, "zero": None, "bits": 8, **change}
    for function in (OPS.linear_tiled, reference):
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(torch.ones(1, 32), **given, bias=None, group_size=0, out_features=20)
    with pytest.raises(ValueError, match="float8 codes have 8 bits and no zero point"):
        pack(torch.zeros(2, 2).to(torch.float8_e5m2), torch.ones(2, 1), None, 4, 0)
