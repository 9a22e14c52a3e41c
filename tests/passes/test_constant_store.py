"""Packed weights that sequences read lie in one piece of memory, and nothing else has changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import program_of, tensors
from torch import Tensor, nn

import qcompile
from qcompile.compiling import cache
from qcompile.kernels import memory
from qcompile.options import Options
from qcompile.passes import constant_store
from qcompile.passes.gather_sequences import GatherSequences
from qcompile.passes.pipeline import run
from qcompile.passes.program import Constant, Program

qc = torch.ops.qcompile


class Deep(nn.Module):
    """Linears with something between them that no chain takes."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * x
        return x


def lowered(model: nn.Module, x: Tensor, memo: dict[Any, Any] | None = None) -> tuple[Program, list[Tensor]]:
    """A program in which nothing was gathered yet, and what it computes."""
    program = program_of(model.eval().requires_grad_(False), x)
    parsed = Options.parse({"min_elements": 0, "weights": "qint4"})
    if memo is not None:
        program.memo = memo
        for constant in program.constants.values():
            constant.identity = ("weight", constant.name)
    run([*parsed.quantization(), *(p for p in parsed.lowering() if not isinstance(p, GatherSequences))], program, check=True)
    return program, called(program, x)


def called(program: Program, x: Tensor) -> list[Tensor]:
    held = (program.constant(n) for n in program.graph.find_nodes(op="placeholder"))
    program.recompile()
    return [t.clone() for t in tensors(program.module(*(x if c is None else c.tensor for c in held)))]


def stores(program: Program, name: str = "packed") -> list[Constant]:
    return [c for c in program.constants.values() if c.name == name]


def packed(program: Program) -> list[Tensor]:
    """What was packed for this program, the tensors themselves."""
    return [c.tensor for c in program.constants.values() if c.index is None]


def test_packed_weights_become_one_input() -> None:
    x = torch.randn(2, 96)
    program, want = lowered(Deep(), x)
    own = packed(program)
    before = [t.clone() for t in own]
    GatherSequences().run(program)
    (store,) = stores(program)
    assert {id(t) for t in store.parts} == {id(t) for t in own}
    assert len({t.untyped_storage().data_ptr() for t in [*own, store.tensor]}) == 1
    assert all(
        torch.equal(a, b) and a.data_ptr() % 256 == store.tensor.data_ptr() % 256 for a, b in zip(own, before, strict=True)
    )
    assert sum(t.nbytes for t in own) <= store.tensor.nbytes < sum(t.nbytes + 256 for t in own)
    (call,) = program.calls(qc.sequence.default)
    assert len(call.args[0]) == 3  # x, the packed weights, the biases  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(called(program, x), want, strict=True))


def test_they_lie_in_the_order_in_which_they_are_read() -> None:
    """And not as nodes happen to be hashed: in another process the program must be the same, to be found in a cache."""
    program, _ = lowered(Deep(12), torch.randn(2, 96))
    own = packed(program)
    GatherSequences().run(program)
    places = [t.data_ptr() for t in own]
    assert len(places) >= 24 and places == sorted(places)


