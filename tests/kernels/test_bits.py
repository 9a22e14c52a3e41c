from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.kernels.bits import pack_bits, unpack_bits


def _codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(bits=st.integers(1, 8), rows=st.integers(0, 5), length=st.integers(0, 70), seed=st.integers(0, 999))
def test_unpack_is_the_exact_inverse(bits: int, rows: int, length: int, seed: int) -> None:
    codes = _codes(bits, rows, length, seed=seed)
    data = pack_bits(codes, bits)
    assert data.dtype == torch.uint8 and data.shape == (rows, -(-length * bits // 8)) and data.is_contiguous()
    assert torch.equal(unpack_bits(data, bits, length), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [1, 7, 8, 9, 97, 160])
def test_is_one_little_endian_bit_stream(bits: int, length: int) -> None:
    codes = _codes(bits, 3, length)
    planes = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    stream = planes.reshape(3, -1).astype(np.uint8)
    assert np.array_equal(pack_bits(codes, bits).numpy(), np.packbits(stream, axis=-1, bitorder="little"))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_any_layout_and_any_number_of_axes(bits: int) -> None:
    codes = _codes(bits, 4, 6, 19)
    for view in (codes.transpose(0, 1), codes[:, ::2], codes[..., 1::3], codes[0, 0]):
        data = pack_bits(view, bits)
        assert torch.equal(unpack_bits(data, bits, view.shape[-1]), view)
        assert torch.equal(unpack_bits(data.flip(0).flip(0), bits, view.shape[-1]), view)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
def test_a_code_that_needs_more_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"code {2**bits} does not fit in {bits} bits"):
        pack_bits(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


def test_wrong_input() -> None:
    data = torch.zeros(2, 4, dtype=torch.uint8)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match="bits must be 1 to 8"):
            pack_bits(data, bits)
        with pytest.raises(ValueError, match="bits must be 1 to 8"):
            unpack_bits(data, bits, 4)
    with pytest.raises(TypeError, match=r"codes must be uint8, got torch.int8"):
        pack_bits(data.to(torch.int8), 4)
    with pytest.raises(TypeError, match=r"data must be uint8, got torch.float32"):
        unpack_bits(data.float(), 4, 8)
    with pytest.raises(ValueError, match="scalar"):
        pack_bits(data[0, 0], 4)
    for length in (6, 9):
        with pytest.raises(ValueError, match="bytes a row"):
            unpack_bits(data, 4, length)
    with pytest.raises(ValueError, match="length -1"):
        unpack_bits(data[:, :0], 4, -1)
