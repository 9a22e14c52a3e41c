"""``qcompile.kernels.cuda.linear.start`` on the CPU."""

from __future__ import annotations

import ctypes

import gpu_emulator
from torch import Tensor

from qcompile.kernels.cuda.linear import Plan


def emulate(made: Plan, tensors: list[Tensor], sizes: tuple[int, ...]) -> None:
    """Run the kernel's text on fibers; the tensors are CPU's."""
    library = gpu_emulator.compile_cuda(made.source)
    args = [*tensors, *(ctypes.c_int32(size) for size in sizes)]
    gpu_emulator.run(library, "qcompile_linear", args, made.grid, made.threads)
