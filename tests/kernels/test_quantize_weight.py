"""The CPU's quantizer of weights: to the bit what plain torch gives, and left to plain torch where that is to say no."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.kernels import PerChannel, PerGroup, QTensor, Scheme, qtensor, qtype
from qcompile.kernels.cpu import build
from qcompile.kernels.measured import measured, relative_error
from qcompile.kernels.ops.quantize_weight import quantize_weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.qcompile.quantize_weight
SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def plain_torch() -> Iterator[None]:
    with mock.patch.object(qtensor, "ready", lambda: False):
        yield


def by_kernel(x: Tensor, scheme: Scheme) -> tuple[QTensor, qtensor.Squares]:
    """What the kernel gives; fails where plain torch would step in."""
    made = qtensor._by_kernel(x.contiguous(), scheme, "max")
    assert made is not None
    return made


def assert_same(got: QTensor, want: QTensor) -> None:
    assert got.scheme == want.scheme and got.shape == want.shape
    assert torch.equal(got.data, want.data) and torch.equal(got.scale, want.scale)
    assert (got.zero is None) == (want.zero is None)
    assert got.zero is None or want.zero is None or torch.equal(got.zero, want.zero)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Scheme]:
    shape = draw(st.lists(st.integers(1, 70), min_size=2, max_size=2) | st.lists(st.integers(1, 9), min_size=3, max_size=4))
    bits, mode = draw(st.sampled_from([2, 3, 4, 5, 6, 8])), draw(st.sampled_from(["symmetric", "affine", "shift"]))
    by_channel = draw(st.booleans()) and (len(shape) == 2 or bits == 8)
    granularity = PerChannel(0) if by_channel else PerGroup(draw(st.sampled_from([1, 2, 5, 7, 16, 24, 32, 64, 1 << 60])))
    scheme = Scheme(qtype(f"qint{bits}"), granularity, mode, draw(st.sampled_from(FLOATS)))
    x = oracle.data(*shape, seed=draw(st.integers(0, 1 << 20)))
    kind = draw(st.sampled_from(["normal", "one side", "few values", "far off", "tiny", "constant rows"]))
    if kind == "one side":
        x = x.abs()
    elif kind == "few values":  # ties everywhere
        x = (2 * x).round() / 2
    elif kind == "far off":
        x = x + draw(st.sampled_from([-30.0, 30.0]))
    elif kind == "tiny":
        x = x * draw(st.sampled_from([1e-7, 1e-20, 1e-38, 1e-44]))
    elif kind == "constant rows":
        x = x[..., :1].expand(shape) * (torch.arange(shape[0]) % 3 - 1).view(-1, *[1] * (len(shape) - 1))
    return x.to(draw(st.sampled_from(FLOATS))), scheme


@SETTINGS
@given(weights())
def test_to_the_bit(isa: str, drawn: tuple[Tensor, Scheme]) -> None:
    x, scheme = drawn
    with plain_torch():
        try:
            want: QTensor | None = QTensor.quantize(x, scheme)
        except ValueError:  # a shift that float16 cannot hold
            want = None
    if want is None:
        assert qtensor._by_kernel(x.contiguous(), scheme, "max") is None
        return
    got, squares = by_kernel(x, scheme)
    assert_same(got, want)
    error = oracle.value(got) - oracle.wide(x)
    noise = torch.finfo(torch.float32).eps * float(abs(oracle.wide(x)).max())  # of the float32 that values are taken from
    noise = 4 * noise * x.numel() ** 0.5 + 1e-22
    assert squares.error**0.5 == pytest.approx(float((error**2).sum() ** 0.5), rel=1e-4, abs=noise)
    assert squares.norm**0.5 == pytest.approx(float((oracle.wide(x) ** 2).sum() ** 0.5), rel=1e-5, abs=1e-22)


@pytest.mark.parametrize("text", ["qint4/group=32/affine/float16", "qint8/channel=0/symmetric/float32"])
@pytest.mark.parametrize("threads", [1, 3])
def test_real_sizes_on_any_number_of_threads(text: str, threads: int) -> None:
    if not build.ensure_loaded().loaded:
        pytest.skip("wants a C++ compiler")
    x, scheme = oracle.data(301, 1111) / 30, Scheme.parse(text)
    with plain_torch():
        want = QTensor.quantize(x, scheme)
    torch.set_num_threads(threads)
    got, squares = by_kernel(x, scheme)
    assert_same(got, want)
    assert (squares.error / squares.norm) ** 0.5 == pytest.approx(relative_error(want, x), rel=1e-4)


@pytest.mark.parametrize(
    "text", ["qint4/group=32/affine/float16", "qint3/group=7/shift/bfloat16", "qint8/channel=0/symmetric/float32"]
)
def test_views_and_slices(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not contiguous is copied slice by slice, and the errors of slices are added up."""
    scheme, x = Scheme.parse(text), oracle.data(46, 192)
    for view in (x.t().contiguous().t(), x[::2], x[:, 1::2], x.flip(0), x.expand(3, 46, 192)[1]):
        with plain_torch():
            want, error = measured(view, scheme)
        for size in (1 << 18, 500):
            monkeypatch.setattr(qtensor, "_SLICE", size)
            got, found = measured(view, scheme)
            assert_same(got, want)
            assert found == pytest.approx(error, rel=1e-4)


