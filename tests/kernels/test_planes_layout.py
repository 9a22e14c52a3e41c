"""The planes layout: unpack is the exact inverse of pack, and every bit lies where the drawing says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.kernels.layouts import planes
from qcompile.kernels.layouts.planes import BITS, RUN, block_columns, block_elements, pack, row_elements, unpack


@given(
    bits=st.sampled_from(BITS),
    n=st.integers(1, 40),
    k=st.integers(1, 700),
    group=st.sampled_from([0, 1, 7, 16, 32, 48, 64, 128, 500]),
    zero=st.sampled_from(["none", "codes", "shift"]),
    seed=st.integers(0, 1000),
)
def test_unpack_gives_back_what_was_packed(bits: int, n: int, k: int, group: int, zero: str, seed: int) -> None:
    torch.manual_seed(seed)
    groups = planes.group_count(k, group)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.randn(n, groups).to(torch.float16)
    z = {"none": None, "codes": torch.randint(0, 256, (n, groups)).to(torch.uint8), "shift": torch.randn(n, groups).half()}
    packed = pack(codes, scale, z[zero], bits, group)
    got = unpack(packed)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], scale)
    expected = z[zero]
    assert got[2] is None if expected is None else torch.equal(got[2], expected)  # type: ignore[arg-type]
    assert packed.codes.shape == (n, row_elements(k, bits))
    # Every row starts at a multiple of 64 bytes from the first.
    assert packed.codes.stride(0) * 2 % 64 == 0


@pytest.mark.parametrize("bits", BITS)
def test_each_code_lies_where_the_drawing_says(bits: int) -> None:
    k = block_columns(bits) + 70
    codes = torch.randint(0, 2**bits, (3, k), dtype=torch.uint8)
    packed = pack(codes, torch.ones(3, 1), None, bits, 0).codes.to(torch.int32) & 0xFFFF
    for row in range(3):
        for column in range(k):
            block, run, i = column // block_columns(bits), column % block_columns(bits) // RUN, column % RUN
            start = block * block_elements(bits) + i
            if bits != 3:
                code = int(packed[row, start]) >> bits * run & (2**bits - 1)
            else:
                low = int(packed[row, start + RUN * (run % 2)]) >> 2 * (run // 2) & 3
                code = low | (int(packed[row, start + 2 * RUN]) >> run & 1) << 2
            assert code == int(codes[row, column])


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_code_zero(bits: int) -> None:
    codes = torch.full((2, 5), 2**bits - 1, dtype=torch.uint8)
    packed = pack(codes, torch.ones(2, 1), None, bits, 0).codes
    whole = planes.unpack_codes(packed, bits, block_columns(bits))
    assert int(whole[:, 5:].max()) == 0 and int(whole[:, :5].min()) == 2**bits - 1


def test_packed_bytes_are_the_codes_plus_scales() -> None:
    for bits, k in ((8, 512), (4, 512), (3, 512), (2, 512)):
        packed = pack(torch.zeros(64, k, dtype=torch.uint8), torch.ones(64, 4).half(), None, bits, 128)
        assert packed.nbytes == 64 * k * bits // 8 + 64 * 4 * 2


@pytest.mark.parametrize("zero", ["none", "codes", "shift"])
def test_the_decoded_value(zero: str) -> None:
    codes = torch.randint(0, 8, (6, 100), dtype=torch.uint8)
    scale = torch.rand(6, 3) + 0.5
    z = {"none": None, "codes": torch.randint(0, 8, (6, 3), dtype=torch.uint8), "shift": torch.randn(6, 3)}[zero]
    s = scale.repeat_interleave(40, 1)[:, :100]
    if z is None:
        expected = (codes.float() - 4) * s
    elif zero == "codes":
        expected = (codes.float() - z.float().repeat_interleave(40, 1)[:, :100]) * s
    else:
        expected = codes.float() * s + z.repeat_interleave(40, 1)[:, :100]
    assert torch.equal(planes.dequantize(pack(codes, scale, z, 3, 40)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "2, 3, 4 or 8"),
        ({"codes": torch.zeros(4, 8)}, "uint8"),
        ({"codes": torch.full((4, 8), 16, dtype=torch.uint8)}, "does not fit"),
        ({"scale": torch.ones(4, 2)}, "scale must be"),
        ({"scale": torch.ones(4, 1, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ({"zero": torch.ones(4, 2, dtype=torch.uint8)}, "shape of scale"),
        ({"zero": torch.ones(4, 1, dtype=torch.int32)}, "zero must be uint8"),
        ({"group_size": -1}, "group_size"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "codes": torch.zeros(4, 8, dtype=torch.uint8), "scale": torch.ones(4, 1), "zero": None, "bits": 4, "group_size": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pack(**{**given, **change})  # type: ignore[arg-type]


def test_a_packed_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="elements a row"):
        planes.unpack_codes(torch.zeros(2, 32, dtype=torch.int16), 4, 129)
