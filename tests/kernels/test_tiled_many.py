"""Many rows of x, on activations that int8 holds exactly: what is left is the rounding of float32 sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiled_weights import KINDS, Weights, error, random_weight
from torch import Tensor

from qcompile.kernels.layouts.tiled import WIDTHS, pack

OPS = torch.ops.qcompile
BOUND = 2e-6
ROWS = (21, 33, 45, 130, 300)  # in panels of which some have a row less than the others


def whole(m: int, k: int, group: int) -> Tensor:
    """Whole numbers times a power of two; each block of 32 columns has a 127, so that its scale is that power."""
    x = torch.randint(-126, 127, (m, k)).float()
    size = group if 0 < group < k else k
    for start in range(0, k, size):
        x[:, start : start + size : 32] = 127.0
    return x * 2.0 ** torch.randint(-6, 3, (m, 1))


def call(x: Tensor, w: Weights, n: int, bias: Tensor | None = None, **options: Any) -> Tensor:
    return OPS.linear_tiled(x, *w.args, bias, w.tiled.bits, w.tiled.group_size, n, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_any_shape(isa: str, bits: int, kind: str) -> None:
    for n, k, group in [(97, 160, 32), (40, 1300, 64), (33, 709, 0), (7, 193, 48), (16, 1, 0)]:
        w, bias = random_weight(n, k, group, bits, kind), torch.randn(n)
        for m in ROWS if group == 64 else ROWS[:4]:
            x = whole(m, k, group)
            want = x.double() @ w.matrix.T + bias
            for rounding in ({}, {"per_row": True}):
                y = call(x, w, n, bias, **rounding)
                assert error(y, want, x, w.matrix) <= BOUND, (n, k, group, m, rounding)


@pytest.mark.parametrize("bits", [4, 8])
def test_gates_and_siblings(isa: str, bits: int) -> None:
    for n in (16, 40, 97):
        w, bias, add = random_weight(2 * n, 160, 32, bits, glu=True), torch.randn(2 * n), torch.randn(70, n)
        x = whole(70, 160, 32)
        both = x.double() @ w.matrix.T + bias
        want = both[:, :n].relu() * both[:, n:] + add
        y = call(x, w, n, bias, activation="relu", glu=True, add=add)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    sizes = (40, 5, 16, 33)
    w, bias = random_weight(sum(sizes), 160, 32, bits, parts=sizes), torch.randn(sum(sizes))
    for m in ROWS:
        x = whole(m, 160, 32)
        outputs = OPS.linear_tiled_split(x, *w.args, bias, bits, 32, sizes)
        assert error(torch.cat(outputs, -1), x.double() @ w.matrix.T + bias, x, w.matrix) <= BOUND


@pytest.mark.parametrize("bits", WIDTHS)
def test_any_zero_point(isa: str, bits: int) -> None:
    """A zero point may lie far outside of the codes; not all of them fit what a byte of a weight can be."""
    n, k, group = 40, 256, 64
    codes, scale = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), torch.rand(n, 4) + 0.5
    for most in (2**bits - 1, 127, 255):
        zero = torch.randint(0, most + 1, (n, 4), dtype=torch.uint8)
        matrix = (codes.double() - zero.double().repeat_interleave(group, 1)) * scale.double().repeat_interleave(group, 1)
        w, x = Weights(pack(codes, scale, zero, bits, group), matrix), whole(45, k, group)
        assert error(call(x, w, n), x.double() @ matrix.T, x, matrix) <= BOUND


@pytest.mark.parametrize("bits", WIDTHS)
def test_products_as_large_as_they_get(isa: str, bits: int) -> None:
    """Sums of products must not saturate: the smallest and the largest code meet 127 and -127, in any order."""
    n, k, m = 40, 700, 45
    codes, scale = torch.randint(0, 2, (n, k), dtype=torch.uint8) * (2**bits - 1), torch.rand(n, 1) + 0.5
    codes[0], codes[1] = 0, 2**bits - 1
    x = (torch.randint(0, 2, (m, k)) * 2 - 1) * 127.0
    x[0], x[1], x[2] = 127.0, -127.0, 127.0 - 126.0 * (torch.arange(k) % 2)
    matrix = (codes.double() - 2 ** (bits - 1)) * scale.double()
    w = Weights(pack(codes, scale, None, bits, 0), matrix)
    for rounding in ({}, {"per_row": True}):
        assert error(call(x, w, n, **rounding), x.double() @ matrix.T, x, matrix) <= BOUND, rounding


@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_on_any_number_of_threads(isa: str, bits: int) -> None:
    for n, m in ((400, 70), (16, 300), (48, 131), (650, 330)):  # the last is so large that threads take turns
        w, x = random_weight(n, 512, 128, bits), whole(m, 512, 128)
        one = call(x, w, n)
        assert error(one, x.double() @ w.matrix.T, x, w.matrix) <= BOUND
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(call(x, w, n), one)
        torch.set_num_threads(1)


def test_what_is_not_finite_stays_in_its_row(isa: str) -> None:
    for bits, group, m in [(4, 32, 45), (8, 0, 45), (8, 0, 5)]:
        w, x = random_weight(40, 160, group, bits, "symmetric"), whole(m, 160, group)
        x[3, 133], x[m - 1, 159] = float("nan"), float("inf")
        bad = torch.zeros(m, dtype=torch.bool)
        bad[[3, m - 1]] = True
        for rounding in ({}, {"per_row": True}):
            y = call(x, w, 40, **rounding)
            assert y[bad].isnan().all() and y[~bad].isfinite().all(), (bits, m, rounding)
        bad[m - 1] = False  # a scale that is known says what infinity saturates to
        y = call(x, w, 40, x_scale=torch.tensor(0.5))
        assert y[bad].isnan().all() and y[~bad].isfinite().all(), (bits, m)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_rounded_as_those_of_few_rows_are(isa: str, bits: int) -> None:
    # runs of four blocks, and what is left of a row; among them blocks of zeros, tiny ones, huge ones, and negative peaks
    for k, group in [(417, 0), (256, 64), (160, 48)]:
        w, x = random_weight(40, k, group, bits, "symmetric"), torch.randn(45, k)
        x *= 10.0 ** torch.randint(-3, 4, (45, 1))
        x[3, 32:64] = 0.0
        x[5, 64:96] *= 1e-38
        x[9, 128:] *= 1e30
        x[11, 7] = -100.0
        few = torch.cat([call(x[m : m + 5], w, 40) for m in range(0, 45, 5)])
        difference = (call(x, w, 40) - few).double().norm(dim=1)
        assert (difference <= 1e-6 * (x.double().abs() @ w.matrix.abs().T).norm(dim=1)).all()
    x[8, 70] = float("nan")
    assert call(x, w, 40)[8].isnan().all()
