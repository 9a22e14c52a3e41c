"""``torch.compile(model, backend="qcompile")``: how it is found, what it takes, and under which conditions it is right."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from small import Mlp, distance, rounded
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qcompile.history import graphs

#: Every linear is quantized, and kernels round nothing but weights.
EXACT = {"min_elements": 0, "exact": True}


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="qcompile", options={**EXACT, **options}, fullgraph=True)


@pytest.mark.slow
def test_found_without_importing_qcompile() -> None:
    script = """
import sys, torch
model = torch.nn.Linear(64, 160).eval()
x = torch.randn(2, 64)
assert not any(name.startswith("qcompile") for name in sys.modules)
assert "qcompile" in torch._dynamo.list_backends()
with torch.no_grad():
    want = model(x)
    got = torch.compile(model, backend="qcompile")(x)
assert 0 < (got - want).norm() / want.norm() < 0.02, (got, want)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": "qint8"}, "unknown option 'weight'; known options: weights, activations, group_size"),
        ({"weights": "int9"}, "int9"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"optimizer": "best"}, "optimizer must be one of 'max', 'mse', 'hqq', got 'best'"),
        ({"keep_float": "yes"}, "keep_float must be True or False, got 'yes'"),
    ],
)
def test_wrong_options_are_named_in_the_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=said), torch.no_grad():
        torch.compile(Mlp(), backend="qcompile", options=options)(torch.randn(2, 64))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode: str) -> None:
    model, x = Mlp().eval(), torch.randn(2, 64)
    with torch.no_grad():
        want = model(x)
        assert 0 < distance(torch.compile(model, backend="qcompile", mode=mode)(x), want) < 0.03


def test_a_wrong_mode_says_which_there_are() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="unknown mode 'fast'; known modes: default"):
        torch.compile(Mlp(), backend="qcompile", mode="fast")(torch.randn(2, 64))


def test_mode_and_options_together_are_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(Mlp(), backend="qcompile", mode="default", options={"weights": "qint8"})


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(weights: str, dtype: torch.dtype) -> None:
    model, x = Mlp().eval().to(dtype), torch.randn(3, 64, dtype=dtype)
    with torch.no_grad():
        want = rounded(model, weights)(x)
        got = compiled(model, weights=weights)(x)
    assert distance(got, want) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_contexts(context: Any) -> None:
    model, x = Mlp().eval(), torch.randn(3, 64)
    want = rounded(model)(x)
    with context():
        got = compiled(model)(x)
    assert distance(got, want) < 1e-5
    assert graphs(model)[-1].decisions[0].kernel == "cpu-tiled"


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = Mlp().eval(), torch.randn(3, 64)
        want = rounded(model)(x)
        assert distance(compiled(model)(x), want) < 1e-5
        assert model.up.weight.isnan().all()


