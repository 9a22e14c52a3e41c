"""Encode and decode: the definition that every kernel is held against, so held here against numpy."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.kernels import QTensor, Scheme, numerics

SHAPES = [(1, 1), (7, 97), (16, 160), (33, 64), (5, 193)]


@pytest.mark.parametrize("text", oracle.SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_the_scheme_formula(text: str, shape: tuple[int, int]) -> None:
    q = QTensor.quantize(oracle.data(*shape), Scheme.parse(text))
    assert np.array_equal(oracle.wide(q.codes()), oracle.codes(q))
    np.testing.assert_allclose(oracle.wide(q.dequantize(torch.float64)), oracle.value(q), rtol=1e-14, atol=1e-300)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        want = torch.from_numpy(oracle.value(q)).to(dtype)
        got = q.dequantize(dtype)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_store_and_fetch_are_inverse(text: str) -> None:
    scheme = Scheme.parse(text)
    for shape in SHAPES:
        codes = QTensor.quantize(oracle.data(*shape), scheme).codes()
        for view in (codes, codes.t().contiguous().t()):
            data = numerics.store(view, scheme)
            assert data.dtype == scheme.data_dtype and data.shape == scheme.data_shape(shape) and data.is_contiguous()
            back = numerics.fetch(data, scheme, shape)
            assert back.dtype == scheme.code_dtype and torch.equal(oracle_equal(back), oracle_equal(codes))


def oracle_equal(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8) if codes.dtype.itemsize == 1 else codes


@pytest.mark.parametrize("text", [t for t in oracle.SCHEMES if not t.startswith("qfloat8")])
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_encode_picks_the_nearest_code(text: str, seed: int, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(text)
    x = oracle.data(9, 41, dtype=dtype, seed=seed)
    # Parameters of another tensor, so that values also fall out of range.
    q = QTensor.quantize(oracle.data(9, 41, seed=seed + 1), scheme)
    scale = oracle.each(q.scale, x.shape, scheme)
    zero = 0 if q.zero is None else oracle.each(q.zero, x.shape, scheme)
    low, high = (scheme.qtype.qmin, scheme.qtype.qmax) if q.zero is None else (0, scheme.qtype.levels - 1)
    exact = (oracle.wide(x) - zero) / scale if scheme.mode == "shift" else oracle.wide(x) / scale + zero
    got = oracle.wide(numerics.encode(x, q.scale, q.zero, scheme))
    assert got.min() >= low and got.max() <= high
    # A code is nearest up to the float32 rounding of the quotient.
    slack = np.abs(exact).clip(1) * 1e-6 + (np.abs(zero / scale) * 1e-6 if scheme.mode == "shift" else 0)
    assert np.all(np.abs(got - exact.clip(low, high)) <= 0.5 + slack)


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_encoding_the_decoded_value_gives_the_same_codes(text: str) -> None:
    q = QTensor.quantize(oracle.data(16, 97), Scheme.parse(text))
    for dtype in (torch.float32, torch.float64):
        again = numerics.encode(q.dequantize(dtype), q.scale, q.zero, q.scheme)
        assert np.array_equal(oracle.wide(again), oracle.codes(q))


def test_rounds_half_to_even_and_saturates() -> None:
    scheme = Scheme.parse("qint4/tensor/symmetric/float32")
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 7.4, 7.6, 900.0, -8.4, -8.6, -900.0, float("inf"), float("-inf")])
    codes = numerics.encode(x, torch.tensor(1.0), None, scheme)
    assert codes.tolist() == [0, 2, 2, 0, -2, 7, 7, 7, -8, -8, -8, 7, -8]


@pytest.mark.parametrize("name", ["qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2"])
def test_float8_special_values(name: str) -> None:
    scheme = Scheme.parse(f"{name}/tensor/symmetric/float32")
    top, one = float(scheme.qtype.qmax), torch.tensor(1.0)
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 2 * top, 0.0, -0.0, -1e-30])
    got = numerics.decode(numerics.encode(x, one, None, scheme), one, None, scheme, torch.float32)
    assert torch.isnan(got[0])
    # Out of range saturates to the highest finite value; what underflows is zero, also where there is no minus zero.
    assert got[1:].tolist() == [top, -top, top, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2"])
def test_every_float8_code_survives(name: str) -> None:
    scheme = Scheme.parse(f"{name}/tensor/symmetric/float32")
    codes = torch.arange(256, dtype=torch.uint8).view(scheme.qtype.dtype)
    finite = codes[torch.isfinite(codes.float())]
    scale = torch.tensor(0.0371)
    value = numerics.decode(finite, scale, None, scheme, torch.float32)
    again = numerics.encode(value, scale, None, scheme)
    assert torch.equal(again.float(), finite.float()) and len(finite) > 240


def test_a_zero_point_that_is_missing() -> None:
    scheme = Scheme.parse("qint4/tensor/affine/float32")
    with pytest.raises(ValueError, match="needs a zero point"):
        numerics.encode(torch.ones(2), torch.tensor(1.0), None, scheme)
    with pytest.raises(ValueError, match="needs a zero point"):
        numerics.decode(torch.ones(2, dtype=torch.uint8), torch.tensor(1.0), None, scheme, torch.float32)
