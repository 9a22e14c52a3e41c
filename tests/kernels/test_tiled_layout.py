"""The tiled layout: unpack is the exact inverse of pack, and every byte lies where the module says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.kernels.layouts.tiled import BLOCK, TILE, WIDTHS, Geometry, pack, unpack

PARTS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(
    bits=st.sampled_from(WIDTHS),
    parts=PARTS,
    k=st.integers(1, 200),
    group=st.sampled_from([0, 1, 7, 16, 32, 48, 64, 128, 500]),
    zero=st.sampled_from(["none", "codes", "shift"]),
    form=st.sampled_from(["plain", "parts", "glu"]),
    seed=st.integers(0, 1000),
)
def test_unpack_gives_back_what_was_packed(
    bits: int, parts: list[int], k: int, group: int, zero: str, form: str, seed: int
) -> None:
    torch.manual_seed(seed)
    n = 2 * sum(parts) if form == "glu" else sum(parts)
    groups = Geometry.of(k, group).groups
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.randn(n, groups).to(torch.float16)
    z = {"none": None, "codes": torch.randint(0, 256, (n, groups)).to(torch.uint8), "shift": torch.randn(n, groups).half()}
    tiled = pack(codes, scale, z[zero], bits, group, parts if form == "parts" else None, form == "glu")
    got = unpack(tiled)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], scale)
    expected = z[zero]
    assert got[2] is None if expected is None else torch.equal(got[2], expected)  # type: ignore[arg-type]
    geometry = Geometry.of(k, group)
    assert tiled.codes.shape == (len(tiled.scale), geometry.blocks, 64 * bits)
    assert tiled.scale.shape[1:] == (groups, TILE)


#: Where the bits of a code lie that shares its byte with others: chunk -> (cell, bit) of each bit, the lowest first.
SPLIT = {
    3: {6: [(0, 6), (0, 7), (1, 6)], 7: [(1, 7), (2, 6), (2, 7)]},
    5: {
        5: [(0, 5), (0, 6), (0, 7), (1, 5), (1, 6)],
        6: [(1, 7), (2, 5), (2, 6), (2, 7), (3, 5)],
        7: [(3, 6), (3, 7), (4, 5), (4, 6), (4, 7)],
    },
    6: {c: [(3 * (c - 6) + i // 2, 6 + i % 2) for i in range(6)] for c in (6, 7)},
}  # fmt: skip


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_code_lies_where_the_layout_says(bits: int) -> None:
    k, group = 100, 48  # each group is padded to two blocks
    codes = torch.randint(0, 2**bits, (20, k), dtype=torch.uint8)
    tiled = pack(codes, torch.ones(20, 3), None, bits, group)
    for row in range(20):
        for column in range(k):
            padded = column // group * 2 * BLOCK + column % group
            chunk, byte = padded % BLOCK // 4, padded % 4
            whole = [(chunk % bits, chunk // bits * bits + i) for i in range(bits)]
            code = 0
            for i, (cell, bit) in enumerate(SPLIT.get(bits, {}).get(chunk, whole)):
                packed = tiled.codes[row // TILE, padded // BLOCK, 64 * cell + 4 * (row % TILE) + byte]
                code |= (int(packed) >> bit & 1) << i
            assert code == int(codes[row, column])


def test_glu_alternates_gate_and_up_tiles() -> None:
    codes = torch.arange(40, dtype=torch.uint8)[:, None].expand(40, 32).contiguous()
    tiled = pack(codes, torch.ones(40, 1), None, 8, 0, glu=True)
    first = tiled.codes[:, 0, : 4 * TILE : 4]  # column 0 of each row
    assert first[0].tolist() == list(range(16))
    assert first[1].tolist() == list(range(20, 36))
    assert first[2].tolist()[:4] == [16, 17, 18, 19]
    assert first[3].tolist()[:4] == [36, 37, 38, 39]


def test_packed_bytes_are_the_codes_plus_scales() -> None:
    tiled = pack(torch.zeros(64, 256, dtype=torch.uint8), torch.ones(64, 2).half(), None, 4, 128)
    assert tiled.nbytes == 64 * 256 // 2 + 64 * 2 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "2, 3, 4, 5, 6, 8 bits"),
        ({"codes": torch.zeros(4, 8)}, "uint8"),
        ({"codes": torch.full((4, 8), 16, dtype=torch.uint8)}, "does not fit"),
        ({"codes": torch.zeros(4, 0, dtype=torch.uint8)}, "empty"),
        ({"scale": torch.ones(4, 2)}, "scale must be"),
        ({"scale": torch.ones(4, 1, dtype=torch.float64)}, "float32, float16"),
        ({"zero": torch.zeros(4, 2, dtype=torch.uint8)}, "shape of scale"),
        ({"zero": torch.zeros(4, 1).half()}, "zero must be"),
        ({"group_size": -1}, "group_size"),
        ({"parts": [1, 2]}, "add up"),
        ({"parts": [4, 0]}, "positive"),
        ({"parts": [4], "glu": True}, "glu"),
        (
            {"codes": torch.zeros(3, 8, dtype=torch.uint8), "scale": torch.ones(3, 1), "glu": True},
            "as many gate as up",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given_: dict[str, object] = {
        "codes": torch.zeros(4, 8, dtype=torch.uint8), "scale": torch.ones(4, 1), "zero": None, "bits": 4, "group_size": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pack(**{**given_, **change})  # type: ignore[arg-type]