def test_frozen_weights_under_grad_mode_and_gradients_of_inputs() -> None:
    model = Mlp().eval().requires_grad_(False)
    reference, x = rounded(model), torch.randn(3, 64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    run = compiled(model)
    got, want = run(ours), reference(theirs)
    assert distance(got, want) < 1e-5
    got.square().sum().backward()
    want.square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert distance(ours.grad, theirs.grad) < 1e-5
    assert distance(run(x), want) < 1e-5


def test_a_trainable_bias_gets_its_gradient() -> None:
    model = Mlp().eval().requires_grad_(False)
    model.down.bias.requires_grad_(True)
    reference, x = rounded(model), torch.randn(3, 64)
    compiled(model)(x).square().sum().backward()
    reference(x).square().sum().backward()
    assert model.down.bias.grad is not None and reference.down.bias.grad is not None
    assert distance(model.down.bias.grad, reference.down.bias.grad) < 1e-5


def test_trainable_weights_stay_float_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Mlp(), torch.randn(3, 64)
    plain = copy.deepcopy(model)
    run = compiled(model)
    with caplog.at_level(logging.WARNING, "qcompile"):
        got = run(x)
        run(torch.randn(5, 64))
    want = plain(x)
    assert distance(got, want) < 1e-6
    got.sum().backward()
    want.sum().backward()
    assert distance(model.up.weight.grad, plain.up.weight.grad) < 1e-6
    assert [r.getMessage() for r in caplog.records if "no weight was quantized" in r.getMessage()] == [
        "no weight was quantized: all 2 receive gradients; call the compiled model under torch.no_grad() or "
        "torch.inference_mode(), or set requires_grad_(False) on its parameters"
    ]
    with torch.no_grad():
        assert distance(run(x), rounded(plain)(x)) < 1e-5


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    class Casting(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model, x = (Casting if inside else Mlp)().eval(), torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        want = rounded(model)(x)
        got = compiled(model)(x)
    assert want.dtype == torch.bfloat16
    assert distance(got, want) < 2e-2
    assert all(d.quantized for d in graphs(model)[-1].decisions)
    assert all(p.isnan().all() for p in (model.up.weight, model.down.weight))


def test_autocast_recompiles_and_quantizes_anew_only_if_it_must() -> None:
    model, x = Mlp().eval(), torch.randn(3, 64)
    reference = rounded(model)
    run = compiled(model)
    with torch.no_grad():
        assert distance(run(x), reference(x)) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(run(x), reference(x)) < 2e-2


@pytest.mark.parametrize("dynamic", [True, None])
def test_no_more_recompiles_than_inductor(dynamic: bool | None) -> None:
    model = Mlp().eval()
    reference = rounded(model)
    sizes = [(2, 3), (2, 5), (2, 9), (4, 9), (1, 9), (2, 1), (0, 3), (2, 4)]
    inputs = [torch.randn(*size, 64) for size in sizes]
    made = {}
    for backend in ("inductor", "qcompile"):
        torch._dynamo.reset()
        counters.clear()
        options = dict(EXACT) if backend == "qcompile" else None
        run = torch.compile(copy.deepcopy(model), backend=backend, options=options, dynamic=dynamic, fullgraph=True)
        with torch.no_grad():
            for x in inputs:
                got = run(x)
                assert got.shape == x.shape
                if backend == "qcompile" and x.numel():
                    assert distance(got, reference(x)) < 1e-5
        made[backend] = counters["stats"]["unique_graphs"]
    assert made["qcompile"] <= made["inductor"]


def test_a_graph_break_between_two_linears() -> None:
    class Broken(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            print(end="")
            if y.sum() > 0:
                y = -y
            return self.down(y)

    model = Broken().eval()
    reference = rounded(model)
    run = torch.compile(model, backend="qcompile", options=EXACT)
    with torch.no_grad():
        for rows in (2, 3, 4, 2, 7):
            x = torch.randn(rows, 64)
            assert distance(run(x), reference(x)) < 1e-5
    assert model.up.weight.isnan().all() and model.down.weight.isnan().all()


def test_a_weight_read_on_both_sides_of_a_break_is_quantized_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.step(x))
            print(end="")
            return self.step(x)

    model, x = Twice().eval(), torch.randn(3, 64)
    want = rounded(model)(x)
    with torch.no_grad():
        assert distance(torch.compile(model, backend="qcompile", options=EXACT)(x), want) < 1e-5
    from qcompile.compiling import cache
    from qcompile.weight_cache import ids_in

    ours = cache.identity(model.step.weight)
    assert [key[0] for key in cache if ids_in(ours) <= ids_in(key)].count("packed") == 1


def test_a_variable_that_a_comprehension_reads_is_no_weight_after_a_break() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 96, 96))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(x)
            torch._dynamo.graph_break()
            return torch.stack([h @ self.experts[i] for i in range(4)]).sum(0)

    model = Experts().eval()
    run = torch.compile(model, backend="qcompile")
    x = torch.randn(5, 96)
    with torch.no_grad():
        want = model(x)
        assert distance(run(x), want) < 0.02
    assert [d.quantized for g in graphs(model) for d in g.decisions] == [True] * 4


