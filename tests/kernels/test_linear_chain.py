"""``linear_chain`` against the single operators, whose results it must repeat, on every instruction set."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from oracle import data
from tiled_weights import FLOAT8, KINDS, Weights, random_float8, random_weight
from torch import Tensor

from qcompile.kernels.ops.linear_chain import Stage, linear_chain, read_stages

OPS = torch.ops.qcompile
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, centered: bool, eps: float) -> Tensor:
    x = x.double()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
    return y if bias is None else y + bias.double()


class Builder:
    """Writes a chain, and computes the same with one operator after the other."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs, self.values = list(inputs), list(inputs)
        self.constants: list[Tensor] = []
        self.numbers: list[int] = []
        self.eps: list[float] = []

    def constant(self, t: Tensor | None) -> int:
        if t is None:
            return -1
        self.constants.append(t)
        return len(self.constants) - 1

    def stage(
        self, source: int, w: Weights, bits: int, group: int, parts: tuple[int, ...], *, norm: Tensor | None = None,
        norm_bias: Tensor | None = None, centered: bool = False, bias: Tensor | None = None, activation: str = "none",
        glu: bool = False, add: int = -1, eps: float = 1e-5,
    ) -> int:  # fmt: skip
        """Append a linear; returns the number of its first value."""
        codes, scale, zero = w.args
        norms, held = ([self.constant(t) for t in ts] for ts in ((norm, norm_bias), (codes, scale, zero, bias)))
        self.numbers += Stage(source, *norms, centered, *held, bits, group, activation, glu, add, parts).numbers()
        self.eps.append(eps)
        x = self.values[source]
        if norm is not None:
            x = normed(x, norm, norm_bias, centered, eps).float()
        if len(parts) > 1:
            made = OPS.linear_tiled_split(x, *w.args, bias, bits, group, list(parts))
        else:
            other = None if add == -1 else self.values[add].to(x.dtype)
            made = [OPS.linear_tiled(x, *w.args, bias, bits, group, parts[0], activation, None, other, glu)]
        first = len(self.values)
        self.values += [y.to(self.inputs[0].dtype) for y in made]
        return first

    def norm(self, source: int, weight: Tensor, bias: Tensor | None, centered: bool = True, eps: float = 1e-5) -> int:
        """Append a norm; returns the number of its value."""
        held = [self.constant(weight), self.constant(bias)]
        x = self.values[source]
        self.numbers += Stage(source, *held, centered, -1, -1, -1, -1, 0, 0, "none", False, -1, (x.shape[-1],)).numbers()
        self.eps.append(eps)
        self.values.append(normed(x, weight, bias, centered, eps).to(x.dtype))
        return len(self.values) - 1

    @property
    def results(self) -> list[int]:
        return list(range(len(self.inputs), len(self.values)))

    def run(self) -> list[Tensor]:
        return OPS.linear_chain(self.inputs, self.constants, self.numbers, self.eps, self.results)

    def compare(self, tolerance: float) -> None:
        for got, want in zip(self.run(), self.values[len(self.inputs) :], strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert float((got.double() - want.double()).norm()) <= tolerance * float(want.double().norm())


def block(m: int, k: int, hidden: int, kind: str = "affine", dtype: torch.dtype = torch.float32, bits: int = 4) -> Builder:
    """What stands between two attentions of a transformer: projection, gated feed-forward, the next three projections."""
    b = Builder(data(m, k).to(dtype), data(m, k).to(dtype))
    scale = 0.02
    ones = torch.rand(k) + 0.5

    def weight(n: int, columns: int, **options: object) -> Weights:
        w = random_weight(n, columns, 32, bits, kind, **options)  # type: ignore[arg-type]
        w.tiled.scale.mul_(scale)
        if w.tiled.zero is not None and w.tiled.zero.dtype != torch.uint8:
            w.tiled.zero.mul_(scale)
        return w

    h = b.stage(0, weight(k, k), bits, 32, (k,), add=1)
    up = weight(2 * hidden, k, glu=True)
    both = torch.randn(2 * hidden) / 9
    g = b.stage(h, up, bits, 32, (hidden,), norm=ones.to(dtype), activation="silu", glu=True, bias=both)
    d = b.stage(g, weight(k, hidden), bits, 32, (k,), add=h, bias=torch.randn(k) / 9)
    parts = (k, 20, 16)
    b.stage(d, weight(sum(parts), k, parts=parts), bits, 32, parts, norm=ones, bias=torch.randn(sum(parts)) / 9)
    return b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_block(isa: str, bits: int, kind: str) -> None:
    for m, k, hidden in [(1, 97, 160), (3, 64, 193), (8, 160, 97), (5, 7, 1)]:
        block(m, k, hidden, kind, bits=bits).compare(2e-3)  # a norm may round a value to the code beside


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(isa: str, dtype: torch.dtype) -> None:
    block(2, 96, 64, dtype=dtype).compare(max(2e-3, 4 * float(torch.finfo(dtype).eps)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 15, 97, 160])
def test_layer_norms(isa: str, k: int, dtype: torch.dtype) -> None:
    """Alone, read by a linear and a sum; and within a linear's stage, with a mean far from zero."""
    b = Builder((data(3, k) + 5).to(dtype), data(3, 48).to(dtype))
    weight, bias = torch.rand(k) + 0.5, torch.randn(k)
    b.stage(0, random_weight(20, k, 32, 4), 4, 32, (20,), norm=weight, norm_bias=bias, centered=True)
    wide = b.norm(1, (torch.rand(48) + 0.5).to(dtype), torch.randn(48).to(dtype))
    b.norm(wide, torch.rand(48) + 0.5, None, centered=False)
    parts = (16, 33)
    w = random_weight(sum(parts), 48, 32, 4, parts=parts)
    b.stage(wide, w, 4, 32, parts, norm=torch.rand(48), norm_bias=torch.randn(48))
    b.stage(wide, random_weight(48, 48, 32, 4), 4, 32, (48,), add=wide)
    b.compare(max(4e-3, 4 * float(torch.finfo(dtype).eps)))


def test_without_norms_every_bit_is_the_same(isa: str) -> None:
    b = Builder(data(4, 97))
    first = b.stage(0, random_weight(64, 97, 32, 4), 4, 32, (64,), activation="gelu")
    b.stage(first, random_weight(33, 64, 0, 8, "symmetric"), 8, 0, (33,), activation="tanh")
    for got, want in zip(b.run(), b.values[1:], strict=True):
        assert torch.equal(got, want)


def test_the_reference_says_the_same(isa: str) -> None:
    b = block(3, 64, 96)
    want = linear_chain(b.inputs, b.constants, b.numbers, b.eps, b.results)
    for got, expected in zip(b.run(), want, strict=True):
        assert float((got - expected).norm()) <= 0.02 * float(expected.norm())  # the reference does not round activations


def test_leading_sizes_views_and_nothing() -> None:
    w = random_weight(48, 64, 32, 4)
    b = Builder(data(64, 6).T.reshape(2, 3, 64).transpose(0, 1))
    b.stage(0, w, 4, 32, (48,), norm=torch.rand(64))
    b.compare(2e-3)
    empty = Builder(torch.randn(0, 64))
    empty.stage(0, w, 4, 32, (48,))
    assert empty.run()[0].shape == (0, 48)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(threads: None, count: int) -> None:
    torch.set_num_threads(count)
    b = block(1, 640, 1280)  # enough work to be shared
    want = b.run()
    for _ in range(20):
        assert all(torch.equal(a, w) for a, w in zip(b.run(), want, strict=True))
    b.compare(2e-3)


def test_called_from_several_threads_at_once() -> None:
    b = block(1, 640, 1280)
    want, wrong = b.run(), []

    def call() -> None:
        for _ in range(10):
            if not all(torch.equal(a, w) for a, w in zip(b.run(), want, strict=True)):
                wrong.append(1)

    workers = [threading.Thread(target=call) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_nan_stays_in_its_row() -> None:
    b = block(3, 64, 96)
    b.inputs[0][1, 3] = float("nan")
    for y in b.run():
        assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()


def good() -> dict[str, object]:
    b = block(2, 64, 96)
    return {"inputs": b.inputs, "constants": b.constants, "stages": b.numbers, "eps": b.eps, "results": b.results}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "there must be an input"),
        ({"eps": []}, "there must be 1..8 stages"),
        ({"eps": [1e-5] * 5}, "ends too early|does not describe"),
        ({"eps": [1e-5] * 3}, "goes on after|describes more"),
        ({"stages": [9]}, "ends too early|no value|does not describe"),
        ({"results": [0]}, "is an input"),
        ({"results": [99]}, "no value 99"),
        ({"inputs": [torch.randn(9, 64), torch.randn(9, 64)]}, "at most 8 rows"),
        ({"inputs": [torch.randn(9, 64), torch.randn(9, 64)]}, "at most 8 rows"),
        ({"inputs": [torch.randn(2, 64), torch.randn(2, 65)]}, "what is added"),
        ({"inputs": [torch.randn(2, 31), torch.randn(2, 64)]}, "codes must be"),
        ({"inputs": [torch.randn(2, 64), torch.randn(2, 64).double()]}, "one dtype"),
        ({"constants": []}, "no constant"),
        ({"stages": [0, -1, -1, 0, -1, -1, -1, -1, 0, 0, 0, 0, -1, 1, 64] * 4}, "must be a norm"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS.linear_chain(**{**good(), **change})


def test_stages_can_be_read_back_and_opcheck() -> None:
    b = block(2, 64, 96)
    stages = list(read_stages(b.numbers, 4))
    assert [s.parts for s in stages] == [(64,), (96,), (64,), (64, 20, 16)] and stages[1].glu
    assert [n for s in stages for n in s.numbers()] == b.numbers
    args = (b.inputs, b.constants, b.numbers, b.eps, b.results)
    torch.library.opcheck(OPS.linear_chain.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("codes", FLOAT8)
def test_float8_codes(isa: str, codes: torch.dtype) -> None:
    for m in (1, 2, 5):
        b = Builder(data(m, 97) / 10)
        h = b.stage(0, random_float8(64, 97, 32, codes), 8, 32, (64,), norm=torch.rand(97) + 0.5, activation="gelu")
        b.stage(h, random_float8(53, 64, 32, codes, parts=(20, 33)), 8, 32, (20, 33))
        b.compare(1e-5)
