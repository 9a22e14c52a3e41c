"""``sequence``: programs of operators against the same operators one by one; and programs that are none."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conv_cases import SCHEMES, Case, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import data
from tiled_weights import random_weight
from torch import Tensor

from qcompile.kernels.cpu import build
from qcompile.kernels.ops import _sequence
from qcompile.kernels.ops import sequence as ops
from qcompile.kernels.ops.linear_chain import Stage
from qcompile.kernels.ops.sequence import Kind, Writer

OPS = torch.ops.qcompile
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    build.ensure_loaded()


def dense(tensor: Tensor) -> Kind:
    return Kind.of(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


class Builder:
    """Writes a program, and computes the same in float64 (or by the operator itself) as it goes."""

    def __init__(self, *inputs: Tensor, written: int = 0) -> None:
        self.inputs = list(inputs)
        self.values: list[Tensor] = [t.clone() for t in inputs]
        self.writer = Writer(written, [Kind.of(t) for t in inputs])
        self.written = written

    def step(self, name: str, *arguments: Any, value: Any = None) -> int:
        """A step on values by number; ``value`` is what it must give."""
        made = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
        numbers = self.writer.step(name, arguments, [Kind.of(t) if name == "attention" else dense(t) for t in made])
        self.values += made
        return numbers[0] if numbers else -1

    def view(self, base: int, shown: Tensor) -> int:
        held = self.values[base]
        self.values.append(shown)
        return self.writer.view(base, shown.storage_offset() - held.storage_offset(), Kind.of(shown))

    def check(self, *results: int, tolerance: float) -> str:
        text = self.writer.text([(r, dense(self.values[r])) for r in results])
        assert ops._kinds(text) == ops._read_kinds(text) == tuple(Kind.of(self.values[r].contiguous()) for r in results)
        for run in (self.native, self.reference):
            given = [t.clone() for t in self.inputs]
            for got, r in zip(run(given, text, results), results, strict=True):
                want = self.values[r].double()
                assert got.dtype == self.values[r].dtype and got.is_contiguous()
                assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-9
            for got, want in zip(given, self.values, strict=False):  # inputs: written to, or as they were
                assert (got.double() - want.double()).norm() <= tolerance * want.double().norm() + 1e-9
        return text

    def native(self, given: list[Tensor], text: str, results: tuple[int, ...]) -> list[Tensor]:
        if not self.written:
            return OPS.sequence(given, text)
        out = [torch.full_like(v, float("nan") if v.is_floating_point() else -77) for v in (self.values[r] for r in results)]
        OPS.sequence_writing([*given[: self.written], *out], given[self.written :], text)
        return out

    def reference(self, given: list[Tensor], text: str, results: tuple[int, ...]) -> list[Tensor]:
        if not self.written:
            return ops.sequence(given, text)
        out = [torch.full_like(v, float("nan") if v.is_floating_point() else -77) for v in (self.values[r] for r in results)]
        ops.sequence_writing([*given[: self.written], *out], given[self.written :], text)
        return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 97])
def test_linears_and_what_lies_between(dtype: torch.dtype, rows: int) -> None:
    x, a, b = data(rows, 64).to(dtype), random_weight(96, 64, 32, 4), random_weight(33, 48, 0, 8, "symmetric")
    norm = (torch.rand(96) + 0.5).to(dtype)
    p = Builder(x, *(t for t in a.args if t is not None), *(t for t in b.args if t is not None), norm)
    v = p.values
    first = OPS.linear_tiled(x, *a.args, None, 4, 32, 96, "silu", None, None)
    y = p.step("linear_tiled", 0, 1, 2, 3, None, 4, 32, 96, "silu", None, None, False, False, None, False, value=first)
    normed = torch.nn.functional.rms_norm(v[y].double(), (96,), norm.double(), 1e-5).to(dtype)
    n = p.step("rms_norm", y, 6, 1e-5, value=normed)
    half = p.view(n, v[n][:, 48:])
    other = p.view(n, v[n][:, :48])
    s = p.step("mul", half, other, value=v[half] * v[other])
    t = p.step("add", s, 0.5, value=v[s] + 0.5)
    d = p.step("sub", t, half, value=v[t] - v[half])
    second = OPS.linear_tiled(v[d].contiguous(), *b.args, None, 8, 0, 33)
    z = p.step("linear_tiled", d, 4, 5, None, None, 8, 0, 33, "none", None, None, False, False, None, False, value=second)
    # an activation between two codes may be rounded to the other one
    p.check(z, y, tolerance=max(TOLERANCE[dtype], 2e-3))


def chain(rows: int, out: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[int]]:
    """What a chain reads, in [:, 64:]; its constants; its stages: norm and linear of two parts, a linear of the first."""
    wide = data(rows, 2 * 64).to(dtype)
    a, b = random_weight(96 + 33, 64, 32, 4, parts=(96, 33)), random_weight(out, 96, 0, 8, "symmetric")
    # small enough that both linears' outliers stay within what float16 can say
    norm = ((torch.rand(64) + 0.5) / 64).to(dtype)
    constants = [norm, *(t for t in a.args if t is not None), *b.args[:2], data(out).to(dtype)]
    zero = 3 if a.args[2] is not None else -1
    at = 3 if zero == -1 else 4
    stages = [
        Stage(0, 0, -1, False, 1, 2, zero, -1, 4, 32, "none", False, -1, (96, 33)),
        Stage(1, -1, -1, False, at, at + 1, -1, at + 2, 8, 0, "silu", False, -1, (out,)),
    ]
    return wide, constants, [n for stage in stages for n in stage.numbers()]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "out"), [(1, 97), (8, 4099), (3, 16), (0, 7)])
def test_chains(dtype: torch.dtype, rows: int, out: int) -> None:
    wide, constants, numbers = chain(rows, out, dtype)
    last, second = OPS.linear_chain([wide[:, 64:]], constants, numbers, [1e-5, 0.0], [3, 2])
    p = Builder(wide, *constants)
    half = p.view(0, p.values[0][:, 64:])
    held = list(range(1, 1 + len(constants)))
    # the first part is no result: nobody but the chain sees it
    y = p.step("linear_chain", [half], held, numbers, [1e-5, 0.0], [3, 2], value=[last, second])
    z = p.step("mul", y + 1, 2.0, value=second * 2.0)
    for results, wanted in (((y, z), (last, second * 2.0)), ((z,), (second * 2.0,))):
        # an activation between two codes may be rounded to the other one
        text = p.check(*results, tolerance=max(TOLERANCE[dtype], 2e-2))
        for got, want in zip(OPS.sequence(p.inputs, text), wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("results", "sizes", "said"),
    [
        ([3, 3], (16, 16), "gives a value twice"),
        ([3], (16, 33), "gives 1 values, the program says 2"),
        ([3, 2], (16, 34), "which is not what the program says"),
        ([3, 0], (16, 64), "value 0 is an input"),
        ([3, 4], (16, 64), "there is no value 4"),
    ],
)
def test_chains_that_give_something_else_are_refused(results: list[int], sizes: tuple[int, ...], said: str) -> None:
    wide, constants, numbers = chain(2, 16, torch.float32)
    inputs = [wide[:, 64:].contiguous(), *constants]
    writer = Writer(0, [Kind.of(t) for t in inputs])
    kinds = [Kind(torch.float32, (2, n), (n, 1)) for n in sizes]
    held = list(range(1, 1 + len(constants)))
    writer.step("linear_chain", [[0], held, numbers, [1e-5, 0.0], results], kinds)
    with pytest.raises(RuntimeError, match=said):
        OPS.sequence(inputs, writer.text([(len(inputs), kinds[0])]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_a_cache_is_written_to_and_read(dtype: torch.dtype, index: torch.dtype) -> None:
    keys, values = data(1, 2, 20, 16).to(dtype), data(1, 2, 20, 16, seed=1).to(dtype)
    x, turn = data(1, 1, 4, 16, seed=2).to(dtype), data(16, seed=3).to(dtype)
    at, mask = torch.tensor([7], dtype=index), torch.arange(20) <= 7
    p = Builder(keys, values, x, turn, at, mask[None, None, None], written=2)
    v = p.values
    q = p.view(2, v[2].transpose(1, 2))
    low, high = p.view(2, v[q][..., :8]), p.view(2, v[q][..., 8:])
    n = p.step("neg", high, value=-v[high])
    c = p.step("cat", [n, low], -1, value=torch.cat([v[n], v[low]], -1))
    m = p.step("mul", c, 3, value=v[c] * v[3])
    k = p.view(m, v[m][:, :2])
    p.step("index_copy_", 0, 2, 4, k)
    v[0].index_copy_(2, at.long(), v[k])
    p.step("index_copy_", 1, 2, 4, p.view(c, v[c][:, 2:]))
    v[1].index_copy_(2, at.long(), v[c][:, 2:])
    seen = OPS.attention(v[m], v[0], v[1], mask[None, None, None], 0.25)
    a = p.step("attention", m, 0, 1, 5, 0.25, False, value=seen)
    flat = p.view(a, v[a].transpose(1, 2).reshape(1, 1, 64))
    out = p.step("clone", flat, value=v[flat].reshape(1, 64).clone())
    p.check(out, tolerance=max(TOLERANCE[dtype], 1e-5))
    assert not torch.equal(v[0], keys) and not torch.equal(v[1], values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_little_steps_over_any_strides(dtype: torch.dtype) -> None:
    x, y = data(3, 5, 7, 4).to(dtype), data(7, 1, seed=1).to(dtype)
    p = Builder(x, y, torch.zeros(7, 3, dtype=dtype), written=0)
    v = p.values
    turned = p.view(0, v[0].permute(2, 0, 3, 1)[..., 1:4])  # [7, 3, 4, 3]
    wide = p.view(1, v[1].expand(7, 3)[:, None, None])
    a = p.step("mul", turned, wide, value=v[turned] * v[wide])
    b = p.step("sub", a, turned, value=v[a] - v[turned])
    c = p.step("add", b, -1.5, value=v[b] - 1.5)
    d = p.step("cat", [c, turned, c], 1, value=torch.cat([v[c], v[turned], v[c]], 1))
    p.step("clone", d, value=v[d].reshape(7, 9, 12).clone())  # nobody reads it
    norm = torch.nn.functional.layer_norm
    gain = data(3, seed=4).to(dtype)
    p.inputs.append(gain)
    text = p.writer.text([(d, dense(v[d])), (a, dense(v[a]))])
    got = OPS.sequence([t.clone() for t in p.inputs[:3]], text)
    for g, r in zip(got, (d, a), strict=True):
        assert torch.equal(g, v[r])
    rows = Builder(data(2, 9, 3).to(dtype), gain)
    want = norm(rows.values[0].double(), (3,), gain.double(), gain.double(), 1e-6).to(dtype)
    rows.check(rows.step("layer_norm", 0, 1, 1, 1e-6, value=want), tolerance=TOLERANCE[dtype])


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [2, 32, 194])
def test_rotations(dtype: torch.dtype, width: int) -> None:
    """The first operand of any strides, cosines and sines that broadcast, also along a row."""
    x, cos, sin = data(2, 5, 3, width).to(dtype), data(5, 1, width, seed=1).to(dtype), data(1, seed=2).to(dtype)
    p = Builder(x, cos, sin)
    v = p.values
    y = p.view(0, v[0].transpose(1, 2))  # [2, 3, 5, width]
    c = p.view(1, v[1].transpose(0, 1))  # [1, 5, width]
    a = p.step("rotate", y, c, c, value=turned(v[y], v[c], v[c]).contiguous())
    b = p.step("rotate", a, 2, c, value=turned(v[a], v[2], v[c]).contiguous())
    text = p.check(a, b, tolerance=TOLERANCE[dtype])
    got = OPS.sequence(p.inputs, text)
    assert torch.equal(got[0], v[a]) and torch.equal(got[1], v[b])  # rounded where torch rounds


def test_rotations_of_odd_rows_are_refused() -> None:
    x = data(3, 7)
    writer = Writer(0, [Kind.of(x)])
    text = writer.text([(writer.step("rotate", [0, 0, 0], [Kind.of(x)])[0], Kind.of(x))])
    with pytest.raises(RuntimeError, match="even"):
        OPS.sequence([x], text)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_counts(count: int) -> None:
    one, some = torch.tensor([2**40]), torch.arange(count) - 3
    length = torch.tensor(5)
    p = Builder(length, one, some, written=1)
    v = p.values
    span = p.step("arange", count, value=torch.arange(count))
    a = p.step("add", span, 0, value=v[span] + 5)
    p.step("add_", 0, 3.0)
    v[0] += 3
    p.step("add_", 0, 0)
    v[0] += v[0].clone()
    b = p.step("add", 2, -7.0, value=some - 7)
    c = p.step("add", a, b, value=v[a] + v[b])
    d = p.step("add", 1, 0, value=v[1] + v[0])
    p.check(a, c, d, tolerance=0.0)


def test_counts_of_other_kinds_are_refused() -> None:
    x, y = torch.arange(7), torch.arange(7, dtype=torch.int32)
    for inputs, said in (([x, y], "int64"), ([x, x[:3]], "of 7 elements"), ([x, x.view(7, 1)], "vectors")):
        writer = Writer(0, [Kind.of(t) for t in inputs])
        text = writer.text([(writer.step("add", [0, 1], [Kind.of(x)])[0], Kind.of(x))])
        with pytest.raises(RuntimeError, match=said):
            OPS.sequence(inputs, text)


def in_bytes(*tensors: Tensor) -> tuple[Tensor, list[int]]:
    """Tensors behind one another in bytes, and where each begins."""
    memory = torch.full((sum(-(-t.nbytes // 64) * 64 for t in tensors) + 64,), 0xFF, dtype=torch.uint8)
    starts, at = [], 64
    for t in tensors:
        memory[at : at + t.nbytes].view(t.dtype).copy_(t.reshape(-1))
        starts.append(at)
        at += -(-t.nbytes // 64) * 64
    return memory, starts


@pytest.mark.parametrize("dtype", FLOATS)
def test_constants_lie_in_bytes(dtype: torch.dtype) -> None:
    w = random_weight(33, 97, 32, 4, dtype=torch.float16)
    norm = data(97, seed=1).to(dtype)
    constants = [t for t in w.args if t is not None] + [norm]
    memory, starts = in_bytes(*constants)
    p = Builder(data(3, 97).to(dtype), memory)
    shown = []
    for constant, start in zip(constants, starts, strict=True):
        p.values.append(constant)
        shown.append(p.writer.view(1, start, Kind.of(constant)))
    normed = torch.nn.functional.rms_norm(p.values[0].double(), (97,), norm.double(), 1e-5).to(dtype)
    n = p.step("rms_norm", 0, shown[-1], 1e-5, value=normed)
    y = OPS.linear_tiled(normed, *w.args, None, 4, 32, 33)
    arguments = (*shown[:-1], None, 4, 32, 33, "none", None, None, False, False, None, False)
    p.check(p.step("linear_tiled", n, *arguments, value=y), n, tolerance=max(TOLERANCE[dtype], 2e-3))


@pytest.mark.parametrize(
    ("base", "offset", "kind", "said"),
    [
        (0, 2, Kind(torch.float32, (4,), (1,)), "whole element"),
        (0, 52, Kind(torch.float32, (4,), (1,)), "beyond"),
        (0, 0, Kind(torch.int64, (2, 2), (7, 1)), "beyond"),
        (1, 0, Kind(torch.float16, (4,), (1,)), "bytes"),
    ],
)
def test_views_of_bytes_are_checked(base: int, offset: int, kind: Kind, said: str) -> None:
    inputs = [torch.zeros(64, dtype=torch.uint8), torch.zeros(16)]
    writer = Writer(0, [Kind.of(t) for t in inputs])
    shown = writer.view(base, offset, kind)
    copy = Kind(kind.dtype, (4,), (1,))
    text = writer.text([(writer.step("clone", [shown], [copy])[0], copy)])
    with pytest.raises(RuntimeError, match=said):
        OPS.sequence(inputs, text)
    with pytest.raises(ValueError, match=said):
        ops.sequence(inputs, text)


def test_bytes_that_are_not_aligned_are_refused() -> None:
    memory = torch.zeros(65, dtype=torch.uint8)[1:]
    writer = Writer(0, [Kind.of(memory)])
    shown, copy = writer.view(0, 0, Kind(torch.float32, (4,), (1,))), Kind(torch.float32, (4,), (1,))
    with pytest.raises(RuntimeError, match="aligned"):
        OPS.sequence([memory], writer.text([(writer.step("clone", [shown], [copy])[0], copy)]))


def test_only_the_latest_programs_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sequence, "_MOST_KNOWN", 3)
    monkeypatch.setattr(_sequence, "known_kinds", {})
    monkeypatch.setattr(ops, "known_kinds", _sequence.known_kinds)
    texts = []
    for rows in range(1, 6):
        kind = Kind.of(torch.empty(rows, 2))
        writer = Writer(0, [kind])
        texts.append(writer.text([(writer.step("mul", [0, 2.0], [kind])[0], kind)]))
    assert list(_sequence.known_kinds) == texts[2:]
    assert [ops._kinds(text)[0].sizes for text in texts] == [(rows, 2) for rows in range(1, 6)]


def test_no_values() -> None:
    p = Builder(torch.empty(0, 5), data(5))
    s = p.step("mul", 0, 1, value=torch.empty(0, 5))
    n = p.step("rms_norm", s, 1, 1e-5, value=torch.empty(0, 5))
    p.check(n, s, tolerance=0.0)


def test_inputs_of_other_strides_are_copied_and_written_ones_refused() -> None:
    x, y = data(6, 4), data(6, 4, seed=1)
    p = Builder(x, y)
    s = p.step("add", 0, 1, value=x + y)
    text = p.writer.text([(s, dense(x))])
    assert torch.equal(OPS.sequence([x.t().contiguous().t(), y], text)[0], x + y)
    w = Builder(x, y, written=1)
    w.step("copy_", 0, 1)
    text = w.writer.text([])
    held = x.clone()
    OPS.sequence_writing([held], [y], text)
    assert torch.equal(held, y)
    with pytest.raises(RuntimeError, match="strides"):
        OPS.sequence_writing([x.t().contiguous().t()], [y], text)


def program() -> tuple[list[Tensor], str]:
    """A program with some of everything; the first input is written to."""
    w = random_weight(32, 32, 16, 4)
    x, cache, at = data(2, 32), data(4, 32, seed=1), torch.tensor([1, 3])
    p = Builder(cache, x, *(t for t in w.args if t is not None), at, written=1)
    y = OPS.linear_tiled(x, *w.args, None, 4, 16, 32)
    n = p.step("linear_tiled", 1, 2, 3, 4, None, 4, 16, 32, "none", None, None, False, False, None, False, value=y)
    m = p.view(n, p.values[n][:, 4:20])
    s = p.step("mul", m, m, value=p.values[m] ** 2)
    c = p.step("cat", [s, m], 1, value=torch.cat([p.values[s], p.values[m]], 1))
    p.step("index_copy_", 0, 0, 5, c)
    q = p.view(0, p.values[0].view(1, 4, 2, 16).transpose(1, 2))
    a = p.step("attention", q, q, q, None, 0.1, True, value=OPS.attention(*[p.values[q]] * 3, None, 0.1, True))
    return p.inputs, p.writer.text([(a, dense(p.values[a])), (s, dense(p.values[s]))])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["swap", "number", "word", "cut", "more"]))
def test_a_program_that_is_none_raises_and_nothing_else(seed: int, how: str) -> None:
    """Whatever a word is replaced by: an error, or results of the sizes that the program says."""
    inputs, text = program()
    draw, words = random.Random(seed), text.split()
    at = draw.randrange(len(words))
    if how == "swap":
        words[at] = draw.choice(words)
    elif how == "number":
        words[at] = str(draw.choice([-1, 0, 1, 2, 7, 31, 33, 1 << 20, 1 << 40, -(1 << 62), 1 << 62, 10**30]))
    elif how == "word":
        words[at] = draw.choice(["nan", "float64", "view", "eval", "-", "inf", "''"])
    elif how == "cut":
        words = words[:at]
    else:
        words.insert(at, draw.choice(words))
    written, before = [inputs[0].clone(), torch.empty(1, 2, 4, 16), torch.empty(2, 16)], [t.clone() for t in inputs]
    try:
        OPS.sequence_writing(written, inputs[1:], " ".join(words))
    except (RuntimeError, MemoryError) as error:  # some numbers ask for more memory than there is
        assert "qcompile::" in str(error) or "alloc" in str(error)
    assert all(torch.equal(a, b) for a, b in zip(inputs[1:], before[1:], strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.replace("1 1 6 ", "2 1 6 ", 1), "version"),
        (lambda w: w.replace("index_copy_ 0 0", "index_copy_ 0 1"), "only read"),
        (lambda w: w.replace("mul", "pow"), "no operator"),
        (lambda w: w.replace("view 6 4", "view 6 49"), "beyond"),
        (lambda w: w.replace("view 6 4", "view 99 4"), "no value"),
        (lambda w: w + " 1", "goes on"),
    ],
)
def test_what_is_wrong_is_said(change: Any, said: str) -> None:
    inputs, text = program()
    assert change(text) != text
    written = [inputs[0].clone(), torch.empty(1, 2, 4, 16), torch.empty(2, 16)]
    with pytest.raises(RuntimeError, match=said):
        OPS.sequence_writing(written, inputs[1:], change(text))
    with pytest.raises(RuntimeError, match="takes"):
        OPS.sequence_writing(written, inputs[2:], text)
    with pytest.raises(RuntimeError, match="not what the program says"):
        OPS.sequence_writing(written, [inputs[1].double(), *inputs[2:]], text)


def test_indices_are_checked_before_anything_is_written() -> None:
    inputs, text = program()
    cache = inputs[0].clone()
    inputs[-1] = torch.tensor([1, 4])
    with pytest.raises(RuntimeError, match="out of range"):
        OPS.sequence_writing([cache, torch.empty(1, 2, 4, 16), torch.empty(2, 16)], inputs[1:], text)
    assert torch.equal(cache, inputs[0])


def test_threads() -> None:
    """Several threads run programs, each on memory of its own."""
    inputs, text = program()
    wrong: list[int] = []

    def run(number: int) -> None:
        x = inputs[1] * (number + 1)
        results = []
        for _ in range(40):
            written = [inputs[0].clone(), torch.empty(1, 2, 4, 16), torch.empty(2, 16)]
            OPS.sequence_writing(written, [x, *inputs[2:]], text)
            results.append(written)
        if any(not torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True)):
            wrong.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert not wrong


def test_opcheck() -> None:
    inputs, text = program()
    written = [inputs[0].clone(), torch.empty(1, 2, 4, 16), torch.empty(2, 16)]
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.sequence_writing.default, (written, inputs[1:], text), test_utils=utils)
    p = Builder(data(3, 4), data(4))
    s = p.step("add", 0, 1, value=p.values[0] + p.values[1])
    torch.library.opcheck(OPS.sequence.default, (p.inputs, p.writer.text([(s, dense(p.values[s]))])), test_utils=utils)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("size", [9, 41])
def test_convolutions_of_images_that_lie_otherwise(size: int, depthwise: bool) -> None:
    """x and the residual have their channels apart: the step copies them. A large result is memory of torch."""
    case = Case(24, (size, size), 24, (3, 3), before=(1, 1), after=(1, 1), groups=24 if depthwise else 1)
    conv = packed(case, SCHEMES[0], depthwise=depthwise)
    x, add, bias = data(2, 24, size, size), data(2, 24, size, size, seed=1), torch.randn(24)
    arguments = conv.arguments(x, bias, add=add)
    inputs = [a for a in arguments if isinstance(a, Tensor)]
    numbers = iter(range(len(inputs)))
    wanted = conv.call(x, bias, add=add)
    writer = Writer(0, [Kind.of(t) for t in inputs])
    name = "conv_depthwise" if depthwise else "conv_tiled"
    given = [next(numbers) if isinstance(a, Tensor) else a for a in arguments]
    (made,) = writer.step(name, given, [Kind.of(wanted)])
    text = writer.text([(made, Kind.of(wanted))])
    for _ in range(2):
        (got,) = OPS.sequence(inputs, text)
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()
