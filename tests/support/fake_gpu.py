"""Inductor generates code for a GPU on a machine without one: fake tensors, a driver of paper, made-up properties."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.source import ConstantSource
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

from qcompile.inductor import prepare
from qcompile.kernels.triton.target import Target, pretend


class _Driver:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget("hip", target.arch, 64) if target.hip else GPUTarget("cuda", target.capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0


@contextlib.contextmanager
def fake_gpu(target: Target, compiler: bool = False) -> Iterator[None]:
    """Let Inductor believe that device ``cuda:0`` is ``target``. compiler: of CUDA C++, whose kernel then takes few rows."""
    major, minor = divmod(target.capability or 90, 10)
    properties = types.SimpleNamespace(
        name=target.arch, major=major, minor=minor, multi_processor_count=target.processors, total_memory=80 << 30,
        warp_size=64 if target.hip else 32, regs_per_multiprocessor=1 << 16, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, gcnArchName=target.arch, L2_cache_size=40 << 20,
    )  # fmt: skip

    def found(*_: object) -> object:
        return properties

    triton.runtime.driver.set_active(_Driver(target))
    DeviceProperties.create.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_properties", found),
        mock.patch.object(CudaInterface, "get_device_properties", staticmethod(found)),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (major, minor)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch("torch._inductor.scheduler.has_triton", lambda: True),
        mock.patch("qcompile.kernels.cuda.linear._usable", lambda: compiler),
        torch._inductor.config.patch(compile_threads=1),  # no other processes, which would look for the GPU
        pretend(target),
    ):
        yield


def generate(
    function: Callable[..., Any], arguments: Sequence[Tensor], target: Target, dynamic: bool = False, compiler: bool = False
) -> str:
    """The Python source that Inductor makes of ``function`` on ``target``.

    Args:
        arguments: tensors on the CPU, whose shapes, strides and dtypes are taken.
        compiler: there is one of CUDA C++.
        dynamic: the first axis of all arguments that are as long there as the last one is symbolic.
    """
    prepare()
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    with fake_gpu(target, compiler), mode:
        fakes = []
        for given in arguments:
            size: list[Any] = list(given.shape)
            if dynamic and size[:1] == [arguments[-1].shape[0]]:
                size[0] = _symbol(mode, arguments[-1])
            fakes.append(torch.empty_strided(size, given.stride(), dtype=given.dtype, device="cuda"))
        module = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
        graph = GraphLowering(module, example_inputs=fakes, shape_env=shapes)
        with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            graph.run(*fakes)
            return str(graph.codegen()[0].value)


def _symbol(mode: FakeTensorMode, given: Tensor) -> Any:
    """The size of the first axis of ``given`` as a symbol."""
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (given.dim() - 1)])
    return mode.from_tensor(given, symbolic_context=context, source=ConstantSource("x")).shape[0]
