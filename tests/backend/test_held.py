"""What compiled programs hold instead of being given it: norms of a model, and caches with an owner."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qcompile.generation import Decoder
from qcompile.kernels.ops import hold as boxes
from qcompile.owned import own

OPTIONS = {"min_elements": 0, "exact": True}


class Layer(nn.Module):
    """Attention and a linear, normed; over a cache, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6)
        self.qkv, self.o = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor, cache: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        seen = None
        if cache is not None and at is not None:
            seen = (torch.arange(cache.shape[2]) <= at)[None, None, None]
            cache.index_copy_(2, at, k)
            at.add_(1)
            k, v = cache, cache
        y = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        return x + self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="qcompile", options={**OPTIONS, **options}, fullgraph=True)


earlier: set[int] = set()


def held() -> list[Tensor]:
    """What boxes hold that were made since the test began."""
    gc.collect()
    return [t for number, box in boxes._boxes.items() if number not in earlier for t in box]


def made() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    earlier.update(boxes._boxes)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_norms_are_held_and_seen_as_they_are() -> None:
    model, x = Model().eval(), torch.randn(2, 5, 64)
    norm, exact = model.layers[1].norm, copy.deepcopy(model)
    run = compiled(model)
    with torch.no_grad():
        assert error(run(x), exact(x)) < 0.02
        assert any(t is norm.weight for t in held())
        # a write that no version counts
        norm.weight.data.mul_(-2)
        exact.layers[1].norm.weight.mul_(-2)
        assert error(run(x), exact(x)) < 0.02
        # other memory
        norm.weight.data = torch.rand(64) + 1
        exact.layers[1].norm.weight.copy_(norm.weight)
        assert error(run(x), exact(x)) < 0.02
        assert made() == 1
        # another parameter
        norm.weight = nn.Parameter(torch.rand(64) - 2)
        exact.layers[1].norm.weight.copy_(norm.weight)
        assert error(run(x), exact(x)) < 0.02
        assert made() == 2


def test_what_receives_gradients_is_not_held() -> None:
    model, x = Model().eval(), torch.randn(2, 5, 64)
    compiled(model)(x).sum().backward()
    assert not held()


def test_a_model_and_what_was_held_of_it_go_together() -> None:
    model = Model().eval()
    gone = weakref.ref(model.layers[0].norm.weight)
    with torch.no_grad():
        run = compiled(model)
        run(torch.randn(1, 3, 64))
    assert held()
    del model, run
    gc.collect()
    assert gone() is None and not held()


class Owner:
    """Runs a model over caches of its own."""

    def __init__(self, model: Model, owning: bool = True) -> None:
        self.model = model
        self.caches = [torch.zeros(1, 4, 8, 16) for _ in model.layers]
        self.lengths = [torch.zeros(1, dtype=torch.int64) for _ in model.layers]
        if owning:
            own(self, (*self.caches, *self.lengths))

    def step(self, x: Tensor) -> Tensor:
        for layer, cache, length in zip(self.model.layers, self.caches, self.lengths, strict=True):
            x = layer(x, cache, length)
        return x


def test_owned_caches_are_held_and_written_to() -> None:
    model = Model().eval()
    exact = Owner(copy.deepcopy(model), owning=False)
    owner = Owner(model)
    run = compiled(owner.step)
    with torch.no_grad():
        for x in torch.randn(4, 1, 1, 64):
            assert error(run(x), exact.step(x)) < 0.02
        assert all(any(t is cache for t in held()) for cache in owner.caches)
        for cache, other in zip(owner.caches, exact.caches, strict=True):
            assert error(cache, other) < 0.02 and cache[0, 0, 4:].eq(0).all()
        assert [int(n) for n in owner.lengths] == [4, 4]
        # emptied by its owner
        for owned in (owner, exact):
            for t in (*owned.caches, *owned.lengths):
                t.zero_()
        x = torch.randn(1, 1, 64)
        assert error(run(x), exact.step(x)) < 0.02
        assert made() == 1


def test_another_cache_is_another_program() -> None:
    model, x = Model().eval(), torch.randn(1, 1, 64)
    owner = Owner(model)
    run = compiled(owner.step, keep_float=True)
    with torch.no_grad():
        first = run(x)
        before = owner.caches[0]
        owner.caches[0] = torch.zeros_like(before)
        owner.lengths[0].zero_()
        owner.caches[1].zero_()
        owner.lengths[1].zero_()
        kept = before.clone()
        assert torch.equal(run(x), first)
        assert made() == 2 and torch.equal(before, kept) and owner.caches[0].any()


def test_caches_go_with_their_owner() -> None:
    model = Model().eval()
    owner = Owner(model)
    gone = [weakref.ref(t) for t in owner.caches]
    with torch.no_grad():
        compiled(owner.step)(torch.randn(1, 1, 64))
    assert any(t is owner.caches[0] for t in held())
    del owner
    gc.collect()
    assert [r() for r in gone] == [None, None]


def test_what_is_read_elsewhere_is_not_held() -> None:
    """A cache that the program also reads outside of its sequences is given to it, in order with all that touches it."""
    model = Model().eval()
    exact, owner = Owner(copy.deepcopy(model), owning=False), Owner(model)

    def look(owned: Owner, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = owned.caches[0].sum()
        y = owned.step(x)
        return y, before, torch.sin(owned.caches[0]).sum() + before

    run = compiled(lambda x: look(owner, x))
    with torch.no_grad():
        for x in torch.randn(3, 1, 1, 64):
            for got, want in zip(run(x), look(exact, x), strict=True):
                assert torch.allclose(got, want, rtol=0.03, atol=0.03)
        assert not any(t is owner.caches[0] for t in held())
        assert any(t is owner.caches[1] for t in held())


def test_memory_that_inputs_share_is_not_held() -> None:
    model = Model().eval()
    both = torch.zeros(2, 1, 4, 8, 16)
    owner, exact = Owner(model, owning=False), Owner(copy.deepcopy(model), owning=False)
    owner.caches = list(both)
    own(owner, (*owner.caches, *owner.lengths))
    run = compiled(owner.step)
    with torch.no_grad():
        for x in torch.randn(2, 1, 1, 64):
            assert error(run(x), exact.step(x)) < 0.02
        assert not any(t is owner.caches[0] for t in held())


def test_a_decoder_lets_its_cache_go() -> None:
    transformers = pytest.importorskip("transformers", reason="generating needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    answers = []
    for _ in range(2):
        decoder = Decoder(model, 24, lambda f: compiled(f, keep_float=True))
        answers.append(torch.cat(list(decoder.stream(torch.tensor([[3, 1, 4]]), 5, chunks=(3,))), 1))
        cache = [t for layer in decoder.cache.layers for t in (layer.keys, layer.values)]
        assert all(any(t is c for t in held()) for c in cache)
        gone = [weakref.ref(t) for t in cache]
        del decoder, cache
        gc.collect()
        assert all(r() is None for r in gone)
    assert torch.equal(*answers)
