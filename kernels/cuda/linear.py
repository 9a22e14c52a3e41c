"""Runs ``linear.cu``: whether it takes a product, what it is specialized for, and its launch on torch's current stream.

:func:`launch` neither synchronizes nor copies, and takes memory only from torch: it can be captured in a CUDA graph (compile
by a first call before the capture). Tests replace :func:`start` by an emulation, and run everything else as it is.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.cuda import build
from qcompile.kernels.layouts.planes import RUN, block_columns, group_count
from qcompile.kernels.ops._epilogue import epilogue
from qcompile.kernels.ops._tiled import ACTIVATIONS
from qcompile.kernels.ops.linear_planes import check_linear_planes, check_split

_log = logging.getLogger("qcompile.kernels.cuda")

#: More rows of x than this are others' work: every 32 of them (16 with a gate) read the weight again.
MOST_ROWS = 64
_ENTRY = "qcompile_linear"
_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Plan:
    """One launch: what the source is specialized for, blocks, and threads of a block."""

    definitions: tuple[tuple[str, int], ...]
    grid: tuple[int, int]
    threads: int

    @property
    def source(self) -> str:
        """The text for the compiler."""
        return "".join(f"#define {name} {value}\n" for name, value in self.definitions) + build.text("linear.cu")


def refuses(
    dtype: torch.dtype, rows: int, bits: int, kind: str, group_size: int, cols: int, capability: int
) -> str | None:
    """Why ``rows`` rows of x of this dtype and a weight of ``cols`` columns are not for this kernel; None if they are.

    capability: the GPU's, 80 for 8.0. kind: ``int``, or a float8's name, as ``linear_planes`` has it.
    """
    if kind != "int" or bits not in (4, 8):
        return f"takes integer codes of 4 or 8 bits, not {kind} of {bits}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 or bfloat16 activations, not {str(dtype).removeprefix('torch.')}"
    if capability < (80 if dtype == torch.bfloat16 else 75):
        return f"sm_{capability} has no tensor cores for {str(dtype).removeprefix('torch.')}"
    if 0 < group_size < cols and group_size % RUN:
        return f"takes groups of a multiple of {RUN} columns, not {group_size}"
    if not 0 < rows <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} rows of x, not {rows}"
    return None


def plan(
    x: Tensor, n: int, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None, glu: bool = False, processors: int = 108,
) -> Plan:  # fmt: skip
    """How to compute ``x`` ``[M, K]`` times a weight of ``n`` rows; ``processors``: the GPU's streaming multiprocessors."""
    m, k = x.shape
    outputs = n // 2 if glu else n
    columns = 1 if m <= 8 else 2 if m <= 16 or glu else 4
    # Two tiles of W halve what is read of x, as long as there are blocks enough for all processors.
    tiles = 2 if glu or (columns <= 2 and outputs >= 64 * processors) else 1
    blocks = -(-k // block_columns(bits))
    across = -(-outputs // (16 if glu else 16 * tiles))
    most = 16 if columns == 1 and tiles == 1 and across < processors else 8
    warps = 1
    while warps * 2 <= min(most, blocks):
        warps *= 2
    definitions = (
        ("QC_BF16", int(x.dtype == torch.bfloat16)),
        ("QC_BITS", bits),
        ("QC_GROUP", group_size if 0 < group_size < k else 0),
        ("QC_SCALE", _CODE[scale.dtype]),
        ("QC_BIAS", 0 if bias is None else _CODE[bias.dtype]),
        ("QC_ZERO_KIND", 0 if zero is None else 1 if zero.dtype == torch.uint8 else 2),
        ("QC_TILES", tiles),
        ("QC_COLUMNS", columns),
        ("QC_WARPS", warps),
        ("QC_ALIGNED", int(k % 8 == 0 and x.data_ptr() % 16 == 0)),
        ("QC_GLU", int(glu)),
        ("QC_HAS_BIAS", int(bias is not None)),
        ("QC_HAS_MUL", int(mul is not None)),
        ("QC_HAS_ADD", int(add is not None)),
        ("QC_ACTIVATION", list(ACTIVATIONS).index(activation)),
    )
    return Plan(definitions, (across, -(-m // (8 * columns))), 32 * warps)


def launch(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    out: Tensor, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None, glu: bool = False,
) -> None:  # fmt: skip
    """Write ``act(x @ W.T + bias) [* mul] [+ add]`` into ``out``; arguments as ``linear_planes`` has checked them.

    Args:
        x: ``[M, K]``, contiguous; what :func:`refuses` does not refuse.
        codes, scale, zero: ``[N, ...]`` in the planes layout, contiguous.
        out: ``[M, N]``, or ``[M, N / 2]`` with glu, contiguous, the dtype of x; mul and add likewise.

    Raises:
        BuildError: there is no CUDA compiler.
    """
    (m, k), n = x.shape, codes.shape[0]
    made = plan(x, n, scale, zero, bias, bits, group_size, activation, mul, add, glu, _processors(x.device))
    # The kernel names all its arguments; those that it does not read get some tensor.
    tensors = [t if t is not None else out for t in (x, codes, scale, zero, bias, mul, add, out)]
    start(made, tensors, (m, n, k, group_count(k, group_size if group_size < k else 0)))


def takes(flat: Tensor, codes: Tensor, bits: int, kind: str, group_size: int) -> bool:
    """Whether :func:`launch` can compute ``flat`` ``[M, K]`` times that weight here: an NVIDIA GPU, and a compiler."""
    if not flat.is_cuda or not flat.is_contiguous() or codes.data_ptr() % 16:
        return False
    rows, cols = flat.shape
    return possible(flat.device, flat.dtype, rows, bits, kind, group_size, cols)


def possible(
    device: torch.device, dtype: torch.dtype, rows: int, bits: int, kind: str, group_size: int, cols: int
) -> bool:
    """What :func:`takes` asks, of tensors that are not there yet, contiguous and aligned."""
    if torch.version.hip is not None:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return refuses(dtype, rows, bits, kind, group_size, cols, 10 * major + minor) is None and _usable()


@functools.cache
def _usable() -> bool:
    """Whether there are a compiler and the driver's bindings; said once where there are not."""
    try:
        from cuda.bindings import driver  # noqa: F401
    except ImportError:
        _log.warning("the CUDA C++ kernels need the package cuda-bindings; others run instead")
        return False
    if build.compiler() is None:
        _log.warning("the CUDA C++ kernels need NVRTC or nvcc; others run instead")
        return False
    return True


def linear_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None,
    glu: bool = False,
) -> Tensor:  # fmt: skip
    """``qcompile::linear_planes`` where Triton cannot run: by this kernel, else decoded for the vendor's matmul."""
    check_linear_planes(x, codes, scale, zero, bias, bits, kind, group_size, out_features, activation, mul, add, glu)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.numel() and takes(flat, codes, bits, kind, group_size):
        out = x.new_empty([*x.shape[:-1], out_features])
        mul, add = (None if t is None else t.contiguous() for t in (mul, add))
        launch(flat, codes, scale, zero, bias, bits, group_size, out, activation, mul, add, glu)
        return out
    y = _decoded(x, codes, scale, zero, bias, bits, kind, group_size)
    return epilogue(y, activation, mul, add, glu).contiguous()


def linear_planes_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """``qcompile::linear_planes_split`` where Triton cannot run; see :func:`linear_planes`."""
    check_split(x, codes, scale, zero, bias, bits, kind, group_size, sizes)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.numel() and takes(flat, codes, bits, kind, group_size):
        return launch_split(x, flat, codes, scale, zero, bias, bits, group_size, sizes)
    y = _decoded(x, codes, scale, zero, bias, bits, kind, group_size)
    return [part.clone(memory_format=torch.contiguous_format) for part in y.split(list(sizes), dim=-1)]


def launch_split(
    x: Tensor, flat: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
    group_size: int, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """One launch a sibling, each on its own rows of the weight; ``flat`` is x as a matrix."""
    outs, first = [], 0
    for size in sizes:
        part = [None if t is None else t[first : first + size] for t in (codes, scale, zero, bias)]
        out = x.new_empty([*x.shape[:-1], size])
        launch(flat, part[0], part[1], part[2], part[3], bits, group_size, out)  # type: ignore[arg-type]
        outs.append(out)
        first += size
    return outs


def _decoded(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str, group_size: int
) -> Tensor:
    weight = torch.ops.qcompile.dequantize_planes(codes, scale, zero, bits, kind, group_size, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def start(made: Plan, tensors: list[Tensor], sizes: tuple[int, ...]) -> None:
    """Launch on the current stream of the tensors' device."""
    from cuda.bindings import driver

    device = tensors[0].device
    with torch.cuda.device(device):
        function = _function(made, torch.cuda.current_device())
        stream = torch.cuda.current_stream().cuda_stream
        values = (*(t.data_ptr() for t in tensors), *sizes)
        types = (ctypes.c_void_p,) * len(tensors) + (ctypes.c_int,) * len(sizes)
        (error,) = driver.cuLaunchKernel(function, *made.grid, 1, made.threads, 1, 1, 0, stream, (values, types), 0)
    if int(error):
        raise RuntimeError(f"the CUDA kernel for {dict(made.definitions)} could not be launched: {error}")


@functools.lru_cache(maxsize=4096)
def _function(made: Plan, device: int) -> Any:
    """The kernel, loaded into the device's context."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code = _binary(made.source, 10 * major + minor)
    error, module = driver.cuModuleLoadData(code)
    if int(error):
        raise RuntimeError(f"the CUDA kernel for {dict(made.definitions)} could not be loaded: {error}")
    error, function = driver.cuModuleGetFunction(module, _ENTRY.encode())
    if int(error):
        raise RuntimeError(f"the CUDA kernel has no entry {_ENTRY}: {error}")
    return function


_binary = functools.cache(build.binary)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 108
    return torch.cuda.get_device_properties(device).multi_processor_count