def test_a_float_read_before_a_break_keeps_the_weight() -> None:
    class Reads(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            size = self.up.weight.abs().mean()
            print(end="")
            return self.down(self.up(x)) * size

    model = Reads().eval()
    reference = rounded(model)
    run = torch.compile(model, backend="qcompile", options=EXACT)
    with torch.no_grad():
        for _ in range(2):
            size, x = model.up.weight.abs().mean(), torch.randn(3, 64)
            assert distance(run(x), reference.down(reference.up(x)) * size) < 1e-5
            assert model.up.weight.isfinite().all()
            # Rounding doubled weights gives doubled rounded weights.
            model.up.weight.mul_(2)
            reference.up.weight.mul_(2)


def test_a_float_read_after_a_break_is_an_error_not_a_stale_value() -> None:
    class Reads(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            print(end="")
            return self.down(y) * self.up.weight.abs().mean()

    with (
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"up.weight'? were released.*keep_float"),
    ):
        torch.compile(Reads().eval(), backend="qcompile", options=EXACT)(torch.randn(3, 64))


def test_keep_float_allows_that_read() -> None:
    class Reads(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            print(end="")
            return self.down(y) * self.up.weight.abs().mean()

    model, x = Reads().eval(), torch.randn(3, 64)
    reference = rounded(model)
    want = reference.down(reference.up(x)) * model.up.weight.abs().mean()
    with torch.no_grad():
        run = torch.compile(model, backend="qcompile", options={**EXACT, "keep_float": True})
        assert distance(run(x), want) < 1e-5


def test_eager_code_between_graphs_reads_nan() -> None:
    @torch._dynamo.disable
    def outside(weight: Tensor) -> float:
        return float(weight.abs().mean())

    class Reads(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.down(y) * outside(self.up.weight)

    model, x = Reads().eval(), torch.randn(3, 64)
    with torch.no_grad():
        assert torch.compile(model, backend="qcompile", options=EXACT)(x).isnan().all()


def test_threads_call_and_compile_at_once() -> None:
    model = Mlp().eval()
    reference = rounded(model)
    run = compiled(model)
    errors: list[float] = []
    failed: list[BaseException] = []

    def work(rows: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(3):
                    x = torch.randn(rows, 64)
                    errors.append(distance(run(x), reference(x)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in (2, 2, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(errors) == 12 and max(errors) < 1e-5


def test_a_pattern_that_matches_nothing_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp().eval()
    with caplog.at_level(logging.WARNING, "qcompile"), torch.no_grad():
        compiled(model, exclude=["up", "heads.*"])(torch.randn(2, 64))
    assert [r.getMessage() for r in caplog.records] == [
        "no weight of this graph matches 'heads.*'; its weights are: down.weight, up.weight"
    ]
    assert {d.weight: d.reason for d in graphs(model)[-1].decisions} == {
        "up.weight": "excluded by 'up'",
        "down.weight": None,
    }


def test_a_nan_weight_is_named() -> None:
    model = Mlp().eval()
    with torch.no_grad():
        model.up.weight[3, 4] = torch.nan
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"up\.weight.*NaN"):
            compiled(model)(torch.randn(2, 64))


def test_a_function_with_captured_weights() -> None:
    weight = nn.Parameter(torch.randn(96, 64) / 8)
    want_of = rounded(nn.Linear(64, 96, bias=False))

    def function(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)

    with torch.no_grad():
        want_of.weight.copy_(weight)
        x = torch.randn(3, 64)
        want = rounded(want_of)(x)
        assert distance(torch.compile(function, backend="qcompile", options=EXACT)(x), want) < 1e-5
    assert [d.weight for d in graphs()[-1].decisions] == ["weight"]


def test_weights_that_are_arguments_stay_float() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)

    x, weight = torch.randn(3, 64), torch.randn(96, 64)
    with torch.no_grad():
        run = torch.compile(function, backend="qcompile", options=EXACT)
        assert distance(run(x, weight), x @ weight.t()) < 1e-6
        assert distance(run(x, 2 * weight), 2 * x @ weight.t()) < 1e-6
