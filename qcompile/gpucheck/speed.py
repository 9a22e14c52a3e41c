"""Times of layers, ours, float16 and other libraries', each on as many copies of its weight as do not fit the cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from qcompile.gpucheck import peers
from qcompile.gpucheck.device import Gpu, seconds
from qcompile.gpucheck.numerics import without_cuda
from qcompile.kernels import QTensor, Scheme, dispatch

#: Layers [N, K] of language models of about these sizes: attention's output, the feed-forward's two.
LAYERS = {
    "1B": ((2048, 2048), (8192, 2048), (2048, 8192)),
    "8B": ((4096, 4096), (14336, 4096), (4096, 14336)),
    "70B": ((8192, 8192), (28672, 8192), (8192, 28672)),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SCHEMES = {"qint4": "qint4/group=128/affine/float16", "qint8": "qint8/channel=0/symmetric/float16"}
#: What is timed: float16, ours as dispatched, and for the table of configurations each of our kernels for itself.
OURS = ("float16", "qint4", "qint8", "qint4 by CUDA C++", "qint4 by Triton")
#: Both sides in codes, the rounding of activations included: a scale for each token, and for each row of the weight.
CODES = {"int8 x int8": "qint8", "float8 x float8": "qfloat8_e4m3fn"}

#: A call for x of m rows, and the bytes that it reads of the weight.
Made = tuple[Callable[[torch.Tensor], Any], int, torch.dtype]


def contenders(device: str) -> list[str]:
    """What is compared on a device type."""
    return [*OURS, *CODES, *peers.PEERS] if device == "cuda" else ["float16", "qint4", "qint8"]


def measure(contender: str, n: int, k: int, gpu: Gpu, rows: tuple[int, ...] = ROWS) -> dict[str, Any]:
    """Seconds for each number of rows, and the weight's bytes.

    Raises:
        LookupError: the contender is not installed, or not for this device; and whatever it raises itself.
    """
    device = gpu.device
    if contender in ("qint4 by CUDA C++", "qint4 by Triton") and not gpu.nvidia:
        raise LookupError("for NVIDIA GPUs")
    call, nbytes, dtype = make(contender, n, k, device)
    copies = max(1, min(32, -(-3 * gpu.cache // max(nbytes, 1))))
    calls = [call] + [make(contender, n, k, device)[0] for _ in range(copies - 1)]
    found: dict[int, float | str] = {}
    for m in rows:
        if contender == "qint4 by CUDA C++" and m > 64:
            break
        x = torch.randn(m, k, dtype=dtype, device=device)
        with without_cuda() if contender == "qint4 by Triton" else nullcontext():
            try:
                found[m] = seconds([lambda c=c, x=x: c(x) for c in calls], device)  # type: ignore[misc]
            except torch.OutOfMemoryError:
                found[m] = "out of memory"
    return {"seconds": found, "bytes": nbytes}


def make(contender: str, n: int, k: int, device: str) -> Made:
    """One layer with a weight of its own."""
    if contender == "float16":
        weight = torch.randn(n, k, dtype=torch.float16, device=device)
        return (lambda x: torch.nn.functional.linear(x, weight)), 2 * n * k, torch.float16
    if contender in peers.PEERS:
        return peers.PEERS[contender](n, k, device)
    return _codes(contender, n, k, device) if contender in CODES else _ours(contender, n, k, device)


def random_weight(scheme: Scheme, n: int, k: int, device: str) -> QTensor:
    """Random codes: times do not depend on them, and nothing of the float weight's size is needed."""
    q = QTensor.empty(scheme, (n, k), device)
    if scheme.qtype.is_float:
        q.data.view(torch.uint8).random_(0, 0x70)  # what is above is NaN in some
    elif q.data.dtype == torch.int8:
        q.data.random_(-128, 128)
    else:
        q.data.random_(0, 256)
    q.scale.fill_(0.01)
    if q.zero is not None:
        q.zero.fill_(8)
    return q


def _codes(contender: str, n: int, k: int, device: str) -> Made:
    name = CODES[contender]
    scheme, x_scheme = Scheme.parse(f"{name}/channel=0/symmetric/float32"), f"{name}/group={k}/symmetric/float32"
    kernel, why = dispatch.choose("linear_quantized", device, scheme, (n, k), torch.float16, {
        "x_scheme": x_scheme, "scheme": str(scheme)})  # fmt: skip
    if kernel is None:
        raise LookupError(why)
    weight = random_weight(scheme, n, k, device)

    def call(x: torch.Tensor) -> torch.Tensor:
        codes, x_scale = torch.ops.qcompile.norm_quantize(x, None, None, 0.0, "none", name)
        given = (codes, x_scale, weight.data, weight.scale, None, x_scheme, str(scheme), [n, k], x.dtype)
        return torch.ops.qcompile.linear_quantized(*given)

    return call, n * k + 4 * n, torch.float16


def _ours(contender: str, n: int, k: int, device: str) -> Made:
    scheme = Scheme.parse(SCHEMES[contender.split()[0]])
    kernel, why = dispatch.choose("linear", device, scheme, (n, k), torch.float16)
    if kernel is None:
        raise LookupError(why)
    packed = kernel.pack(random_weight(scheme, n, k, device), None, False)
    nbytes = sum(t.numel() * t.element_size() for t in packed.tensors if t is not None)
    logical = {"bias": None, "activation": "none", "mul": None, "add": None, "glu": False, "exact": True}
    logical["scheme"] = str(scheme)
    if contender.endswith("CUDA C++"):
        from qcompile.kernels.cuda import linear as cuda_linear

        target: Callable[..., Any] = cuda_linear.linear_planes
        x, codes = torch.empty(1, k, dtype=torch.float16, device=device), packed.tensors[0]
        if codes is None or not cuda_linear.takes(x, codes, 4, "int", 128):
            raise LookupError("the CUDA C++ kernel cannot run: no NVRTC or nvcc, or a device older than sm_75")
    else:
        target = kernel.target
    return (lambda x: target(*kernel.arguments(packed.tensors, packed.sizes, {**logical, "x": x}))), nbytes, torch.float16
