"""``qcompile.trace``: a call on fake tensors becomes a program; where it cannot, torch.compile follows the code."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import qcompile
from qcompile import history

OPTIONS: dict[str, Any] = {"weights": "qint8", "min_elements": 0}


class Mlp(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 97), nn.Linear(97, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def close(got: Tensor, want: Tensor, tolerance: float = 0.02) -> bool:
    return got.shape == want.shape and bool((got.double() - want.double()).norm() <= tolerance * want.double().norm())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.WARNING, logger="qcompile.traced")
    return lambda: " ".join(r.getMessage() for r in caplog.records if r.name == "qcompile.traced")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each program that Inductor is given; it is run as it is, without waiting for a C++ compiler."""
    made: list[int] = []

    def run(module: torch.fx.GraphModule, inputs: Any, config_patches: Any) -> torch.fx.GraphModule:
        # Fake tensors of known sizes: of real ones Inductor makes sizes that may change, and slower code.
        assert all(isinstance(t, FakeTensor) and all(type(n) is int for n in t.shape) for t in inputs)
        made.append(len(inputs))
        return torch.fx.GraphModule(module, module.graph)  # a copy: the graph that was handed over is let go

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", run)
    return made


def test_the_program_is_that_of_torch_compile(said: Callable[[], str]) -> None:
    torch._dynamo.reset()
    model, x = Mlp().eval(), torch.randn(7, 64)
    model.up.weight.data[3, 5] = 9.0  # an outlier
    want = model(x).detach()
    traced, followed = qcompile.trace(model, **OPTIONS), torch.compile(model, backend="qcompile", options=OPTIONS)
    got = traced(x)
    with torch.no_grad():
        assert torch.equal(got, followed(x))
    assert close(got, want) and not got.requires_grad and not said()
    assert torch.isnan(model.up.weight).all() and not torch.isnan(model.norm.weight).any()  # one copy of the weights, coded
    with pytest.raises(RuntimeError):
        model.load_state_dict(Mlp().state_dict())


def test_the_report_has_its_names(calls: list[int]) -> None:
    model = nn.ModuleDict({"a": Mlp(), "b": nn.Sequential(Mlp(), nn.Linear(64, 33))}).eval()

    def both(x: Tensor) -> Tensor:
        return model["b"](model["a"](x))

    qcompile.trace(both, exclude=["b.1.*"], **OPTIONS)(torch.randn(3, 64))
    rows = {d.weight: d for g in history.graphs(model) for d in g.decisions}
    assert set(rows) == {"a.up.weight", "a.down.weight", "b.0.up.weight", "b.0.down.weight", "b.1.weight"}
    assert {w for w, d in rows.items() if not d.quantized} == {"b.1.weight"}
    assert "exclude" in (rows["b.1.weight"].reason or "")
    assert rows["b.0.up.weight"].module == "b.0.up" and rows["a.down.weight"].module == "a.down"
    assert [g.label for g in history.graphs(model)] == ["both"]


def test_a_program_for_each_kind_of_arguments(calls: list[int]) -> None:
    def function(x: Tensor, by: dict[str, Tensor], *, turn: bool = False) -> tuple[Tensor, dict[str, Any]]:
        y = linear(x) * by["by"]
        return (y.neg() if turn else y), {"turned": turn, "rows": x.shape[0], "x": x}

    linear = nn.Linear(64, 16)
    traced = qcompile.trace(function, keep_float=True, **OPTIONS)
    for rows, turn in ((1, False), (3, False), (3, True), (0, False)):
        for _ in range(2):
            x, by = torch.randn(rows, 64), torch.rand(1) + 0.5
            y, rest = traced(x, {"by": by}, turn=turn)
            want, other = function(x, {"by": by}, turn=turn)
            assert close(y, want) and rest == {**other, "x": rest["x"]} and torch.equal(rest["x"], x)
    assert len(calls) == 4
    wide = torch.randn(3, 128)
    assert close(traced(wide[:, ::2], {"by": by})[0], function(wide[:, ::2], {"by": by})[0]) and len(calls) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inference", [False, True])
