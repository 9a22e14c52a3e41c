"""The CPU's operators and what lies between them become one call, in an order that keeps every result and every write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import error, operators, program_of, quantize, tensors, verified
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.export import aot_compile_exported, lowered
from qcompile.options import Options
from qcompile.passes.gather_sequences import GatherSequences
from qcompile.passes.held import HELD, INPUT
from qcompile.passes.pipeline import run
from qcompile.passes.program import Program

qc = torch.ops.qcompile


def both(
    model: nn.Module, *inputs: Any, inference: bool = True, **options: Any
) -> tuple[list[Tensor], list[Tensor], Program]:
    """Results and what inputs and buffers hold afterwards, without the pass and with it; and the program."""
    model = model.eval().requires_grad_(False)
    found = []
    for gather in (False, True):
        program = program_of(model, *inputs)
        parsed = Options.parse({"min_elements": 0, "weights": "qint8"})
        passes = [p for p in parsed.lowering() if gather or not isinstance(p, GatherSequences)]
        run(parsed.quantization(), program, check=True)
        program.inference = inference
        run(passes, program, check=True)
        own = [t.clone() for t in inputs]
        held = [program.constant(n) for n in program.graph.find_nodes(op="placeholder")]
        rest = iter(own)
        flat = [next(rest) if c is None else c.tensor.clone() for c in held]
        with torch.no_grad():
            results = [t.clone() for t in tensors(program.module(*flat))]
        mutated = [t for t, c in zip(flat, held, strict=True) if c is None or c.mutated]
        found.append(results + [t.clone() for t in mutated])
    return found[0], found[1], program


def sequences(program: Program) -> list[list[str]]:
    """The operators of each sequence."""
    from qcompile.kernels.ops.sequence import LARGE, SMALL

    texts = [str(n.args[-1]) for n in program.calls(qc.sequence.default, qc.sequence_writing.default)]
    return [[w for w in text.split() if w in SMALL or w in LARGE] for text in texts]


def alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        x.shape == y.shape and x.stride() == y.stride() and torch.allclose(x, y, 1e-5, 1e-5)
        for x, y in zip(a, b, strict=True)
    )


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 9, 1)
        self.last = nn.Linear(9, 33)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return self.last(y.mean((2, 3)))


def test_convolutions() -> None:
    want, got, program = both(Convolutions(), torch.randn(2, 3, 11, 7))
    assert alike(got, want)
    assert sequences(program) == [["conv_tiled", "conv_depthwise", "conv_tiled"]]
    assert len([d for d in program.decisions if d.quantized and d.kernel]) == 4


class Encoder(nn.Module):
    """Post-norm layers over 19 tokens, too many for chains."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = self.norms[0](x + self.o(y))
            x = self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))
        return x


@pytest.mark.parametrize("rows", [1, 5, 19])
def test_an_encoder_is_one_call(rows: int) -> None:
    model, x = Encoder(), torch.randn(2, rows, 64)
    want, got, program = both(model, x)
    assert error(got, want) < 1e-5
    assert error([got[0].double()], [model.double()(x.double())]) < 0.02
    found = sequences(program)
    assert len(found) == 1 and found[0].count("attention") == 2
    assert all(d.kernel for d in program.decisions if d.quantized)
    assert not program.calls(qc.linear_tiled.default, qc.attention.default)


