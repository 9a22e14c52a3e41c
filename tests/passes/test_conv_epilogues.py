"""Batch norms, epilogues, zeros around the input: in the convolution where nothing else sees the value between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_inductor, error, operators, program_of, tensors
from torch import Tensor, fx, nn

from qcompile.options import Options
from qcompile.passes.fold_batch_norm import FoldBatchNorm
from qcompile.passes.fuse_conv_epilogues import RULES, FuseConvEpilogues
from qcompile.passes.pipeline import run
from qcompile.passes.program import Program, normalized

qc = torch.ops.qcompile
aten = torch.ops.aten
KINDS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False),
    "1x1 with bias": lambda: nn.Conv2d(16, 16, 1),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "transposed": lambda: nn.ConvTranspose2d(16, 16, 3, padding=1),
}


class Around(nn.Module):
    """A function of a convolution, a batch norm that has seen data, and inputs."""

    def __init__(self, forward: Callable[..., Any], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = KINDS["3x3"]() if conv is None else conv
        self.norm = nn.BatchNorm2d(16, eps=0.01)
        with torch.no_grad():
            self.norm.weight.normal_()
            self.norm.bias.normal_()
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.1, 2)
        self.register_buffer("scale", torch.tensor(0.02))
        self.forward_ = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.forward_(self, *inputs)


def _run(program: Program, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    given = iter(inputs)
    held = [program.constant(n) for n in program.graph.find_nodes(op="placeholder")]
    return tensors(program.module(*(next(given) if c is None else c.tensor for c in held)))


def _after(passes: list[Any], model: nn.Module, *inputs: Tensor, inference: bool = True, **options: Any) -> Program:
    """Quantize, then run ``passes``; results must stay the same."""
    program = program_of(model.eval().requires_grad_(False), *inputs)
    run(Options.parse({"min_elements": 0, **options}).quantization(), program, check=True)
    want = _run(program, inputs)
    program.inference = inference
    run(passes, program, check=True)
    assert error(_run(program, inputs), want) < 2e-3
    return program


def _calls(program: Program) -> list[object]:
    return [n.target for n in program.calls()]


X = torch.randn(2, 16, 7, 9)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weights": "qfloat8"},
    {"weights": "qint4", "group_size": 16, "mode": "shift"},
    {"weights": "qint4", "group_size": 16, "mode": "affine"},
    {"group_size": 16, "scale_dtype": "bfloat16"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_batch_norm_folds_into_the_convolution_before_it(kind: str, options: dict[str, Any]) -> None:
    model = Around(lambda m, x: m.norm(m.conv(x)), KINDS[kind]())
    program = _after([FoldBatchNorm()], model, X, **options)
    assert _calls(program) == [qc.conv.default]
    assert not any("running" in c.name or "norm.weight" in c.name for c in program.constants.values())


def test_scales_that_float16_cannot_hold_become_wider() -> None:
    model = Around(lambda m, x: m.norm(m.conv(x)))
    with torch.no_grad():
        model.norm.weight[3] = 1e-5
    program = _after([FoldBatchNorm()], model, X, group_size=16)
    (conv,) = program.calls()
    assert normalized(conv)["scheme"].endswith("float32")


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
        lambda m, x: m.norm(F.relu(m.conv(x))),
        lambda m, x: m.norm(x) + m.conv(x),
        lambda m, x: F.batch_norm(m.conv(x), x.mean((0, 2, 3)), x.var((0, 2, 3))),
    ],
)
def test_a_batch_norm_stays_where_it_must(forward: Callable[..., Any]) -> None:
    program = _after([FoldBatchNorm()], Around(forward), X)
    assert len(program.calls(aten.batch_norm.default)) == 1
    assert all(normalized(n)["bias"] is None for n in program.calls(qc.conv.default))


def test_a_batch_norm_in_training_stays() -> None:
    model = Around(lambda m, x: m.norm(m.conv(x)))
    program = _after([FoldBatchNorm()], model, X, inference=False)
    assert aten.batch_norm.default in _calls(program)


FUSES: dict[str, Callable[..., Any]] = {
    "relu": lambda m, x: F.relu(m.conv(x)),
    "relu in place": lambda m, x: F.relu_(m.conv(x)),
    "relu6": lambda m, x: F.relu6(m.conv(x)),
    "clamp": lambda m, x: m.conv(x).clamp(0, 6),
    "silu": lambda m, x: F.silu(m.conv(x)),
    "swish": lambda m, x: (lambda y: y * torch.sigmoid(y))(m.conv(x)),
    "hardswish": lambda m, x: F.hardswish(m.conv(x)),
    "hardsigmoid": lambda m, x: F.hardsigmoid(m.conv(x)),
    "padded": lambda m, x: m.conv(F.pad(x, (0, 1, 2, 0))),
    "residual": lambda m, x: m.norm(m.conv(x)) + x,
    "residual first": lambda m, x: x + F.relu6(m.conv(x)),
    "residual block": lambda m, x: F.relu(m.norm(m.conv(x)) + x),
    "residual in place": lambda m, x: F.relu_(m.norm(m.conv(x)).add_(x)),
}


@pytest.mark.parametrize("name", FUSES)
def test_one_operator_is_left(name: str) -> None:
    program = _after([FoldBatchNorm(), FuseConvEpilogues()], Around(FUSES[name]), X)
    assert _calls(program) == [qc.conv.default]


PADS: dict[str, Callable[[Tensor], Tensor]] = {
    "pad": lambda x: F.pad(x, (0, 1, 2, 0)),
    "constant_pad_nd": lambda x: torch.constant_pad_nd(x, (0, 1, 2, 0)),
}


@pytest.mark.parametrize("name", PADS)
def test_zeros_that_are_rounded_with_the_input_go_too(name: str) -> None:
    model = Around(lambda m, x: m.conv(qc.fake_quantize(PADS[name](x), m.scale, "qint8")))
    program = _after([FuseConvEpilogues()], model, X)
    assert _calls(program) == [qc.fake_quantize.default, qc.conv.default]
    assert list(normalized(program.calls()[1])["pad"]) == [0, 1, 2, 0]


@pytest.mark.parametrize("other", ["ones", "another reader"])
def test_what_is_rounded_otherwise_keeps_its_padding(other: str) -> None:
    value = 1.0 if other == "ones" else 0.0

    def forward(m: Around, x: Tensor) -> Any:
        y = qc.fake_quantize(F.pad(x, (0, 1, 2, 0), value=value), m.scale, "qint8")
        return m.conv(y), y if other == "another reader" else None

    program = _after([FuseConvEpilogues()], Around(forward), X)
    assert aten.pad.default in _calls(program)
    assert list(normalized(program.calls(qc.conv.default)[0])["pad"]) == []


STAYS: dict[str, Callable[..., Any]] = {
    "seen elsewhere": lambda m, x: (lambda y: (F.relu(y), y))(m.conv(x)),
    "another range": lambda m, x: F.hardtanh(m.conv(x), 0.0, 5.0),
    "padded with ones": lambda m, x: m.conv(F.pad(x, (1, 1), value=1.0)),
    "padded by reflection": lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "cut": lambda m, x: m.conv(F.pad(x, (-1, 0))),
    "broadcast": lambda m, x: m.conv(x) + x[:1, :, :1, :1],
    "scaled": lambda m, x: torch.add(m.conv(x), x, alpha=2),
    "x is written to": lambda m, x: (lambda z: (lambda y: (z.mul_(2), F.relu(y)))(m.conv(z)))(x * 1),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_does_not_fit_stays(name: str) -> None:
    program = _after([FoldBatchNorm(), FuseConvEpilogues()], Around(STAYS[name]), X)
    (conv,) = program.calls(qc.conv.default)
    args = normalized(conv)
    assert (args["activation"], args["add"], list(args["pad"])) == ("none", None, [])
    assert len(program.calls()) > 1


def test_gradients_keep_operators_apart() -> None:
    program = _after([FuseConvEpilogues()], Around(FUSES["relu"]), X, inference=False)
    assert aten.relu.default in _calls(program)


def test_every_rule_fires_in_some_test() -> None:
    """Rules have names, and each name is of a kind above."""
    kinds = {r.name.partition("-")[0] for r in RULES}
    assert kinds == {"pad", "constant", "rounded", "activation", "after", "residual"}


class Block(nn.Module):
    """What convolutional models are made of, with results and views of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, groups=2)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.line = nn.Conv1d(8, 8, 3)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = F.relu6(self.norm(self.stem(x)))
        b = a + self.depthwise(a)
        c = F.relu(self.grouped(b))
        d = self.up(c)
        e = self.line(d.flatten(2))
        pooled = F.max_pool2d(c, 2)
        return a, c, e, pooled.view(pooled.shape[0], -1), self.last(c.mean((2, 3))), c.permute(0, 2, 3, 1), e.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_their_values_and_strides(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Block().eval().to(dtype).requires_grad_(False)
    x = torch.randn(2, 3, 21, 18).to(dtype)
    want = model(x)
    got, rows = compile_without_inductor(model, x, keep_float=True)
    assert {r.kernel for r in rows if r.quantized and r.weight != "up.weight"} == {"cpu-conv", "cpu-depthwise", "cpu-tiled"}
    assert next(r.kernel for r in rows if r.weight == "up.weight").startswith("dequantize + convolution")
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 3e-2
        assert a.stride() == b.stride()


def test_a_statistic_that_changes_is_seen() -> None:
    model = Around(lambda m, x: m.norm(m.conv(x))).eval().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        keep = "torch._inductor.compile_fx.compile_fx"
        patch.setattr(keep, lambda module, inputs, config_patches: fx.GraphModule(module, module.graph))
        compiled = torch.compile(model, backend="qcompile", options={"min_elements": 0, "keep_float": True})
        for change in (lambda: None, lambda: model.norm.running_mean.add_(3), lambda: model.norm.bias.mul_(-2)):
            change()
            assert error(compiled(X), model(X)) < 2e-2


def test_operators_of_a_packed_program() -> None:
    model = Around(FUSES["residual block"]).eval().requires_grad_(False)
    program = program_of(model, X)
    passes = Options.parse({"min_elements": 0})
    run([*passes.quantization(), *passes.lowering()], program, check=True)
    assert operators(program.module) == {"qcompile.conv_tiled": 1, "aten.clone": 1}
