"""The rows layout: unpack is the exact inverse of pack, and every code lies where the module says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.kernels.layouts.rows import CHUNK, Geometry, check, dequantize, pack, unpack


@given(
    bits=st.sampled_from([4, 8]),
    n=st.integers(1, 40),
    k=st.integers(1, 200),
    group=st.sampled_from([0, 1, 7, 16, 24, 32, 50, 128, 500]),
    zero=st.sampled_from(["none", "codes", "shift"]),
    seed=st.integers(0, 1000),
)
def test_unpack_gives_back_what_was_packed(bits: int, n: int, k: int, group: int, zero: str, seed: int) -> None:
    torch.manual_seed(seed)
    geometry = Geometry.of(k, group)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.randn(n, geometry.groups).to(torch.float16)
    zeros = {
        "none": None,
        "codes": torch.randint(0, 256, scale.shape).to(torch.uint8),
        "shift": torch.randn(scale.shape).half(),
    }
    packed = pack(codes, scale, zeros[zero], bits, group)
    got = unpack(packed)
    assert torch.equal(got[0], codes) and torch.equal(got[1], scale)
    assert (got[2] is None) == (zero == "none") and (got[2] is None or torch.equal(got[2], zeros[zero]))  # type: ignore[arg-type]
    assert packed.codes.shape == (n, geometry.chunks * 2 * bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_each_code_lies_where_the_layout_says(bits: int) -> None:
    k, group = 100, 40  # a group is padded to 3 chunks, the last one of 20 columns to 2
    codes = torch.randint(0, 2**bits, (5, k), dtype=torch.uint8)
    packed = pack(codes, torch.ones(5, 3), None, bits, group)
    assert packed.codes.shape == (5, (3 + 3 + 2) * 2 * bits)
    for column in range(k):
        chunk, j = column // group * 3 + column % group // CHUNK, column % group % CHUNK
        byte = packed.codes[:, chunk * 2 * bits + (j if bits == 8 else j // 2)]
        assert torch.equal(byte if bits == 8 else byte >> (4 * (j % 2)) & 15, codes[:, column])


def test_the_value_is_what_the_three_tensors_say() -> None:
    codes = torch.randint(0, 16, (3, 20), dtype=torch.uint8)
    scale = torch.rand(3, 3) + 0.5
    wide = scale.repeat_interleave(8, 1)[:, :20]
    zero = torch.randint(0, 16, (3, 3)).to(torch.uint8)
    shift = torch.randn(3, 3)
    for z, expected in (
        (None, (codes.float() - 8) * wide),
        (zero, (codes.float() - zero.float().repeat_interleave(8, 1)[:, :20]) * wide),
        (shift, codes.float() * wide + shift.repeat_interleave(8, 1)[:, :20]),
    ):
        packed = pack(codes, scale, z, 4, 8)
        got = dequantize(packed.codes, packed.scale, packed.zero, 4, 8, 20)
        torch.testing.assert_close(got, expected)


def test_what_does_not_fit_is_refused() -> None:
    codes, scale = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2)
    with pytest.raises(ValueError, match="4 or 8 bits"):
        pack(codes, scale, None, 2, 16)
    with pytest.raises(ValueError, match="not empty"):
        pack(codes[:0], scale[:0], None, 4, 16)
    with pytest.raises(ValueError, match="reach 16"):
        pack(codes + 16, scale, None, 4, 16)
    with pytest.raises(ValueError, match="group_size=-1"):
        pack(codes, scale, None, 4, -1)
    with pytest.raises(ValueError, match=r"scale must be \[4, 4\]"):
        pack(codes, scale, None, 4, 8)
    with pytest.raises(ValueError, match="zero must be"):
        pack(codes, scale, torch.zeros(4, 2, dtype=torch.int8), 4, 16)
    with pytest.raises(ValueError, match=r"codes must be \[4, 16\]"):
        check("op", codes, scale, None, 4, 16, 4, 32)