class Cached(nn.Module):
    """A token over a cache of twelve, its keys turned; what the cache holds is read once more at the end."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.o = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.width = width

    def step(self, x: Tensor, i: int, cache: Tensor, at: Tensor, turn: Tensor) -> Tensor:
        parts = self.qkv[i](x).view(*x.shape[:2], 3, -1, 16).transpose(1, 3).unbind(2)
        q, k, v = parts
        half = torch.cat([-k[..., 8:], k[..., :8]], -1)
        k = k * turn + half * (1 - turn)
        cache[0].index_copy_(2, at, k)
        cache[1].index_copy_(2, at, v)
        seen = torch.arange(12) <= at[-1]
        y = nn.functional.scaled_dot_product_attention(q, cache[0], cache[1], seen[None, None, None])
        return x + self.o[i](y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cache: Tensor, other: Tensor, at: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        x = self.step(x, 0, cache, at, turn)
        x = self.step(x, 1, other, at, turn)
        return x, cache.sum(-1) + other.sum(-1)


def cached(tokens: int) -> tuple[Tensor, ...]:
    at = torch.tensor([3, 5, 4])[:tokens]
    return torch.randn(1, tokens, 64), torch.randn(2, 1, 4, 12, 16), torch.randn(2, 1, 4, 12, 16), at, torch.rand(16)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_cache(tokens: int) -> None:
    want, got, program = both(Cached(), *cached(tokens))
    assert error(got, want) < 1e-5
    found = sequences(program)
    assert sum(steps.count("attention") for steps in found) == 2
    assert sum(steps.count("index_copy_") for steps in found) == 4


class Between(nn.Module):
    """``middle`` between linears that would be one sequence."""

    def __init__(self, middle: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        self.middle = middle
        self.register_buffer("kept", torch.randn(20, 64))

    def forward(self, x: Tensor) -> Any:
        y = self.b(nn.functional.softplus(self.a(x)) * 0 + self.a(x))
        z = self.middle(y, self.kept)
        return self.d(self.c(z)), y


MIDDLES: dict[str, Callable[..., Any]] = {
    "nothing": lambda y, kept: y,
    "views": lambda y, kept: y.view(4, 5, 64).transpose(0, 1).reshape(20, 64),
    "a loop of Inductor's": lambda y, kept: torch.sin(y),
    "what torch leaves out": lambda y, kept: torch.cat([torch.empty(0), y * 2], 0),
    "numbers": lambda y, kept: (y * 0.5 + 1) - y,
}


@pytest.mark.parametrize("name", MIDDLES)
def test_what_lies_between(name: str) -> None:
    want, got, program = both(Between(MIDDLES[name]), torch.randn(20, 64))
    assert alike(got, want)
    assert sequences(program)


@pytest.mark.parametrize(
    "write", [lambda kept, y: kept.copy_(y), lambda kept, y: kept.add_(y), lambda kept, y: kept[2:4].mul_(y[2:4])]
)
@pytest.mark.parametrize("first", [False, True])
def test_writes_keep_their_place(write: Callable[..., Any], first: bool) -> None:
    """What is read before a write is what was there, what is read after it is what was written."""

    def middle(y: Tensor, kept: Tensor) -> Tensor:
        before = kept * 1 if first else y
        write(kept, y)
        return before + kept

    want, got, program = both(Between(middle), torch.randn(20, 64))
    assert alike(got, want)
    assert sequences(program)


def test_training_and_unknown_sizes_are_left_alone() -> None:
    _, _, program = both(Convolutions(), torch.randn(2, 3, 11, 7), inference=False)
    assert sequences(program) == []
    outcome = quantize(Encoder().eval().requires_grad_(False), torch.randn(1, 5, 64), dynamic_shapes=({1: Dim("length")},))
    with verified():
        low = lowered(outcome.qep, Options())
    assert not any("sequence" in name for name in operators(low.graph_module))


class Random(nn.Module):
    """Linears, views, little arithmetic, writes and operators that stay outside, as a list of numbers says."""

    def __init__(self, plan: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.plan = plan
        self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.register_buffer("kept", torch.linspace(-1, 1, 4 * 32).view(4, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for kind, a, b in self.plan:
            p, q = values[a % len(values)], values[b % len(values)]
            if kind < 4:
                values.append(self.linears[kind % 3](p))
            elif kind == 4:
                values.append(p + q)
            elif kind == 5:
                values.append(torch.cat([-q[:, 16:], p[:, :16]], 1))
            elif kind == 6:
                values.append(torch.tanh(p))
            elif kind == 7:
                self.kept.index_copy_(0, torch.tensor([a % 4]), q[:1])
                values.append(p * self.kept[b % 4])
            elif kind == 8:
                self.kept.mul_(0.5)
            elif kind == 9:
                values.append((self.kept + q).view(2, 2, 32).transpose(0, 1).reshape(4, 32))
            else:
                values.append(nn.functional.layer_norm(p, (32,), self.linears[0].bias))
        return tuple(values[-3:])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 20), st.integers(0, 20)), min_size=4, max_size=16))
def test_any_order(plan: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    want, got, _ = both(Random(plan), torch.randn(4, 32))
    assert error(got, want) < 1e-4


def holding(model: nn.Module, *inputs: Any) -> tuple[list[Tensor], bool]:
    """Results and what the buffers hold afterwards, where a front end lets the program hold them; and whether it does."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    program = program_of(model, *inputs)
    own = {}
    for i, node in enumerate(program.graph.find_nodes(op="placeholder")):
        constant = program.constant(node)
        if constant is not None and constant.mutated:
            own[node.name] = constant.tensor = constant.tensor.clone()
            node.meta |= {HELD: constant.tensor, INPUT: i}
    parsed = Options.parse({"min_elements": 0, "weights": "qint8"})
    run([*parsed.quantization(), *parsed.lowering()], program, check=True)
    rest = iter([t.clone() for t in inputs])
    held = [program.constant(n) for n in program.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        results = [t.clone() for t in tensors(program.module(*[next(rest) if c is None else c.tensor for c in held]))]
    return [*results, *own.values(), *inputs], any(c.holds for c in program.constants.values())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 20), st.integers(0, 20)), min_size=4, max_size=16))
