"""The same kernels on a real Apple GPU; runs by itself where there is one."""

from __future__ import annotations

import pytest
import torch
from oracle import data, relative, wide
from row_weights import KINDS, random_matrix

from qcompile.kernels.layouts.rows import pack

pytestmark = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU (MPS)")
BOUND = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", list(BOUND))
def test_against_float64(dtype: torch.dtype, bits: int, kind: str) -> None:
    for m, n, k, group in [
        (1, 7, 97, 32),
        (1, 160, 193, 7),
        (4, 97, 160, 0),
        (7, 64, 512, 64),
        (35, 97, 193, 128),
        (300, 160, 97, 32),
    ]:
        matrix = random_matrix(n, k, group, bits, kind, dtype)
        w = pack(matrix.codes, matrix.scale, matrix.zero, bits, group)
        x, bias = data(m, k, dtype=dtype), data(n, dtype=dtype)
        tensors = [None if t is None else t.to("mps") for t in (x, w.codes, w.scale, w.zero, bias)]
        y = torch.ops.qcompile.linear_rows(*tensors, bits, group, n, "none").cpu()
        want = wide(x) @ wide(matrix.value).T
        assert relative(y, want + wide(bias), want) < BOUND[dtype], (m, n, k, group)
