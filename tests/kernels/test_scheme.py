from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.kernels import PerBlock, PerChannel, PerGroup, PerTensor, Scheme, qfloat8, qint4, qint8, qtypes

sizes = st.integers(1, 300)
granularities = st.one_of(
    st.just(PerTensor()), st.builds(PerChannel, st.integers(-2, 1)), st.builds(PerGroup, sizes),
    st.builds(PerBlock, sizes, sizes),
)  # fmt: skip
scale_dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    qtype = draw(st.sampled_from(list(qtypes.values())))
    mode = "symmetric" if qtype.is_float else draw(st.sampled_from(["symmetric", "affine", "shift"]))
    return Scheme(qtype, draw(granularities), mode, draw(scale_dtypes))  # type: ignore[arg-type]


@given(schemes())
def test_str_and_parse_are_inverse(scheme: Scheme) -> None:
    again = Scheme.parse(str(scheme))
    assert again == scheme and hash(again) == hash(scheme) and str(again) == str(scheme)


@given(schemes(), st.integers(0, 70), st.integers(0, 70))
def test_shapes_and_bytes(scheme: Scheme, rows: int, cols: int) -> None:
    shape = (rows, cols)
    match scheme.granularity:
        case PerTensor():
            want: tuple[int, ...] = ()
        case PerChannel(axis=axis):
            want = (shape[axis],)
        case PerGroup(size=size):
            want = (rows, math.ceil(cols / size))
        case PerBlock(rows=block_rows, cols=block_cols):
            want = (math.ceil(rows / block_rows), math.ceil(cols / block_cols))
    assert scheme.scale_shape(shape) == want
    assert scheme.data_shape(shape) == (rows, math.ceil(cols * scheme.qtype.bits / 8))
    groups, width = math.prod(want), scheme.scale_dtype.itemsize
    extra = {"symmetric": 0, "affine": 1, "shift": width}[scheme.mode]
    assert scheme.nbytes(shape) == math.prod(scheme.data_shape(shape)) + groups * (width + extra)


def test_code_dtypes() -> None:
    assert Scheme(qint8).code_dtype == torch.int8
    assert Scheme(qint8, mode="affine").code_dtype == torch.uint8
    assert Scheme(qint4).code_dtype == torch.int8 and Scheme(qint4).data_dtype == torch.uint8
    assert Scheme(qint4, mode="shift").code_dtype == torch.uint8
    assert Scheme(qfloat8).code_dtype == Scheme(qfloat8).data_dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    "text",
    [
        "", "qint4", "qint4/group=32/affine", "qint4/group=32/affine/float16/x", "qint4/group=/affine/float16",
        "qint4/group=0/affine/float16", "qint4/group=-1/affine/float16", "qint4/block=4/affine/float16",
        "qint4/block=4x0/affine/float16", "qint4/channel=a/affine/float16", "qint4/row=1/affine/float16",
        "qint4/tensor=1/affine/float16", "qint4/tensor/wrong/float16", "qint4/tensor/affine/float64",
        "qint7/tensor/affine/float16", "qfloat8_e5m2/tensor/affine/float16",
    ],
)  # fmt: skip
def test_not_a_scheme(text: str) -> None:
    with pytest.raises(ValueError, match=r"scheme|mode|dtype"):
        Scheme.parse(text)


def test_wrong_parts() -> None:
    with pytest.raises(ValueError, match="unknown quantization mode 'asymmetric'; allowed: symmetric, affine, shift"):
        Scheme(qint4, mode="asymmetric")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale dtype torch.float64 is not one of float32"):
        Scheme(qint4, scale_dtype=torch.float64)
    with pytest.raises(ValueError, match="signed floats"):
        Scheme(qfloat8, mode="affine")
    with pytest.raises(TypeError, match="qtype"):
        Scheme("qint4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="granularity"):
        Scheme(qint4, 32)  # type: ignore[arg-type]
    for size in (0, -4, 2.0, "32", True):
        with pytest.raises(ValueError, match="at least one element"):
            PerGroup(size)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="at least 1 x 1"):
            PerBlock(4, size)  # type: ignore[arg-type]
    for axis in (1.0, "0", None, False):
        with pytest.raises(ValueError, match="axis"):
            PerChannel(axis)  # type: ignore[arg-type]


def test_granularity_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="axis 2 does not fit"):
        Scheme(qint8, PerChannel(2)).scale_shape((4, 4))
    with pytest.raises(ValueError, match="axis -3 does not fit"):
        Scheme(qint8, PerChannel(-3)).scale_shape((4, 4))
    with pytest.raises(ValueError, match="scalar"):
        Scheme(qint8, PerGroup(4)).scale_shape(())
    with pytest.raises(ValueError, match="at least two axes"):
        Scheme(qint8, PerBlock(4, 4)).scale_shape((8,))
    with pytest.raises(ValueError, match="scalar"):
        Scheme(qint4, PerTensor()).data_shape(())
