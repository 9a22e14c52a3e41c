"""Every kernel of the dispatch table for a GPU against float64: odd shapes, outliers, few rows and many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels import QTensor, Scheme, dispatch
from qcompile.kernels.cuda import linear as cuda_linear
from qcompile.kernels.dispatch import Kernel
from qcompile.kernels.ops.norm_quantize import norm_quantize

SCHEMES = (
    "qint4/group=32/affine/float16",
    "qint4/group=128/symmetric/bfloat16",
    "qint3/channel=0/symmetric/float32",
    "qint2/group=16/affine/float16",
    "qint8/channel=0/symmetric/float32",
    "qint8/group=50/shift/float16",
    "qfloat8_e4m3fn/channel=0/symmetric/float32",
    "qfloat8_e5m2/group=32/symmetric/float16",
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: rows of x, and the weight's shape.
SHAPES = ((1, 97, 160), (7, 160, 193), (100, 193, 97))
#: Of the norm that the product has when nothing cancels.
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 2e-5}


#: Codes of activations: what comes before, and their dtype.
ROUNDINGS = ("rms qint8", "layer qint8", "none qint8", "rms qfloat8_e4m3fn", "none qfloat8_e5m2")


def rows(device: str) -> list[tuple[str, str, str]]:
    """What there is to check on a device type: kernel, operator and scheme."""
    found = [(k.name, k.operator, scheme) for k in dispatch.kernels(device=device) for scheme in SCHEMES]
    return found + [("triton-codes", "norm_quantize", rounding) for rounding in ROUNDINGS if device == "cuda"]


def check(kernel_name: str, operator: str, scheme_name: str, device: str, on: str | None = None) -> dict[str, Any]:
    """One row: for each dtype of x the largest error over the shapes, or why it does not apply.

    Args:
        on: the device to run on, where it is another than the kernel's: tests run the references on the CPU.

    Returns:
        ``errors``: dtype -> number or reason. ``wrong``: dtypes whose error is above the bound, or not a number.
    """
    if operator == "norm_quantize":
        norm, _, qtype = scheme_name.partition(" ")
        return _check_norm(norm, qtype, on or device)
    kernel = next(k for k in dispatch.kernels(operator, device) if k.name == kernel_name)
    if operator not in _CASES:
        return {"errors": {"": f"gpu-check has no case for {operator}"}, "wrong": [""]}
    errors: dict[str, float | str] = {}
    wrong = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        worst = 0.0
        for size in SHAPES:
            found = _one(kernel, operator, Scheme.parse(scheme_name), size, dtype, on or device)
            if isinstance(found, str):
                errors[name] = found
                break
            worst = errors[name] = max(worst, found) if found == found else found
            if not worst <= BOUND[dtype]:
                wrong.append(name)
                break
    return {"errors": errors, "wrong": wrong}


def _one(
    kernel: Kernel, operator: str, scheme: Scheme, size: tuple[int, int, int], dtype: torch.dtype, on: str
) -> float | str:
    m, n, k = size
    shape = (3, n, k) if operator == "grouped_linear" else (n, k)
    if kernel.name == "cuda-planes":
        why = _cuda_refuses(kernel, scheme, size, dtype)
    else:
        why = kernel.refuses(scheme, shape, dtype)
    if why is not None:
        return why
    weight = QTensor.quantize(_data(*shape), scheme)
    packed = kernel.pack(weight, [n - 30, 30] if operator.endswith("_split") else None, False)
    value = weight.dequantize(torch.float64)
    logical, want, scale = _CASES[operator](m, value, dtype, scheme)
    logical["scheme"] = str(scheme)
    moved = {key: v.to(on) if isinstance(v, Tensor) else v for key, v in logical.items()}
    arguments = kernel.arguments([None if t is None else t.to(on) for t in packed.tensors], packed.sizes, moved)
    with _only(kernel):
        got = _call(kernel, on)(*arguments)
    result = torch.cat(list(got), dim=-1) if isinstance(got, list) else got
    return float((result.cpu().double() - want).norm() / scale)


def _cuda_refuses(kernel: Kernel, scheme: Scheme, size: tuple[int, int, int], dtype: torch.dtype) -> str | None:
    """Its entry in the table stands back where Triton runs; here it is asked itself."""
    from qcompile.kernels.layouts.logical import group_size, refuses_matrix

    m, n, k = size
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    rows = min(m, cuda_linear.MOST_ROWS)  # more are decoded for the vendor's matmul, which is checked, too
    return refuses_matrix(scheme, (n, k), dtype) or cuda_linear.refuses(
        dtype, rows, scheme.qtype.bits, "int", group_size(scheme, k), k, 10 * major + minor
    )


def _call(kernel: Kernel, on: str) -> Callable[..., Any]:
    if kernel.name != "cuda-planes" or on == "cpu":
        return kernel.target
    return cuda_linear.linear_planes_split if kernel.operator == "linear_split" else cuda_linear.linear_planes


@contextmanager
def _only(kernel: Kernel) -> Iterator[None]:
    """Triton's kernels without the CUDA C++ one, which takes few rows from them otherwise."""
    if kernel.name != "triton-planes":
        yield
        return
    with without_cuda():
        yield


