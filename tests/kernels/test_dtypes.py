from __future__ import annotations

import pytest
import torch

import qcompile.kernels as qk
from qcompile.kernels import QType, qtype, qtypes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_integer_range(bits: int) -> None:
    t = qtype(f"qint{bits}")
    assert (t.bits, t.levels, t.is_float) == (bits, 2**bits, False)
    assert (t.qmin, t.qmax, t.offset) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2 ** (bits - 1))


@pytest.mark.parametrize(
    ("name", "highest"), [("qfloat8_e4m3fn", 448.0), ("qfloat8_e4m3fnuz", 240.0), ("qfloat8_e5m2", 57344.0)]
)
def test_float_range(name: str, highest: float) -> None:
    t = qtype(name)
    assert (t.bits, t.is_float, t.qmax, t.qmin, t.offset) == (8, True, highest, -highest, 0)
    assert torch.tensor(highest).to(t.dtype).float() == highest


def test_names() -> None:
    for name, t in qtypes.items():
        assert qtype(name) is t and qtype(name.removeprefix("q")) is t and qtype(t) is t
        assert str(t) == name and repr(t) == f"qcompile.{name}" and getattr(qk, name) is t
    assert qtype("qfloat8") is qk.qfloat8_e4m3fn is qk.qfloat8


@pytest.mark.parametrize("name", ["qint7", "int1", "", "QINT4", "q", "float32"])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown quantized dtype .*qint2.*qfloat8_e5m2"):
        qtype(name)


@pytest.mark.parametrize("wrong", [4, None, torch.int8, ["qint4"]])
def test_wrong_type(wrong: object) -> None:
    with pytest.raises(TypeError, match="must be a qcompile dtype or its name"):
        qtype(wrong)  # type: ignore[arg-type]


def test_is_hashable_and_equal_by_value() -> None:
    assert {qk.qint4: 1}[QType("qint4", 4, "int", torch.int8)] == 1
