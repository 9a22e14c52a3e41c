"""The CUDA kernel on a real GPU, also within a CUDA graph; runs by itself where there is one."""

from __future__ import annotations

import pytest
import torch
from oracle import data, relative, wide
from row_weights import KINDS, random_matrix

from qcompile.kernels.cuda import build, linear
from qcompile.kernels.layouts.planes import pack

GPU = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (7, 5)
pytestmark = [
    pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU of sm_75 or newer"),
    pytest.mark.skipif(build.compiler() is None, reason="needs NVRTC or nvcc"),
]
BOUND = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_against_float64(dtype: torch.dtype, bits: int, kind: str) -> None:
    major, minor = torch.cuda.get_device_capability()
    shapes = [(1, 7, 97, 32), (1, 4096, 4096, 128), (3, 37, 193, 64), (8, 160, 97, 96), (17, 97, 193, 0), (64, 40, 97, 128)]
    for m, n, k, group in shapes:
        reason = linear.refuses(dtype, m, bits, "int", group, k, 10 * major + minor)
        if reason is not None:
            pytest.skip(reason)
        w = random_matrix(n, k, group, bits, kind, dtype)
        p = pack(w.codes, w.scale, w.zero, bits, group)
        x = (data(m, k) / 1000).to(dtype)
        tensors = [None if t is None else t.cuda() for t in (x, p.codes, p.scale, p.zero)]
        out = torch.zeros(m, n, dtype=dtype, device="cuda")
        linear.launch(*tensors, None, bits, group, out)
        want = wide(x) @ wide(w.value).T
        assert relative(out.cpu(), want) < BOUND[dtype], (m, n, k, group)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            linear.launch(*tensors, None, bits, group, out)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert relative(out.cpu(), want) < BOUND[dtype]