class Mixed(nn.Module):
    """Linears, and vectors of several kinds that sequences read, one of which the program writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(96, 96), nn.Linear(96, 97)
        self.norm = nn.LayerNorm(96)
        self.factor = nn.Parameter(torch.randn(()))
        self.register_buffer("matrix", torch.randn(2, 96))
        self.register_buffer("calls", torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.last(self.norm(self.first(x)) * self.factor * self.calls + self.matrix)


def test_little_constants_are_copied_to_one_place() -> None:
    x = 3 * torch.randn(2, 96)
    program, want = lowered(Mixed(), x)
    own = {c.name: (c.tensor, c.tensor.data_ptr()) for c in program.constants.values() if c.index is not None}
    GatherSequences().run(program)
    (store,) = stores(program, "little")
    assert {c.name for c in program.constants.values()} == {"packed", "little", "matrix", "calls"}
    assert all(t.data_ptr() == place for t, place in own.values())
    names = ("first.bias", "last.bias", "norm.weight", "norm.bias", "factor")
    copied = [own[name][0].detach().reshape(-1) for name in names]
    assert store.tensor.numel() == 256 * (2 + 2 + 2 + 2 + 1)
    lines = [line.view(torch.float32) for line in store.tensor.split(256)]
    assert all(any(torch.equal(line[: len(t)], t[:64]) for line in lines) for t in copied)
    own["calls"][0].sub_(1)  # which the program has added to once
    assert all(torch.equal(a, b) for a, b in zip(called(program, x), want, strict=True))


def test_a_module_is_read_at_each_call(fresh_cache: None) -> None:
    """What the user may write to between two calls, unseen by any version, stays where it is."""
    model, x = Deep().eval(), torch.randn(3, 96)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="qcompile", dynamic=False, options={"weights": "qint8", "min_elements": 0})
        compiled(x)
        for each in (model, changed):
            each.layers[2].bias.data.add_(3)
        want = changed(x)
        assert (compiled(x) - want).norm() <= 0.05 * want.norm()


def test_another_program_finds_them_where_they_are() -> None:
    model, memo = Deep(), {}
    first, _ = lowered(model, torch.randn(20, 96), memo)
    GatherSequences().run(first)
    x = torch.randn(1, 96)
    second, want = lowered(model, x, memo)
    places = {t.data_ptr() for t in packed(second)}
    GatherSequences().run(second)
    (one,), (other,) = stores(first), stores(second)
    assert one.tensor.data_ptr() == other.tensor.data_ptr()
    assert {t.data_ptr() for t in other.parts} == places
    assert all(torch.equal(a, b) for a, b in zip(called(second, x), want, strict=True))


def test_what_another_program_reads_stays_where_it_is() -> None:
    model, memo, x = Deep(), {}, torch.randn(1, 96)
    first, _ = lowered(model, x, memo)  # may be running: it was not gathered
    second, want = lowered(model, x, memo)
    places = [t.data_ptr() for t in packed(second)]
    GatherSequences().run(second)
    assert not stores(second) and [t.data_ptr() for t in packed(first)] == places
    assert all(torch.equal(a, b) for a, b in zip(called(second, x), want, strict=True))


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_models(mode: Any, fresh_cache: None) -> None:
    """Many rows and then one: two graphs of one model, the second made when the first is in use."""
    model = Deep().eval()
    many, one = torch.randn(40, 96), torch.randn(1, 96)
    wanted = [model(x).detach() for x in (many, one, many)]
    compiled = torch.compile(model, backend="qcompile", dynamic=False, options={"weights": "qint8", "min_elements": 0})
    with mode():
        got = [compiled(many), compiled(one), compiled(many)]
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() <= 0.05 * w.norm()
    held = [t for e in cache._entries.values() for t in e.held if t.dtype == torch.uint8]
    assert len({t.untyped_storage().data_ptr() for t in held}) < len(held)


def test_packed_buffers_of_a_module_stay_its_own() -> None:
    model = qcompile.freeze(qcompile.quantize(Deep().eval(), weights="qint8"))
    places = {k: v.data_ptr() for k, v in model.named_buffers()}
    with torch.no_grad():
        x = torch.randn(3, 96)
        want = model(x)
        compiled = torch.compile(model, backend="qcompile", dynamic=False)
        assert torch.allclose(compiled(x), want, 1e-4, 1e-4)
    assert {k: v.data_ptr() for k, v in model.named_buffers()} == places


def test_memory_is_asked_for_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were written to stay small; what lies between constants is zero all the same."""
    tensors = [torch.randn(65), torch.randn(3).half()]
    monkeypatch.setattr(constant_store, "ask_for_large_pages", lambda memory: memory.fill_(7))
    places = [place.zero_() for place in constant_store.places(tensors)]
    whole = torch.empty(0, dtype=torch.uint8).set_(places[0].untyped_storage())
    assert len(whole) == 768 and not whole.any()


def test_large_pages_are_asked_for_within_bounds() -> None:
    assert not memory.ask_for_large_pages(torch.empty(100, dtype=torch.uint8))  # no whole page lies in it
    tensor = torch.empty((5 << 20) + 3, dtype=torch.uint8)
    memory.ask_for_large_pages(tensor)
    assert int(tensor.fill_(7).to(torch.int64).sum()) == 7 * tensor.numel()