def test_what_the_kernel_does_not_take() -> None:
    x = oracle.data(6, 40)
    for text in oracle.SCHEMES:
        scheme = Scheme.parse(text)
        taken = scheme.granularity == PerChannel(0) or isinstance(scheme.granularity, PerGroup)
        made = qtensor._by_kernel(x, scheme, "max")
        if build.ensure_loaded().loaded:
            assert (made is not None) == (taken and not scheme.qtype.is_float), text
        for other in (x.double(), x[:0], x[:, :0], torch.tensor(1.0)):
            assert qtensor._by_kernel(other, scheme, "max") is None
        assert qtensor._by_kernel(x, scheme, "mse") is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["symmetric", "affine", "shift"])
def test_what_is_not_finite_is_refused(isa: str, bad: float, mode: str) -> None:
    for place in ((0, 0), (4, 31), (6, 96)):
        x = oracle.data(7, 97)
        x[place] = bad
        for granularity in ("group=32", "channel=0"):
            with pytest.raises(ValueError, match="NaN or infinity"):
                QTensor.quantize(x, Scheme.parse(f"qint4/{granularity}/{mode}/float16"))
        assert torch.equal(OP(x, 4, 32, mode, torch.float16)[3].isnan().any(1), torch.arange(7) == place[0])


@pytest.mark.parametrize("mode", ["symmetric", "affine", "shift"])
def test_what_does_not_fit_is_refused(isa: str, mode: str) -> None:
    x = oracle.data(5, 64)
    x[3] *= 1e9
    with pytest.raises(ValueError, match="does not fit"):
        QTensor.quantize(x, Scheme.parse(f"qint4/group=32/{mode}/float16"))
    assert torch.equal(OP(x, 4, 32, mode, torch.float16)[3].isnan().any(1), torch.arange(5) == 3)


@pytest.mark.parametrize("mode", ["symmetric", "affine", "shift"])
def test_the_reference_is_the_same(isa: str, mode: str) -> None:
    x = oracle.data(5, 49)
    x[2, 3] = torch.nan
    fine = torch.arange(5) != 2
    for bits, group in ((3, 16), (8, 0)):
        for got, want in zip(
            OP(x, bits, group, mode, torch.float16), quantize_weight(x, bits, group, mode, torch.float16), strict=True
        ):
            assert got.dtype == want.dtype and got.shape == want.shape
            kept = fine if len(got) else fine[:0]
            if got.dtype == torch.float64:
                assert torch.equal(got.isnan(), want.isnan())
                torch.testing.assert_close(got[kept], want[kept], rtol=1e-4, atol=0)
            else:
                assert torch.equal(got[kept], want[kept])
    oracle.opcheck(OP, (x[:2], 4, 16, mode, torch.bfloat16))


def test_refusals() -> None:
    if not build.ensure_loaded().loaded:
        pytest.skip("wants a C++ compiler")
    x = oracle.data(4, 32)
    for args, said in (
        ((x[0], 4, 16, "affine", torch.float16), "must be a matrix"),
        ((x.t(), 4, 16, "affine", torch.float16), "contiguous"),
        ((x.double(), 4, 16, "affine", torch.float16), "float32, float16 or bfloat16"),
        ((x, 7, 16, "affine", torch.float16), "bits must be"),
        ((x, 4, -1, "affine", torch.float16), "group_size"),
        ((x, 4, 16, "other", torch.float16), "mode must be"),
        ((x, 4, 16, "affine", torch.float64), "scale_dtype"),
    ):
        with pytest.raises(RuntimeError, match=said):
            OP(*args)
    with pytest.raises(RuntimeError, match="no gradient"):
        OP(x.requires_grad_(), 4, 16, "affine", torch.float16)[1].sum().backward()
