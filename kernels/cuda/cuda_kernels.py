"""The CUDA C++ kernel in the dispatch table: for NVIDIA GPUs where Triton cannot run, sm_75 among them.

Where Triton runs, its entry comes first in effect: the operators are the same, and for few rows they call this kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qcompile.kernels import dispatch
from qcompile.kernels.cuda.linear import refuses
from qcompile.kernels.dispatch import register
from qcompile.kernels.layouts.logical import group_size, refuses_matrix
from qcompile.kernels.scheme import Scheme
from qcompile.kernels.triton.register import container_bits, unusable
from qcompile.kernels.triton.target import target_of

_CUDA = torch.device("cuda")


def _refuses(scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    if unusable(_CUDA) is None:
        return "is called by Triton's entry, for few rows"
    target = target_of(_CUDA)
    if target.hip:
        return f"is for NVIDIA GPUs, not {target.arch}"
    general = refuses_matrix(scheme, shape, dtype)
    if general is not None:
        return general
    bits, size = container_bits(scheme.qtype.bits), group_size(scheme, shape[1])
    return refuses(dtype, 1, bits, "int", size, shape[1], target.capability)


for _operator in ("linear", "linear_split"):
    (_triton,) = (k for k in dispatch.kernels(_operator, "cuda") if k.name == "triton-planes")
    register(replace(_triton, name="cuda-planes", refuses=_refuses, note=None))
