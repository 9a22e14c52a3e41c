"""qcompile::linear_tiled on every instruction set of the machine, and its reference, against float64."""

from __future__ import annotations

import threading

import pytest
import torch
from oracle import data
from tiled_weights import ACTIVATIONS, KINDS, Weights, error, random_weight
from torch import Tensor

from qcompile.kernels.layouts.tiled import WIDTHS
from qcompile.kernels.ops.linear_tiled import linear_tiled as reference

OP = torch.ops.qcompile.linear_tiled
ROWS = (0, 1, 2, 3, 5, 16, 33, 65)
SHAPES = [(97, 97, 32), (160, 193, 48), (64, 256, 128), (33, 160, 0), (40, 1300, 64), (7, 1, 0), (1, 7, 16)]
# int8 by blocks of 32: half a step of every value is sqrt(32) / 254 of the largest, which an outlier comes close to
NORMAL, QUANTIZED, EXACT = 1e-2, 2.3e-2, 1e-5


def run(w: Weights, x: Tensor, out: int | None = None, bias: Tensor | None = None, **options: object) -> Tensor:
    t = w.tiled
    return OP(x, *w.args, bias, t.bits, t.group_size, out or t.rows, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_any_shape_and_number_of_rows(isa: str, bits: int, kind: str) -> None:
    for n, k, group in SHAPES:
        w = random_weight(n, k, group, bits, kind)
        for m in ROWS:
            normal, outliers = torch.randn(m, k), data(m, k, seed=m)
            typical = NORMAL if n * k > 1000 else QUANTIZED  # of a few values none is typical
            for x, exact, bound in ((normal, False, typical), (outliers, False, QUANTIZED), (outliers, True, EXACT)):
                y = run(w, x, exact=exact)
                assert y.shape == (m, n)
                assert y.dtype == x.dtype
                if m:
                    off = error(y, x.double() @ w.matrix.T, x, w.matrix)
                    assert off <= bound, (n, k, group, m, exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_reference(bits: int, kind: str) -> None:
    for n, k, group in SHAPES:
        w = random_weight(n, k, group, bits, kind)
        x = data(5, k)
        y = reference(x, *w.args, None, bits, group, n)
        assert error(y, x.double() @ w.matrix.T, x, w.matrix) <= EXACT


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_types_of_input_scale_and_bias(isa: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    bound = {torch.float32: EXACT, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for kind in KINDS:
        w = random_weight(45, 130, 64, 4, kind, dtype=scale_dtype)
        for m in (1, 6):
            x = data(m, 130, dtype=dtype)
            for bias in (torch.randn(45), torch.randn(45).to(dtype)):
                expected = x.double() @ w.matrix.T + bias.double()
                off = error(run(w, x, bias=bias, exact=True), expected, x, w.matrix)
                assert off <= bound
                off = error(run(w, x, bias=bias), expected, x, w.matrix)
                assert off <= QUANTIZED + bound


def test_leading_dimensions_and_strides(isa: str) -> None:
    w = random_weight(50, 96, 32, 4)
    expected = None
    x = data(2, 3, 96)
    for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([x, x], -1)[..., :96]):
        y = run(w, view, exact=True)
        assert y.shape == (2, 3, 50)
        assert y.is_contiguous()
        expected = y if expected is None else expected
        assert torch.equal(y, expected)
    assert error(expected, x.double() @ w.matrix.T, x, w.matrix) <= EXACT
    one, row = run(w, x[0, 0], exact=True), x[0, 0].double()[None]  # summed in another order
    assert one.shape == (50,)
    assert error(one[None], row @ w.matrix.T, row, w.matrix) <= EXACT


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(isa: str, activation: str) -> None:
    act = ACTIVATIONS[activation]
    for n in (7, 48):
        w, g = random_weight(n, 64, 32, 4), random_weight(2 * n, 64, 32, 4, glu=True)
        for m in (1, 7):
            x = data(m, 64) / 100  # so that activations are near their bends, not saturated
            bias, mul, add = torch.randn(n), torch.randn(m, n), torch.randn(m, n)
            pre = x.double() @ w.matrix.T + bias
            both = x.double() @ g.matrix.T + torch.cat([bias, add[0]])
            gated = act(both[:, :n]) * both[:, n:]
            for call, expected in (
                ({}, act(pre)),
                ({"mul": mul}, act(pre) * mul),
                ({"add": add}, act(pre) + add),
                ({"mul": mul, "add": add}, act(pre) * mul + add),
            ):
                y = run(w, x, bias=bias, activation=activation, exact=True, **call)
                torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            y = run(g, x, n, torch.cat([bias, add[0]]), activation=activation, glu=True, exact=True)
            torch.testing.assert_close(y.double(), gated, rtol=1e-5, atol=1e-5)
            y = run(g, x, n, torch.cat([bias, add[0]]), activation=activation, glu=True, mul=mul, add=add, exact=True)
            torch.testing.assert_close(y.double(), gated * mul + add, rtol=1e-5, atol=2e-5)
            assert torch.allclose(
                reference(x, *g.args, torch.cat([bias, add[0]]), 4, 32, n, activation, mul, add, True), y, 1e-4, 1e-4
            )


def test_operands_need_not_be_contiguous(isa: str) -> None:
    w, x = random_weight(20, 64, 0, 4), data(5, 64)
    mul, add = torch.randn(20, 5).T, torch.randn(5, 40)[:, ::2]
    y = run(w, x, mul=mul, add=add)
    assert torch.equal(y, run(w, x, mul=mul.contiguous(), add=add.contiguous()))


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_the_same_result_on_any_number_of_threads(isa: str, bits: int) -> None:
    for n, m in ((1000, 1), (1000, 4), (400, 70), (20, 300)):
        w, x = random_weight(n, 512, 128, bits), data(m, 512)
        one = run(w, x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(w, x), one)
        torch.set_num_threads(1)


def test_python_threads_at_once(isa: str) -> None:
    jobs = [(random_weight(96, 256, 64, bits), data(m, 256)) for bits in WIDTHS for m in (1, 5, 40)]
    expected = [run(w, x) for w, x in jobs]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(i for i, (w, x) in enumerate(jobs) if not torch.equal(run(w, x), expected[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", WIDTHS)
def test_what_is_not_finite_shows_in_its_row_only(isa: str, bits: int, bad: float) -> None:
    for kind in KINDS:
        w = random_weight(20, 100, 32, bits, kind)
        for m in (1, 3, 20):
            x = data(m, 100)
            x[m - 1, 97] = bad
            for activation in ("none", "relu", "silu"):
                y = run(w, x, activation=activation)
                assert y[m - 1].isnan().all()
                assert y[: m - 1].isfinite().all()


def test_tiny_and_huge_inputs(isa: str) -> None:
    w = random_weight(20, 64, 0, 4)
    for size in (1e-30, 1e-10, 1e30):
        x = data(3, 64) * size
        assert error(run(w, x), x.double() @ w.matrix.T, x, w.matrix) <= QUANTIZED
    assert torch.equal(run(w, torch.full((1, 64), 1e-40)), torch.zeros(1, 20))  # too small for an int8 scale: 0
    assert torch.equal(run(w, torch.zeros(2, 64)), torch.zeros(2, 20))


def test_rows_beyond_one_piece_of_scratch(isa: str) -> None:
    if isa == "portable":
        pytest.skip("the same driver, at a tenth of the speed")
    w, x = random_weight(3, 65536, 0, 8), torch.randn(300, 65536)
    add = torch.randn(300, 3)
    expected = x.double() @ w.matrix.T + add
    assert error(run(w, x, add=add, exact=True), expected, x, w.matrix) <= EXACT
