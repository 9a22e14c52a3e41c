"""What Inductor generated, taken apart: its kernels by kind, compiled for a GPU, or run by Triton's interpreter."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_KINDS = ("template", "pointwise", "reduction", "persistent_reduction")
_BLOCKS = {"XBLOCK": 1024, "YBLOCK": 1, "R0_BLOCK": 512}

#: libdevice, of which the interpreter knows nothing, in what it knows.
_LIBDEVICE = types.SimpleNamespace(
    exp=lambda x: tl.exp(x),
    erf=lambda x: tl.erf(x),
    rsqrt=lambda x: tl.rsqrt(x),
    isnan=lambda x: x != x,
    tanh=lambda x: 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0,
    nearbyint=lambda x: (x + 12582912.0) - 12582912.0,  # 1.5 * 2 ** 23, of numbers smaller than 2 ** 22
)
_folder = tempfile.TemporaryDirectory()


@dataclass(frozen=True)
class Kernel:
    """One kernel of a generated program.

    kind: ``template``, or which of Inductor's own. function: Triton's. options: what its decorator says.
    """

    name: str
    kind: str
    function: Any
    options: dict[str, Any]
    source: str

    @property
    def constants(self) -> dict[str, Any]:
        """A template's, by name."""
        return dict(self.options["inductor_meta"]["config_args"])

    def run(self, *arguments: Any, stream: int) -> None:
        """Launch it; blocks of Inductor's own kernels are chosen here, as its autotuning would."""
        if self.kind == "template":
            self.function[arguments[-3:]](*arguments[:-3])
            return
        given = dict(zip(self.function.arg_names, arguments, strict=False))
        blocks = {n: 1 if n == "XBLOCK" and "reduction" in self.kind else size for n, size in _BLOCKS.items()
                  if n in self.function.arg_names}  # fmt: skip
        axes = [axis for axis in "xy" if f"{axis}numel" in given]
        grid = tuple(-(-given[f"{axis}numel"] // blocks.get(f"{axis.upper()}BLOCK", 1)) for axis in axes)
        self.function[grid](*arguments, **blocks)

    def compiled(self, arch: str) -> Any:
        """A template, compiled ahead of time as a launch with aligned tensors would."""
        meta = self.options["triton_meta"]
        (attributes,) = meta["configs"]
        source = ASTSource(fn=self.function, signature=meta["signature"], constexprs=meta["constants"], attrs=attributes)
        target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
        return triton.compile(source, target=target, options={n: self.options[n] for n in ("num_warps", "num_stages")})


class Generated:
    """A generated program.

    kernels: by name, in the order in which they are defined.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.kernels: dict[str, Kernel] = {}
        self.launched: list[Kernel] = []
        with mock.patch("torch._inductor.async_compile.AsyncCompile", self._compiler), _machine():
            self._module = _load(source)

    def _compiler(self) -> Any:
        return types.SimpleNamespace(triton=self._define, wait=lambda scope: None)

    def _define(self, name: str, source: str, device_str: str) -> Any:
        found: list[tuple[str, dict[str, Any], Any]] = []

        def heuristic(kind: str) -> Any:
            return lambda **options: lambda function: found.append((kind, options, function))

        with _machine(), contextlib.ExitStack() as stack:
            for kind in _KINDS:
                stack.enter_context(mock.patch.object(triton_heuristics, kind, heuristic(kind)))
            module = _load(source)
        if os.environ.get("TRITON_INTERPRET") == "1":
            module.libdevice = _LIBDEVICE  # type: ignore[attr-defined]
        ((kind, options, function),) = found
        self.kernels[name] = Kernel(name, kind, function, options, source)
        return types.SimpleNamespace(run=lambda *args, stream: self._run(name, args, stream))

    def _run(self, name: str, arguments: Sequence[Any], stream: int) -> None:
        self.launched.append(self.kernels[name])
        self.kernels[name].run(*arguments, stream=stream)

    @property
    def templates(self) -> list[Kernel]:
        """The kernels that are templates of ours."""
        return [k for k in self.kernels.values() if k.kind == "template"]

    @property
    def kinds(self) -> list[str]:
        """The kind of each kernel."""
        return [k.kind for k in self.kernels.values()]

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Run the program by Triton's interpreter on tensors of the CPU; memory that it takes is NaN at first."""

        def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
            made = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype)
            return made.fill_(float("nan")) if dtype.is_floating_point else made

        self._module.empty_strided_cuda = empty  # type: ignore[attr-defined]
        self.launched.clear()
        with _machine():
            return tuple(self._module.call(list(arguments)))


@contextlib.contextmanager
def _machine() -> Iterator[None]:
    """What generated code asks of torch's CUDA build."""
    with (
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True),
        mock.patch.object(torch.cuda, "_DeviceGuard", lambda device: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "set_device", lambda device: None),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
    ):
        yield


def _load(source: str) -> types.ModuleType:
    """A module of this text, from a file, as Triton wants it."""
    path = Path(_folder.name) / f"generated_{len(list(Path(_folder.name).iterdir()))}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
