"""Parameters that only a module's own code uses: products in eager mode, as functions, read their codes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from eager import KERNEL, error, rounded
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.eager.tensor import WeightTensor

Use = Callable[[Tensor, Tensor], Tensor]


def _scaled_addmm(x: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(torch.ones(64, dtype=x.dtype), x, w.t(), beta=2, alpha=0.5)


#: What a program may do with a weight ``[64, 96]`` (or ``[4, 64, 96]``), and whether a kernel takes the codes.
USES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Use, bool]] = {
    "F.linear": ((64, 96), (3, 5, 96), lambda x, w: functional.linear(x, w), True),
    "@ transposed": ((64, 96), (5, 96), lambda x, w: x @ w.t(), True),
    "@ .T": ((64, 96), (5, 96), lambda x, w: x @ w.T, True),
    "@ .mT": ((64, 96), (5, 96), lambda x, w: x @ w.mT, True),
    "matmul, batched": ((64, 96), (3, 5, 96), lambda x, w: torch.matmul(x, w.transpose(0, 1)), True),
    "einsum": ((64, 96), (3, 5, 96), lambda x, w: torch.einsum("bsk,nk->bsn", x, w), False),
    "addmm": ((64, 96), (5, 96), lambda x, w: torch.addmm(torch.ones(64, dtype=x.dtype), x, w.t()), True),
    "addmm, scaled": ((64, 96), (5, 96), _scaled_addmm, False),
    "@ untransposed": ((64, 96), (5, 64), lambda x, w: x @ w, False),
    "left operand": ((64, 96), (96, 5), lambda x, w: w @ x, False),
    "chunks": ((64, 96), (5, 96), lambda x, w: torch.cat([functional.linear(x, c) for c in w.chunk(2)], -1), True),
    "slices": ((64, 96), (5, 96), lambda x, w: functional.linear(x, w[32:64]), True),
    "slices within a tile": ((64, 96), (5, 96), lambda x, w: functional.linear(x, w[8:41]), False),
    "split": ((64, 96), (5, 96), lambda x, w: sum(functional.linear(x, c) for c in w.split([32, 32])), True),
    "a row": ((64, 96), (5, 96), lambda x, w: x * w[3], False),
    "columns": ((64, 96), (5, 40), lambda x, w: functional.linear(x, w[:, 5:45]), False),
    "steps": ((64, 96), (5, 96), lambda x, w: functional.linear(x, w[::2]), False),
    "arithmetic": ((64, 96), (5, 96), lambda x, w: functional.linear(x, w * 2 + 1), False),
    "lookup": ((64, 96), (4,), lambda x, w: functional.embedding((x.abs() * 20).long(), w), False),
    "index": ((64, 96), (4,), lambda x, w: w[(x.abs() * 20).long()], False),
    "view": ((64, 96), (5, 48), lambda x, w: functional.linear(x, w.view(128, 48)), False),
    "experts": ((4, 64, 96), (5, 96), lambda x, w: torch.stack([functional.linear(x, w[i]) for i in range(4)]), True),
    "experts, last": ((4, 64, 96), (5, 96), lambda x, w: functional.linear(x, w[-1]), True),
    "experts, unbound": ((4, 64, 96), (5, 96), lambda x, w: sum(functional.linear(x, e) for e in w.unbind(0)), True),
    "experts, transposed": ((4, 64, 96), (5, 96), lambda x, w: x @ w[2].t(), True),
    "bmm": ((4, 64, 96), (4, 5, 96), lambda x, w: torch.bmm(x, w.transpose(1, 2)), True),
    "bmm, untransposed": ((4, 64, 96), (4, 5, 64), lambda x, w: torch.bmm(x, w), False),
    "matmul of stacks": ((4, 64, 96), (4, 5, 96), lambda x, w: x @ w.mT, True),
    "experts, einsum": ((4, 64, 96), (5, 96), lambda x, w: torch.einsum("sk,enk->sen", x, w), False),
    "experts, rows of one": ((4, 64, 96), (5, 96), lambda x, w: functional.linear(x, w[1, :32]), True),
    "experts, picked": ((4, 64, 96), (2, 5, 96), lambda x, w: x @ w[torch.tensor([3, 1])].mT, False),
}  # fmt: skip


class Uses(nn.Module):
    """A raw parameter and a function of it."""

    def __init__(self, shape: tuple[int, ...], use: Use) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape) / 8)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.kernel)


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("weights", ["qint4", "qfloat8"])
def test_functions(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, size, use, fused = USES[name]
    original = Uses(shape, use)
    model = qcompile.quantize(copy.deepcopy(original), weights=weights, include="kernel")
    reference = rounded(original, model)
    x = torch.randn(size)
    wanted = reference(x if "index" in name or "lookup" in name else x.double())
    assert error(model(x), wanted) < 1e-5
    assert error(original(x), wanted) > 1e-3
    qcompile.freeze(model)
    assert error(model(x), wanted) < (3 * KERNEL if weights == "qint4" else 1e-5)
    decoded = []
    plain = WeightTensor.dequantize
    monkeypatch.setattr(WeightTensor, "dequantize", lambda self: decoded.append(1) or plain(self))
    with torch.no_grad():
        model(x)
    if weights == "qint4":
        assert not decoded or not fused, "a kernel computes this on the codes"


@pytest.mark.parametrize("shape", [(64, 96), (4, 64, 96)])
def test_a_frozen_weight_looks_like_the_parameter(shape: tuple[int, ...]) -> None:
    model = qcompile.freeze(qcompile.quantize(Uses(shape, lambda x, w: w), weights="qint4", include="kernel"))
    weight = model.kernel
    assert isinstance(weight, torch.Tensor) and weight.shape == shape and weight.dtype == torch.float32
    assert weight.numel() == model.q_kernel.dequantize().numel() and not weight.requires_grad
    assert "qint4" in repr(weight) and weight.data.shape == shape
    torch.testing.assert_close(weight.clone(), model.q_kernel.dequantize(), rtol=0, atol=0)
    torch.testing.assert_close(weight.sum(), model.q_kernel.dequantize().sum())
    assert weight.cpu().shape == shape and weight.to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(), lambda w: w.copy_(torch.zeros(64, 96)), lambda w: w.mul_(2), lambda w: w[0].fill_(1),
        lambda w: w.data.add_(1), lambda w: w.t().zero_(), lambda w: nn.init.normal_(w), lambda w: w.__setitem__(0, 1.0),
        lambda w: torch.mul(w, 2, out=w), lambda w: w.view(-1)[0].zero_(), lambda w: w.flatten().mul_(0),
    ],
)  # fmt: skip
def test_writing_to_a_frozen_weight_raises(write: Callable[[Tensor], object]) -> None:
    model = qcompile.freeze(qcompile.quantize(nn.Linear(96, 64), weights="qint4"))
    before = model.q_weight.dequantize()
    with pytest.raises((TypeError, RuntimeError), match="frozen"), torch.no_grad():
        write(model.weight)
    torch.testing.assert_close(model.q_weight.dequantize(), before, rtol=0, atol=0)


def test_assigning_to_a_frozen_weight_raises() -> None:
    model = qcompile.freeze(qcompile.quantize(nn.Linear(96, 64), weights="qint4"))
    before = model(torch.ones(1, 96))
    with pytest.raises((TypeError, AttributeError, KeyError)):
        model.weight = nn.Parameter(torch.zeros(64, 96))
    torch.testing.assert_close(model(torch.ones(1, 96)), before, rtol=0, atol=0)


def test_operands_that_do_not_fit_are_refused() -> None:
    stack = qcompile.freeze(qcompile.quantize(Uses((4, 64, 96), lambda x, w: torch.bmm(x, w.mT)), weights="qint4",
                                              include="kernel"))  # fmt: skip
    for size in ((5, 3, 96), (3, 3, 96), (4, 3, 95)):
        with pytest.raises(RuntimeError):
            stack(torch.randn(size))
    matrix = qcompile.freeze(qcompile.quantize(Uses((64, 96), lambda x, w: torch.mm(x, w.t())), weights="qint4",
                                               include="kernel"))  # fmt: skip
    for size in ((5, 95), (2, 3, 96)):
        with pytest.raises(RuntimeError):
            matrix(torch.randn(size))
    with pytest.raises(RuntimeError, match="dtype"):
        matrix(torch.randn(5, 96, dtype=torch.bfloat16))


def test_gradient_reaches_the_input_of_functions() -> None:
    model = qcompile.freeze(qcompile.quantize(Uses((64, 96), lambda x, w: functional.linear(x, w).sin()), weights="qint4"))
    x = torch.randn(5, 96, requires_grad=True)
    model(x).sum().backward()
    value = model.kernel.dequantize().double()
    wide = x.detach().double().requires_grad_()
    functional.linear(wide, value).sin().sum().backward()
    assert error(x.grad, wide.grad) < 3 * KERNEL


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["F.linear", "@ .T", "einsum", "experts", "bmm", "chunks", "lookup"])
def test_functions_compile_and_export(name: str, frozen: bool) -> None:
    shape, size, use, _ = USES[name]
    model = qcompile.quantize(Uses(shape, use), weights="qint4", include="kernel").eval()
    if frozen:
        qcompile.freeze(model)
    x = torch.randn(size)
    with torch.no_grad():
        expected = model(x)
        assert error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected) < 3 * KERNEL
        assert error(torch.export.export(model, (x,)).module()(x), expected) < 3 * KERNEL