def test_dtypes_and_inference_mode(dtype: torch.dtype, inference: bool) -> None:
    model = Mlp(96).eval().to(dtype)
    x = torch.randn(5, 96, dtype=dtype)
    want = model(x).detach()
    traced = qcompile.trace(model, **OPTIONS)
    for _ in range(2):
        with torch.inference_mode(inference):
            assert close(traced(x.clone()), want)


def test_what_is_replaced_or_written_is_seen(calls: list[int]) -> None:
    model, x = Mlp().eval(), torch.randn(3, 64)
    traced = qcompile.trace(model, keep_float=True, **OPTIONS)

    def right() -> bool:
        return close(traced(x), model(x))

    assert right() and right() and len(calls) == 1
    model.norm.weight.data.mul_(3)  # read at each call
    assert right() and len(calls) == 1
    model.up.weight = nn.Parameter(torch.randn(97, 64))
    assert right() and len(calls) == 2
    model.down.weight.data = torch.randn(64, 97)
    assert right() and len(calls) == 3
    with torch.no_grad():
        model.down.weight.mul_(-2)
    assert right() and len(calls) == 4
    model.up = nn.Linear(64, 97)
    del model.norm
    model.norm = nn.LayerNorm(64)
    assert right() and right() and len(calls) == 5


def test_released_weights_that_are_given_back_are_seen(calls: list[int]) -> None:
    model, x = Mlp().eval(), torch.randn(3, 64)
    floats = {k: v.clone() for k, v in model.state_dict().items()}
    traced = qcompile.trace(model, **OPTIONS)
    first = traced(x)
    assert torch.isnan(model.up.weight).all()
    other = Mlp().eval()
    for name, p in model.named_parameters():
        p.data = other.state_dict()[name].clone()
    assert close(traced(x), other(x)) and len(calls) == 2
    for name, p in model.named_parameters():
        p.data = floats[name].clone()
    assert torch.equal(traced(x), first) and len(calls) == 3


class Cache:
    """What a model writes to at each call."""

    def __init__(self) -> None:
        self.seen, self.filled = torch.zeros(8, 16), torch.zeros((), dtype=torch.long)


def test_what_it_writes_to_is_written_to() -> None:
    linear, cache = nn.Linear(64, 16), Cache()

    def step(x: Tensor) -> Tensor:
        cache.seen.index_copy_(0, cache.filled[None], linear(x))
        cache.filled.add_(1)
        return cache.seen.sum(0)

    x = torch.randn(5, 1, 64)
    rows = linear(x[:, 0]).detach()
    traced = qcompile.trace(step, **OPTIONS)
    for i in range(5):
        got = traced(x[i])
        assert close(got, rows[: i + 1].sum(0)) and int(cache.filled) == i + 1
    assert close(cache.seen[:5], rows) and not cache.seen[5:].any()
    cache.seen.zero_()
    cache.filled.zero_()
    assert close(traced(x[2]), rows[2])
    cache.seen, cache.filled = torch.zeros(8, 16), torch.zeros((), dtype=torch.long)  # others
    assert close(traced(x[3]), rows[3]) and close(cache.seen[0], rows[3])


