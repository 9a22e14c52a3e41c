"""The CUDA kernel, its text unchanged, on the CPU: lanes as fibers, mma as the PTX manual lays it out, against float64."""

from __future__ import annotations

import gpu_emulator
import pytest
import torch
from cuda_emulated import emulate
from oracle import data, relative, wide
from row_weights import KINDS, random_matrix
from tiled_weights import ACTIVATIONS

from qcompile.kernels.cuda import linear
from qcompile.kernels.layouts.planes import pack

pytestmark = pytest.mark.skipif(gpu_emulator.COMPILER is None, reason="needs a C++ compiler")
#: Of the product's norm: codes and zero points are exact, sums float32; what remains is the rounding of the result.
BOUND = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "start", emulate)


def product(
    m: int, n: int, k: int, group: int, bits: int, kind: str, dtype: torch.dtype, scale_dtype: torch.dtype | None = None
) -> float:
    """How far a product is from float64, relative to its norm."""
    w = random_matrix(n, k, group, bits, kind, scale_dtype or dtype)
    p = pack(w.codes, w.scale, w.zero, bits, group)
    x, out = data(m, k) / 1000, torch.zeros(m, n, dtype=dtype)
    x = x.to(dtype)
    linear.launch(x, p.codes, p.scale, p.zero, None, bits, group, out)
    return relative(out, wide(x) @ wide(w.value).T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_decoding(dtype: torch.dtype, bits: int, kind: str) -> None:
    """Two runs of a group and a tail of it, columns that are no multiple of 8, rows that are no whole tile."""
    assert product(3, 37, 193, 64, bits, kind, dtype) < BOUND[dtype]


@pytest.mark.parametrize(
    ("m", "n", "k", "group"),
    [
        (1, 1, 1, 0), (1, 7, 7, 0), (7, 97, 160, 32), (8, 160, 97, 96), (2, 193, 1000, 128), (5, 16, 2100, 256),
        (17, 97, 193, 0), (64, 40, 97, 128),
    ],
)  # fmt: skip
def test_every_shape(m: int, n: int, k: int, group: int) -> None:
    assert product(m, n, k, group, 4, "affine", torch.float16) < BOUND[torch.float16]


def test_wide_weights_take_two_tiles_a_warp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_processors", lambda device: 1)
    for m in (4, 12):
        assert product(m, 100, 160, 32, 4, "affine", torch.float16, torch.float32) < BOUND[torch.float16]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_epilogue(activation: str) -> None:
    w = random_matrix(20, 64, 32, 8, "affine", torch.float16)
    p = pack(w.codes, w.scale / 32, w.zero, 8, 32)
    x, bias, mul, add = (t.half() for t in (data(3, 64) / 200, torch.randn(20), torch.randn(3, 20), torch.randn(3, 20)))
    out = torch.zeros(3, 20, dtype=torch.float16)
    linear.launch(x, p.codes, p.scale, p.zero, bias, 8, 32, out, activation, mul, add)
    value = w.value / 32  # scales are halves, and a division by 32 is exact
    want = ACTIVATIONS[activation](x.double() @ value.T + bias) * mul + add
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


def test_gate_and_up_rows() -> None:
    for m in (3, 20):
        w = random_matrix(74, 160, 32, 4, "affine", torch.float16)
        p = pack(w.codes, w.scale / 32, w.zero, 4, 32)
        x, bias, out = (data(m, 160) / 100).half(), torch.randn(74), torch.zeros(m, 37, dtype=torch.float16)
        linear.launch(x, p.codes, p.scale, p.zero, bias, 4, 32, out, "silu", None, None, True)
        pre = x.double() @ (w.value / 32).T + bias
        torch.testing.assert_close(
            out.double(), torch.nn.functional.silu(pre[:, :37]) * pre[:, 37:], rtol=2e-3, atol=2e-3
        )


def test_nan_stays_in_its_row() -> None:
    w = random_matrix(20, 64, 32, 4, "symmetric", torch.float16)
    p = pack(w.codes, w.scale, None, 4, 32)
    x, out = torch.ones(3, 64, dtype=torch.float16), torch.zeros(3, 20, dtype=torch.float16)
    x[1, 5] = float("nan")
    linear.launch(x, p.codes, p.scale, None, None, 4, 32, out)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_what_is_refused() -> None:
    fine = (torch.float16, 8, 4, "int", 128, 4096, 80)
    assert linear.refuses(*fine) is None
    assert linear.refuses(torch.float16, 8, 4, "int", 100, 64, 75) is None  # one group
    for change, reason in (
        ((torch.float32, *fine[1:]), "float32"),
        ((torch.bfloat16, *fine[1:6], 75), "sm_75"),
        ((*fine[:6], 70), "sm_70"),
        ((torch.float16, 65, *fine[2:]), "rows of x, not 65"),
        ((*fine[:2], 3, *fine[3:]), "4 or 8 bits"),
        ((*fine[:3], "e4m3fn", *fine[4:]), "e4m3fn"),
        ((*fine[:4], 48, *fine[5:]), "multiple of 32"),
    ):
        assert reason in (linear.refuses(*change) or "")
