"""Rounded activations multiplied as codes where the device can: whole programs for a GPU, run by the references."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import compile_without_inductor, error, export, quantize_program, verified
from torch import Tensor, nn
from torch.export import ExportedProgram

import qcompile
from qcompile.export import lowered
from qcompile.kernels import Scheme
from qcompile.kernels.dispatch import choose, kernels, register, unregister
from qcompile.kernels.triton.target import Target, pretend
from qcompile.report import rows_of

A100, T4, H100 = Target("sm_80", 108), Target("sm_75", 40), Target("sm_90", 132)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """The GPU's kernels offered for the CPU, where their operators run by the reference."""
    with pretend(A100):
        added = [register(dataclasses.replace(k, device="cpu")) for k in reversed(kernels(device="cuda"))]
        yield
    for kernel in added:
        unregister(kernel)


class Block(nn.Module):
    """A step of a transformer without its attention: two norms, siblings, a gate, residuals."""

    def __init__(self, layer: bool, width: int = 96, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        norm = nn.LayerNorm if layer else lambda n: nn.RMSNorm(n, eps=1e-6)
        self.before, self.after = norm(width), norm(width)
        self.q, self.k, self.v = nn.Linear(width, 96), nn.Linear(width, 33), nn.Linear(width, 33)
        self.gate, self.up = nn.Linear(width, 160, bias=False), nn.Linear(width, 160, bias=False)
        self.out, self.down = nn.Linear(162, width), nn.Linear(160, width)
        with torch.no_grad():
            for norm in (self.before, self.after):
                norm.weight.copy_(1 + 0.3 * torch.randn(width))
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.out(torch.cat([torch.tanh(self.q(y)), self.k(y), self.v(y)], dim=-1))
        y = self.after(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def calls(ep: ExportedProgram, name: str) -> list[Any]:
    return [n for n in ep.graph.nodes if n.op == "call_function" and f".{name}." in f".{n.target}."]


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return torch.where(x > 2, 8 * x, x).to(dtype)


def packed(model: nn.Module, x: Tensor, **options: Any) -> tuple[ExportedProgram, ExportedProgram]:
    """The quantized program, and the one packed for the GPU."""
    ep, _ = quantize_program(export(model, x), **{"weights": "qint8", "activations": "qint8", **options})
    with verified():
        return ep, lowered(ep)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("weights", "group"), [("qint8", None), ("qint8", -1), ("qfloat8", None)])
def test_norms_and_roundings_become_one(weights: str, group: int | None, dtype: torch.dtype, layer: bool) -> None:
    torch.manual_seed(0)
    model, x = Block(layer, dtype=dtype), data(2, 5, 96, dtype=dtype)
    ep, low = packed(model, x, weights=weights, activations=weights, group_size=group)
    assert len(calls(ep, "fake_quantize_dynamic")) == 4
    quantized = calls(low, "norm_quantize")
    assert [n.args[4] for n in quantized] == ["layer" if layer else "rms", "none", "layer" if layer else "rms", "none"]
    assert not calls(low, "fake_quantize_dynamic") and not calls(low, "rms_norm") and not calls(low, "layer_norm")
    assert len(calls(low, "linear_quantized_split")) == 1 and len(calls(low, "linear_quantized")) == 3
    fused = [n.args[9:] for n in calls(low, "linear_quantized")]
    assert sum(a[0] == "silu" and a[3] is True for a in fused) == 1
    assert sum(len(a) > 2 and a[2] is not None for a in fused) == 2
    want = ep.module()(x)
    # codes that are halfway may go either way; weights were rounded to the dtype before, and are not now
    assert error(low.module()(x), want) < {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("shape", [(1, 193), (7, 193), (3, 1, 193), (0, 193)])
@pytest.mark.parametrize("group", [-1, 64, 50])
def test_odd_shapes(shape: tuple[int, ...], group: int) -> None:
    torch.manual_seed(0)
    model, x = Block(False, 193), data(*shape)
    ep, low = packed(model, x, group_size=group)
    # groups of 50 columns are not a whole number of products of depth 32
    assert len(calls(low, "linear_quantized_split")) == (0 if group == 50 else 1)
    got, want = low.module()(x), ep.module()(x)
    assert got.shape == want.shape and (not x.numel() or error(got, want) < 2e-3)


def test_the_report_says_so() -> None:
    model, x = Block(True), data(4, 96)
    ep, low = packed(model, x)
    for program in (ep, low):
        rows = {row.weight: row for row in rows_of(program.graph)}
        assert len(rows) == 7
        assert {(row.kernel, row.activations) for row in rows.values()} == {("triton-codes", "qint8 dynamic")}
    note = " (qfloat8_e4m3fn decoded by integer arithmetic, sm_80 has no such type)"
    for target, mark in ((A100, note), (H100, "")):
        with pretend(target):
            _, low = packed(model, x, weights="qfloat8", activations="qfloat8")
            assert {row.kernel for row in rows_of(low.graph)} == {f"triton-codes{mark}"}
    with pretend(H100):  # what is not done says why
        _, low = packed(model, x)
        why = "triton-codes: groups of 32 cost more than a float product on sm_90"
        assert {row.kernel for row in rows_of(low.graph)} == {f"triton-planes; activations rounded in float ({why})"}
        assert not calls(low, "linear_quantized")


def test_fixed_scales() -> None:
    torch.manual_seed(0)
    model, x = Block(False), data(6, 96)
    ep, _ = packed(model, x)
    fixed = qcompile.calibrate(ep, [x], method="minmax")
    with verified():
        low = lowered(fixed)
    quantized = calls(low, "norm_quantize")
    assert [n.args[4] for n in quantized] == ["rms", "none", "rms", "none"] and all(len(n.args) == 7 for n in quantized)
    assert not calls(low, "fake_quantize") and len(calls(low, "linear_quantized")) == 3
    for y in (x, 3 * x):  # the latter is out of range
        assert error(low.module()(y), fixed.module()(y)) < 2e-3
    y = x.clone()
    y[2, 5], y[4, 7] = float("nan"), float("inf")
    assert torch.equal(low.module()(y).isfinite(), fixed.module()(y).isfinite())


class Mixed(nn.Module):
    """What reads the norm: a product in codes, one that cannot be, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 40), nn.Linear(64, 50)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return self.a(y), self.b(y)


def test_a_norm_that_others_read_stays() -> None:
    model, x = Mixed().eval().requires_grad_(False), data(4, 64)
    rules = {"weights": "qint8", "activations": "qint8"}
    ep, _ = quantize_program(export(model, x), **rules, exclude=["b.*"])
    with verified():
        low = lowered(ep)
    assert len(calls(low, "rms_norm")) == 1 and [n.args[4] for n in calls(low, "norm_quantize")] == ["none"]
    assert len(calls(low, "linear_quantized")) == 1 and len(calls(low, "linear")) == 1
    for got, want in zip(low.module()(x), ep.module()(x), strict=True):
        assert error(got, want) < 2e-3


class Written(nn.Module):
    """The norm's input is written to before its result is rounded; the rounding itself reads what it should."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early, self.norm, self.a = early, nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        z = self.norm(y)
        y.add_(5)
        return self.a(z) + y.sum()


def test_what_is_written_to_is_normalized_where_it_was() -> None:
    model, x = Written(True).eval().requires_grad_(False), data(4, 64)
    ep, low = packed(model, x)
    assert len(calls(low, "rms_norm")) == 1 and len(calls(low, "linear_quantized")) == 1
    assert error(low.module()(x), ep.module()(x)) < 2e-3


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "qint4"},  # the codes of weights are not bytes
        {"mode": "affine"},  # zero points
        {"activations": "qfloat8"},  # an integer and a float
    ],
)
def test_what_cannot_be_multiplied_in_codes_is_rounded_in_float(options: dict[str, str]) -> None:
    model, x = Mixed().eval().requires_grad_(False), data(4, 64)
    with pretend(H100):
        ep, low = packed(model, x, **options)
    assert not calls(low, "linear_quantized_split") and len(calls(low, "fake_quantize_dynamic")) == 1
    assert len(calls(low, "rms_norm")) == 1
    for got, want in zip(low.module()(x), ep.module()(x), strict=True):
        assert error(got, want) < 1e-2


