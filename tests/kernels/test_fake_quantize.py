"""fake_quantize and fake_quantize_dynamic, held against quantize and dequantize, and against float64 by hand."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from qcompile.inductor import prepare
from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.dtypes import qtype, qtypes

ops = torch.ops.qcompile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VIEWS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(5, *x.shape[1:]),
    "empty": lambda x: x[:0],
    "no features": lambda x: x[..., :0],
}  # fmt: skip


@pytest.mark.parametrize("name", qtypes)
@pytest.mark.parametrize("dtype", DTYPES)
def test_static_is_quantize_then_dequantize(name: str, dtype: torch.dtype) -> None:
    x = oracle.data(7, 97, dtype=dtype)
    scale = x.abs().float().quantile(0.98) / qtype(name).qmax
    got = ops.fake_quantize(x, scale, name)
    scheme = Scheme.parse(f"{name}/tensor/symmetric/float32")
    if scheme.packed_bits:
        wide = (x.double() / scale.double()).round().clamp(qtype(name).qmin, qtype(name).qmax) * scale.double()
        torch.testing.assert_close(got.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-30)
    else:
        codes = ops.quantize(x, scale, None, str(scheme))
        assert torch.equal(got, ops.dequantize(codes, scale, None, str(scheme), [7, 97], dtype))
    assert got.dtype == dtype and bool((got.abs().float() <= x.abs().max().float()).all())


@pytest.mark.parametrize("name", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_has_a_scale_a_token(name: str, dtype: torch.dtype) -> None:
    x = oracle.data(3, 5, 97, dtype=dtype)
    x[1, 2] = 0
    codes, scale = ops.quantize_dynamic(x, f"{name}/group=97/symmetric/float32")
    want = ops.dequantize(codes, scale, None, f"{name}/group=97/symmetric/float32", [3, 5, 97], dtype)
    got = ops.fake_quantize_dynamic(x, name)
    assert torch.equal(got, want) and not got[1, 2].any()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(view: str, dtype: torch.dtype) -> None:
    x = VIEWS[view](oracle.data(6, 4, 33, dtype=dtype))
    for name in ("qint8", "qfloat8_e4m3fn"):
        oracle.opcheck(ops.fake_quantize, (x, torch.tensor(0.03), name))
        oracle.opcheck(ops.fake_quantize_dynamic, (x, name))
        assert torch.equal(
            ops.fake_quantize(x, torch.tensor(0.03), name), ops.fake_quantize(x.contiguous(), torch.tensor(0.03), name)
        )
    leaf = oracle.data(4, 33, dtype=dtype).requires_grad_()
    oracle.opcheck(ops.fake_quantize, (leaf, torch.tensor(0.03, requires_grad=True), "qint8"))
    oracle.opcheck(ops.fake_quantize_dynamic, (leaf, "qint8"))


def test_what_is_not_finite_is_not_hidden() -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 1.0, 0.0], [-torch.inf, 1.0, 2.0], [1.0, 2.0, 3.0]])
    for name in ("qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"):
        top = qtype(name)
        static = ops.fake_quantize(x, torch.tensor(0.5), name)
        assert torch.equal(static.isnan(), x.isnan())
        assert static[1, 0] == top.qmax * 0.5 and static[2, 0] == top.qmin * 0.5
        assert ops.fake_quantize_dynamic(x, name).isnan().any(-1).tolist() == [True, True, True, False]


def test_a_scale_of_zero_gives_zeros() -> None:
    x = torch.tensor([0.0, 1.0, -3.0], requires_grad=True)
    scale = torch.tensor(0.0, requires_grad=True)
    got = ops.fake_quantize(x, scale, "qint8")
    got.sum().backward()
    assert not got.any() and scale.grad is not None and bool(scale.grad.isfinite())


def test_tiny_tokens_keep_their_zeros() -> None:
    x = torch.tensor([[1e-40, 0.0, -5e-41]])
    got = ops.fake_quantize_dynamic(x, "qint8")
    assert got[0, 1] == 0 and bool(got.isfinite().all())


@pytest.mark.parametrize("name", ["qint8", "qint4", "qfloat8_e4m3fn"])
def test_gradients_are_those_of_lsq(name: str) -> None:
    kind, number = qtype(name), 0.05 if name != "qfloat8_e4m3fn" else 0.002
    x = oracle.data(8, 33).requires_grad_()
    scale = torch.tensor(number, requires_grad=True)
    weight = torch.randn(8, 33)
    (ops.fake_quantize(x, scale, name) * weight).sum().backward()
    # By hand, in autograd: rounding detached, clamping not.
    y, step = x.detach().clone().requires_grad_(), torch.tensor(number, requires_grad=True)
    clamped = (y / step).clamp(kind.qmin, kind.qmax)
    rounded = clamped.to(kind.dtype).float() if kind.is_float else clamped.round()
    ((clamped + (rounded - clamped).detach()) * step * weight).sum().backward()
    assert x.grad is not None and y.grad is not None and scale.grad is not None and step.grad is not None
    outside = int((y.grad == 0).sum())
    assert 0 < outside < x.numel()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(scale.grad, step.grad, rtol=1e-4, atol=1e-4)


def test_the_dynamic_gradient_passes_through() -> None:
    x, weight = torch.randn(4, 33, requires_grad=True), torch.randn(4, 33)
    (ops.fake_quantize_dynamic(x, "qint8") * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.fake_quantize(torch.ones(3).long(), torch.tensor(1.0), "qint8"), TypeError, "float32"),
        (lambda: ops.fake_quantize(torch.ones(3), torch.ones(3), "qint8"), ValueError, "0-dim"),
        (lambda: ops.fake_quantize(torch.ones(3), torch.tensor(1), "qint8"), ValueError, "0-dim"),
        (lambda: ops.fake_quantize(torch.ones(3), torch.tensor(1.0), "int9"), ValueError, "qint8"),
        (lambda: ops.fake_quantize_dynamic(torch.ones(3, dtype=torch.float64), "qint8"), TypeError, "float16"),
        (lambda: ops.fake_quantize_dynamic(torch.tensor(1.0), "qint8"), ValueError, "scalar"),
    ],
)
def test_wrong_input_says_what_is_allowed(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_compiled_is_the_reference() -> None:
    """Inductor writes it out as loops: no call of the operator is left, and the numbers are the same."""
    from torch._inductor.utils import run_and_get_code

    prepare()
    scale = torch.tensor(0.03)

    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(x)
        static, dynamic = ops.fake_quantize(x, scale, "qint8"), ops.fake_quantize_dynamic(x, "qint8")
        return static, dynamic, ops.fake_quantize(x, scale, "qfloat8_e4m3fn")

    x = oracle.data(5, 97)
    got, (code,) = run_and_get_code(torch.compile(both, fullgraph=True), x)
    assert "qcompile.fake_quantize" not in code
    for one, want in zip(got, both(x), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-6, atol=1e-7)


def test_a_quantized_tensor_of_the_same_scale_agrees() -> None:
    x = oracle.data(4, 33)
    q = QTensor.quantize(x, Scheme.parse("qint8/tensor/symmetric/float32"))
    torch.testing.assert_close(ops.fake_quantize(x, q.scale, "qint8"), q.dequantize(), rtol=0, atol=0)