@contextmanager
def without_cuda() -> Iterator[None]:
    """Let the CUDA C++ kernel take nothing."""
    takes = cuda_linear.takes
    cuda_linear.takes = lambda *_: False
    try:
        yield
    finally:
        cuda_linear.takes = takes


def _data(*shape: int) -> Tensor:
    """Normal numbers, two in a hundred of them twenty times as large."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.02, 20 * x, x)


def _check_norm(norm: str, qtype: str, on: str) -> dict[str, Any]:
    """Scales against float64, and how many codes differ from float32's: only those halfway between two may."""
    errors: dict[str, float | str] = {}
    wrong = []
    for dtype in DTYPES:
        name, worst = str(dtype).removeprefix("torch."), 0.0
        for m, _, k in SHAPES:
            x, weight = _data(m, k).to(dtype), None if norm == "none" else 1 + _data(k) / 50
            for fixed in (None, torch.tensor(0.02)):
                given = [None if t is None else t.to(on) for t in (x, weight, fixed)]
                codes, scale = torch.ops.qcompile.norm_quantize(given[0], given[1], None, 1e-5, norm, qtype, given[2])
                plain, plain_scale = norm_quantize(x, weight, None, 1e-5, norm, qtype, fixed)
                differ = float((codes.cpu().float() != plain.float()).float().mean())
                off = float(((scale.cpu().double() - plain_scale.double()) / plain_scale.double()).abs().max())
                worst = max(worst, off, differ / 1000) if off == off else off  # one code in a hundred counts as 1e-5
        errors[name] = worst
        if not worst <= 2e-5:
            wrong.append(name)
    return {"errors": errors, "wrong": wrong}


def _linear(m: int, value: Tensor, dtype: torch.dtype, scheme: Scheme) -> tuple[dict[str, Any], Tensor, Tensor]:
    x = (_data(m, value.shape[1]) / 100).to(dtype)
    bias = _data(len(value)).to(dtype)
    logical = {"x": x, "bias": bias, "activation": "none", "mul": None, "add": None, "glu": False, "exact": True}
    return logical, x.double() @ value.T + bias.double(), _scale(x, value)


def _split(m: int, value: Tensor, dtype: torch.dtype, scheme: Scheme) -> tuple[dict[str, Any], Tensor, Tensor]:
    logical, want, scale = _linear(m, value, dtype, scheme)
    return {**logical, "sizes": [len(value) - 30, 30]}, want, scale


def _codes(m: int, value: Tensor, dtype: torch.dtype, scheme: Scheme) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Activations in codes of the weight's own dtype, with a scale for each row."""
    features = value.shape[1]
    parsed = Scheme.parse(f"{scheme.qtype.name}/group={features}/symmetric/float32")
    x = QTensor.quantize(_data(m, features) / 100, parsed)
    logical, _, scale = _linear(m, value, dtype, scheme)
    plain, bias = x.dequantize(torch.float64), logical["bias"]
    logical |= {"x": x.data, "x_scale": x.scale, "x_scheme": str(parsed), "shape": list(value.shape), "dtype": dtype}
    return logical, plain @ value.T + bias.double(), scale


def _codes_split(m: int, value: Tensor, dtype: torch.dtype, scheme: Scheme) -> tuple[dict[str, Any], Tensor, Tensor]:
    logical, want, scale = _codes(m, value, dtype, scheme)
    return {**logical, "sizes": [len(value) - 30, 30]}, want, scale


def _embedding(m: int, value: Tensor, dtype: torch.dtype, scheme: Scheme) -> tuple[dict[str, Any], Tensor, Tensor]:
    indices = torch.randint(0, len(value), (m,), generator=torch.Generator().manual_seed(m))
    return {"indices": indices, "dtype": dtype}, value[indices], value[indices].norm()


def _grouped(m: int, value: Tensor, dtype: torch.dtype, scheme: Scheme) -> tuple[dict[str, Any], Tensor, Tensor]:
    x = (_data(m, value.shape[2]) / 100).to(dtype)
    ends = [m // 2, m // 2, m]  # the second expert gets nothing
    want = torch.cat([x[a:b].double() @ w.T for a, b, w in zip([0, *ends], ends, value, strict=False)])
    return {"x": x, "offsets": torch.tensor(ends, dtype=torch.int32)}, want, want.norm()


def _scale(x: Tensor, value: Tensor) -> Tensor:
    return ((x.double() ** 2) @ (value**2).T).sum().sqrt()


_CASES: dict[str, Callable[[int, Tensor, torch.dtype, Scheme], tuple[dict[str, Any], Tensor, Tensor]]] = {
    "linear": _linear,
    "linear_split": _split,
    "linear_quantized": _codes,
    "linear_quantized_split": _codes_split,
    "embedding": _embedding,
    "grouped_linear": _grouped,
}