def test_where_there_is_no_triton() -> None:
    with pretend(T4):
        _, low = packed(Mixed().eval().requires_grad_(False), data(4, 64))
        scheme = Scheme.parse("qint8/channel=0/symmetric/float32")
        kernel, why = choose("linear_quantized", "cuda", scheme, (64, 64), torch.float16)
    assert not calls(low, "linear_quantized_split") and not calls(low, "norm_quantize")
    assert kernel is None and "sm_80" in why


def test_a_length_that_is_not_known() -> None:
    torch.manual_seed(0)
    model, length = Block(False), torch.export.Dim("length", min=2, max=64)
    exported = export(model, data(2, 5, 96), dynamic_shapes=({1: length},))
    ep, _ = quantize_program(exported, weights="qint8", activations="qint8")
    with verified():
        low = lowered(ep)
    assert len(calls(low, "linear_quantized")) == 3
    for n in (2, 33):
        x = data(2, n, 96)
        assert error(low.module()(x), ep.module()(x)) < 2e-3


def test_the_backend() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Block(False), data(4, 96)
    want = packed(model, x)[0].module()(x)
    got, rows = compile_without_inductor(model, x, weights="qint8", activations="qint8", keep_float=True)
    assert error(got, want) < 2e-3
    assert {row.kernel for row in rows} == {"triton-codes"}


def test_a_kernel_that_rounds_by_itself_keeps_what_it_rounds() -> None:
    (planes, *_) = (k for k in kernels("linear", "cpu") if k.name == "triton-planes")
    own = register(dataclasses.replace(planes, name="own", rounds=("qint8",)))
    try:
        scheme = Scheme.parse("qint8/channel=0/symmetric/float32")
        assert choose("linear", "cpu", scheme, (64, 64), torch.float32)[0] is own
        _, low = packed(Mixed().eval().requires_grad_(False), data(4, 64), exclude=["b.*"])
        assert not calls(low, "linear_quantized") and not calls(low, "norm_quantize")
    finally:
        unregister(own)