def test_any_order_of_what_is_held(plan: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    model, x = Random(plan), torch.randn(4, 32)
    want, _, _ = both(model, x)
    got, _ = holding(model, x)
    assert error(got, want) < 1e-4


class Counting(nn.Module):
    """Two caches, each with how far it is filled; the second one is also looked at from outside, if asked for."""

    def __init__(self, look: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        for name in ("first", "second"):
            self.register_buffer(name, torch.randn(8, 32))
            self.register_buffer(f"{name}_length", torch.tensor([3]))
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        for i, name in enumerate(("first", "second")):
            cache, length = getattr(self, name), getattr(self, f"{name}_length")
            y = self.linears[2 * i](x)
            cache.index_copy_(0, torch.arange(2) + length, y)
            length.add_(2)
            x = self.linears[2 * i + 1](x + cache[3:5])
        return x + torch.sin(self.second).mean() if self.look else x


@pytest.mark.parametrize("look", [False, True])
def test_counts_are_held_with_their_caches(look: bool) -> None:
    torch.manual_seed(0)
    model, x = Counting(look), torch.randn(2, 32)
    want, _, program = both(model, x)
    got, held = holding(model, x)
    assert error(got, want) < 1e-5 and held
    assert [w for w in sequences(program)[0] if w in ("arange", "add", "add_", "index_copy_")].count("index_copy_") == 2


def test_rotations_are_one_step() -> None:
    _, _, program = both(Cached(), *cached(1))
    (steps,) = sequences(program)
    assert steps.count("rotate") == 2 and "neg" not in steps and "cat" not in steps


def test_what_only_looks_like_a_rotation() -> None:
    def other(kind: str, y: Tensor) -> Tensor:
        low, high = y[..., :32], y[..., 32:]
        halves = {"swapped": [low, -high], "narrow": [-y[..., 32:48], y[..., :48]], "plain": [high, low]}
        half = torch.cat(halves.get(kind, [-high, low]), -1) * 0.5
        return y * 2.0 + (half + half if kind == "read twice" else half)

    for kind in ("swapped", "narrow", "plain", "read twice", "numbers"):
        want, got, program = both(Between(lambda y, kept, kind=kind: other(kind, y)), torch.randn(20, 64))
        assert alike(got, want)
        assert not any("rotate" in steps for steps in sequences(program)), kind


def test_a_lowered_program_is_saved_and_read(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 11, 7)
    low = lowered(quantize(Convolutions().eval().requires_grad_(False), x, weights="qint8").qep)
    again = qcompile.load(qcompile.save(low, tmp_path / "saved"))
    assert operators(again.graph_module)["qcompile.sequence"] == 1
    assert torch.equal(again.module()(x), low.module()(x))


def test_a_package_writes_to_its_caches(tmp_path: Path) -> None:
    model, given = Cached().eval().requires_grad_(False), cached(1)
    qep = quantize(model, *[t.clone() for t in given], weights="qint8").qep
    run = torch._inductor.aoti_load_package(str(aot_compile_exported(qep, tmp_path / "model.pt2")))
    got, want = ([t.clone() for t in given] for _ in range(2))
    with torch.no_grad():
        got, want = [*run(*got), *got], [*model(*want), *want]
    assert error(got, want) < 0.02


def test_a_compiled_model_in_two_threads() -> None:
    """One compiled model, its caches by thread: each gives what it gives alone."""
    model = Cached().eval().requires_grad_(False)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="qcompile", fullgraph=True, options={"min_elements": 0})
    calls = [cached(1) for _ in range(2)]

    def run(call: tuple[Tensor, ...]) -> list[Tensor]:
        own = [t.clone() for t in call]
        with torch.no_grad():
            return [t.clone() for t in (*compiled(*own), *own)]

    want = [run(call) for call in calls]
    for call, results in zip(calls, want, strict=True):
        own = [t.clone().double() if t.is_floating_point() else t.clone() for t in call]
        with torch.no_grad():
            right = [t.to(r.dtype) for t, r in zip([*exact(*own), *own], results, strict=True)]
        assert error(results, right) < 0.03
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if any(not torch.equal(a, b) for a, b in zip(run(calls[i]), want[i], strict=True)):
                wrong.append(i)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert not wrong


class Masked(nn.Module):
    """Three attentions that see by one mask, too large to be a step, with what is no step between them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = (nn.ModuleList(nn.Linear(64, n) for _ in range(3)) for n in (192, 64))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        many = x.shape[1]
        seen = (torch.arange(many)[None] <= torch.arange(many)[:, None] + at)[None, None]
        for qkv, o in zip(self.qkv, self.o, strict=True):
            q, k, v = (t.view(1, many, 4, 16).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, seen)
            x = torch.sin(o(y.transpose(1, 2).flatten(2))) + x
        return x


def test_a_mask_is_computed_once() -> None:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = Masked().eval().requires_grad_(False)
    x, at = torch.randn(1, 160, 64), torch.tensor([0])
    compiled = torch.compile(model, backend="qcompile", options={"min_elements": 0, "weights": "qint8"}, fullgraph=True)
    with torch.no_grad():
        y, (code,) = run_and_get_code(compiled, x, at)
        assert error(y, model(x, at)) < 0.02
    assert code.count("qcompile.sequence.default(") > 1
    assert sum("160, 160)" in line and "empty_strided_cpu" in line for line in code.splitlines()) == 1