class Counting(nn.Module):
    """Counts its calls in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.log = nn.Linear(64, 16), 0, ["made"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append("called")
        return self.linear(x) * self.calls


def test_state_in_python_is_left_to_torch_compile(said: Callable[[], str]) -> None:
    torch._dynamo.reset()
    model, x = Counting().eval(), torch.randn(3, 64)
    once = model.linear(x).detach()
    traced = qcompile.trace(model, **OPTIONS)
    for i in (1, 2, 3):
        assert close(traced(x), once * i) and model.calls == i
    assert model.log == ["made", *["called"] * 3]
    assert "leaves something else in calls, log, which" in said() and "torch.compile follows its code" in said()


def test_an_error_of_its_own_is_raised_and_leaves_nothing_behind() -> None:
    torch._dynamo.reset()
    model = Counting().eval()
    traced = qcompile.trace(model, **OPTIONS)
    with pytest.raises(Exception, match=r"shapes|mat1|reduction dim"):
        traced(torch.randn(3, 65))
    assert model.calls == 0 and model.log == ["made"]
    x = torch.randn(3, 64)
    want = model.linear(x).detach()
    assert close(traced(x), want) and model.calls == 1


SCALE = torch.tensor(2.0)


class Looking(nn.Module):
    """Does what values say."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(64, 16), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (self.gain if x.shape[0] > 2 else SCALE)


@pytest.mark.parametrize("rows", [2, 3])
def test_tensors_that_nobody_can_watch_are_left_to_torch_compile(rows: int, said: Callable[[], str]) -> None:
    torch._dynamo.reset()
    model, x = Looking().eval(), torch.randn(rows, 64)
    want = model(x).detach()
    assert close(qcompile.trace(model, **OPTIONS)(x), want)
    assert ("kept where nobody looks" in said()) == (rows == 2)


def test_values_are_not_looked_at(said: Callable[[], str]) -> None:
    torch._dynamo.reset()
    linear = nn.Linear(64, 16)

    def function(x: Tensor) -> Tensor:
        return linear(x) if bool(x.sum() > 0) else -linear(x)

    with pytest.raises(Exception, match=r"[Dd]ata-dependent"):  # neither can torch.compile without breaking the graph
        qcompile.trace(function, **OPTIONS)(torch.randn(3, 64))
    assert "cannot call it on fake tensors" in said()


def test_the_same_state_assigned_again_is_no_state(said: Callable[[], str], calls: list[int]) -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 16)
            self.register_buffer("table", torch.randn(16), persistent=False)
            self.last: Any = (1, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.table = self.table.to(x.dtype)
            return self.linear(x) + self.table

    model, x = Moving().eval(), torch.randn(3, 64)
    table = model.table
    traced = qcompile.trace(model, keep_float=True, **OPTIONS)
    assert close(traced(x), model(x)) and not said() and len(calls) == 1 and model.table is table


def test_vmap_and_autocast(said: Callable[[], str]) -> None:
    torch._dynamo.reset()
    linear, other = nn.Linear(64, 16), torch.randn(16)

    def mapped(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: linear(row) * row.sum() + other)(x)

    x = torch.randn(5, 64)
    assert close(qcompile.trace(mapped, keep_float=True, **OPTIONS)(x), mapped(x)) and not said()

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x)
        return y.float() + linear(x)

    assert close(qcompile.trace(cast, keep_float=True, **OPTIONS)(x), cast(x)) and not said()
    traced = qcompile.trace(linear, keep_float=True, **OPTIONS)
    assert traced(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert traced(x).dtype == torch.bfloat16
    assert traced(x).dtype == torch.float32


def test_tied_weights_have_both_names(calls: list[int]) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(97, 64), nn.Linear(64, 97, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    for exclude in ("head.weight", "embed.weight"):
        model = Tied().eval()
        tokens = torch.tensor([[3, 5]])
        want = model(tokens).detach()
        assert torch.equal(qcompile.trace(model, exclude=exclude, **OPTIONS)(tokens), want)
    model = Tied().eval()
    want = model(tokens).detach()
    assert close(qcompile.trace(model, **OPTIONS)(tokens), want)


@pytest.mark.parametrize("activations", [None, "qint8"])
def test_modules_that_were_quantized_eagerly(activations: str | None, said: Callable[[], str]) -> None:
    torch._dynamo.reset()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
            self.depth, self.head = nn.Conv2d(32, 32, 3, groups=32), nn.Linear(32, 97)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.depth(torch.relu(self.norm(self.conv(x))))).mean((2, 3)))

    for calibrated in (False, True):  # the second time nothing of the first is left over
        model, x = Net().eval(), torch.randn(2, 3, 24, 24)
        want = model(x).detach()
        model = qcompile.quantize(model, activations=activations, **OPTIONS)
        if activations and calibrated:
            model = qcompile.calibrate(model, [x])
        model = qcompile.freeze(model)
        with torch.no_grad():
            model(x)  # keeps a convolution's weight packed, where that pays
            got = qcompile.trace(model)(x)
            assert close(got, want) and torch.equal(got, torch.compile(model, backend="qcompile")(x))
    assert not said()


