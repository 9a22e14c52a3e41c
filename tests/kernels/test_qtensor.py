from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme, qtensor


def _same(a: QTensor, b: QTensor) -> bool:
    zeros = a.zero is b.zero is None or (a.zero is not None and b.zero is not None and torch.equal(a.zero, b.zero))
    return torch.equal(_raw(a.data), _raw(b.data)) and torch.equal(a.scale, b.scale) and zeros


def _raw(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8)


@pytest.mark.parametrize("text", oracle.SCHEMES)
@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0), (1, 1), (1, 97), (97, 1)])
def test_any_size_even_none(text: str, shape: tuple[int, int]) -> None:
    q = QTensor.quantize(oracle.data(*shape), Scheme.parse(text))
    assert q.shape == shape and q.dequantize().shape == shape and q.codes().shape == shape
    assert q.nbytes == q.scheme.nbytes(shape)


@pytest.mark.parametrize("name", ["qint8", "qint4", "qint3"])
@pytest.mark.parametrize("shape", [(97,), (3, 5, 33), (2, 3, 4, 17)])
def test_any_number_of_axes(name: str, shape: tuple[int, ...]) -> None:
    x = oracle.data(*shape)
    granularities = ["tensor", "channel=0", "channel=-1", "group=8"]
    for granularity in granularities + (["block=2x8"] if len(shape) > 1 else []):
        q = QTensor.quantize(x, Scheme.parse(f"{name}/{granularity}/affine/float32"))
        assert oracle.relative(q.dequantize(), oracle.value(q)) < 1e-6
        assert oracle.relative(q.dequantize(), oracle.wide(x)) < {"qint8": 0.05, "qint4": 0.6, "qint3": 0.9}[name]


def test_a_scalar() -> None:
    q = QTensor.quantize(torch.tensor(-3.0), Scheme.parse("qint8/tensor/symmetric/float32"))
    assert q.shape == () and float(q.dequantize()) == pytest.approx(-3.0, rel=1e-6)
    with pytest.raises(ValueError, match="scalar"):
        QTensor.quantize(torch.tensor(-3.0), Scheme.parse("qint4/tensor/symmetric/float32"))
    with pytest.raises(ValueError, match="scalar"):
        QTensor.quantize(torch.tensor(-3.0), Scheme.parse("qint8/group=4/symmetric/float32"))


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_layout_of_the_input_does_not_matter(text: str) -> None:
    scheme, x = Scheme.parse(text), oracle.data(14, 194)
    for view in (x.t().contiguous().t(), x[::2], x[:, 1::2], x.flip(0)):
        got, want = QTensor.quantize(view, scheme), QTensor.quantize(view.contiguous(), scheme)
        assert _same(got, want)
        assert got.data.is_contiguous() and got.scale.is_contiguous()


@pytest.mark.parametrize("text", oracle.SCHEMES)
@pytest.mark.parametrize("clip", ["max", "mse"])
@pytest.mark.parametrize("shape", [(23, 160), (7, 3, 33)])
def test_slices_are_the_same_as_the_whole(
    text: str, clip: qtensor.Clip, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, x = Scheme.parse(text), oracle.data(*shape)
    whole = QTensor.quantize(x, scheme, clip)
    for size in (1, 500):
        monkeypatch.setattr(qtensor, "_SLICE", size)
        assert _same(QTensor.quantize(x, scheme, clip), whole)


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_quantizing_again_gives_the_same_codes(text: str) -> None:
    """With the scale rounded up or kept exactly, the largest code is reached, and the range stays what it was.

    An affine scheme with few bits may widen its step to put one end on a code; the other end's last codes are then not
    reached, and what comes back has a narrower range. It must still not lose what the first time lost.
    """
    x = oracle.data(16, 96)
    q = QTensor.quantize(x, Scheme.parse(_exact(text)))
    again = QTensor.quantize(q.dequantize(), q.scheme)
    if q.scheme.mode == "affine":
        lost = oracle.relative(q.dequantize(), oracle.wide(x))
        assert oracle.relative(again.dequantize(), oracle.value(q)) < 0.5 * lost
        return
    assert torch.equal(again.codes().float(), q.codes().float())
    assert oracle.relative(again.dequantize(), oracle.value(q)) < 1e-5


def _exact(text: str) -> str:
    """The same scheme with a float32 scale, whose rounding moves no code."""
    return "/".join([*text.split("/")[:3], "float32"])


def test_unsigned_codes() -> None:
    x = oracle.data(5, 19)
    for text in oracle.SCHEMES:
        q = QTensor.quantize(x, Scheme.parse(text))
        codes = q.unsigned_codes()
        assert codes.dtype == torch.uint8 and codes.shape == q.shape
        if q.scheme.qtype.is_float:
            assert torch.equal(codes, _raw(q.codes()))
        else:
            offset = q.scheme.qtype.offset if q.scheme.mode == "symmetric" else 0
            assert torch.equal(codes.int() - offset, q.codes().int())


def test_is_frozen_detached_and_prints() -> None:
    w = torch.nn.Parameter(oracle.data(4, 32))
    q = QTensor.quantize(w, Scheme.parse("qint4/group=16/affine/float16"))
    assert not q.dequantize().requires_grad and q.device == torch.device("cpu")
    assert repr(q) == "QTensor(shape=[4, 32], scheme='qint4/group=16/affine/float16', 88 bytes, device=cpu)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.scale = w  # type: ignore[misc, assignment]


def test_parts_that_do_not_fit() -> None:
    scheme = Scheme.parse("qint4/group=16/affine/float16")
    q = QTensor.quantize(oracle.data(4, 32), scheme)
    with pytest.raises(ValueError, match=r"has data of shape \[4, 16\] and torch.uint8; got \[4, 15\]"):
        QTensor(q.data[:, :15], q.scale, q.zero, scheme, (4, 32))
    with pytest.raises(ValueError, match=r"has data .* got \[4, 16\] and torch.int8"):
        QTensor(q.data.view(torch.int8), q.scale, q.zero, scheme, (4, 32))
    with pytest.raises(ValueError, match=r"has scale of shape \[4, 2\] and torch.float16"):
        QTensor(q.data, q.scale.float(), q.zero, scheme, (4, 32))
    with pytest.raises(ValueError, match=r"has scale of shape \[4, 2\]"):
        QTensor(q.data, q.scale[:, :1], q.zero, scheme, (4, 32))
    with pytest.raises(ValueError, match="needs a zero point"):
        QTensor(q.data, q.scale, None, scheme, (4, 32))
    with pytest.raises(ValueError, match=r"has zero .* torch.uint8; got .* torch.int8"):
        QTensor(q.data, q.scale, q.zero.to(torch.int8), scheme, (4, 32))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="takes no zero point"):
        QTensor(q.data, q.scale, q.zero, dataclasses.replace(scheme, mode="symmetric"), (4, 32))
    with pytest.raises(ValueError, match="no negative sizes"):
        QTensor(q.data[:, :0], q.scale[:, :0], q.zero[:, :0], scheme, (4, -1))  # type: ignore[index]