def test_partials_methods_and_defaults(calls: list[int]) -> None:
    model, x = Mlp().eval(), torch.randn(3, 64)
    want = model(x).detach()

    def through(module: nn.Module, x: Tensor, by: Tensor = SCALE) -> Tensor:
        return module(x) * by

    for function, times in ((functools.partial(through, model), 2.0), (model.forward, 1.0)):
        assert close(qcompile.trace(function, keep_float=True, **OPTIONS)(x), want * times)


def test_arguments_that_share_memory_are_another_kind(calls: list[int]) -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return linear(b)

    linear, a, b = nn.Linear(64, 16), torch.randn(3, 64), torch.randn(3, 64)
    traced = qcompile.trace(function, keep_float=True, **OPTIONS)
    assert close(traced(a.clone(), b.clone()), linear(b)) and close(traced(both := a.clone(), both), linear(a + 1))
    assert len(calls) == 2


def test_several_threads_compile_once(calls: list[int]) -> None:
    model, x = Mlp().eval(), torch.randn(3, 64)
    want = model(x).detach()
    traced, found = qcompile.trace(model, **OPTIONS), []
    threads = [threading.Thread(target=lambda: found.append(traced(x))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1 and len(found) == 4 and all(close(got, want) for got in found)


def test_another_thread_that_compiles_changes_nothing(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Mlp().eval(), torch.randn(3, 64)
    traced = qcompile.trace(model, **OPTIONS)
    want = traced(x)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.equal(traced(x), want) and not torch.isnan(want).any()


def test_numbers_are_told_apart_by_their_bits(calls: list[int]) -> None:
    linear, x = nn.Linear(64, 16), torch.randn(3, 64)
    traced = qcompile.trace(lambda x, by: 1 / (by - linear(x).abs() * 0), keep_float=True, **OPTIONS)
    assert torch.isposinf(traced(x, 0.0)).all() and torch.isneginf(traced(x, -0.0)).all() and len(calls) == 2


def test_within_torch_compile_and_export_it_is_the_function() -> None:
    torch._dynamo.reset()
    model, x = Mlp().eval(), torch.randn(3, 64)
    traced = qcompile.trace(model, **OPTIONS)
    got = torch.compile(lambda x: traced(x) + 1, backend="eager", fullgraph=True)(x)
    assert torch.equal(got, model(x) + 1)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return traced(x) + 1

    assert torch.equal(torch.export.export(Around(), (x,), strict=False).module()(x), got)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: qcompile.trace(3), TypeError, "takes a function or a module, got int"),
        (lambda: qcompile.trace(Mlp(), wieghts="qint4"), ValueError, "unknown option"),
        (lambda: qcompile.trace(Mlp())(object()), TypeError, "got a object"),
        (lambda: qcompile.trace(Mlp())(torch.eye(64).to_sparse()), TypeError, "strided tensors"),
        (lambda: qcompile.trace(Mlp(), exclude="nothing", **OPTIONS), None, ""),
    ],
)
def test_refusals(call: Callable[[], Any], error: Any, message: str) -> None:
    if error is None:
        call()
        return
    with pytest.raises(error, match=message):
        call()
