"""Every Triton kernel, interpreted, against a float64 reference: ``python triton_cases.py FAMILY`` prints JSON lines.

A process of its own, because ``TRITON_INTERPRET=1`` has to be set before Triton is imported, and holds for all of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton_interpreter
from torch import Tensor

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.layouts import planes
from qcompile.kernels.triton.register import pack_planes
from qcompile.kernels.triton.target import Target, pretend

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
#: Relative error of a product's norm: rounding of the result, and of weights where they are rounded to the dtype of x.
BOUND = {F16: 8e-4, BF16: 6e-3, F32: 2e-6}
FLOAT8 = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz, "e5m2": torch.float8_e5m2}
AMPERE, HOPPER, CDNA = Target("sm_80", 4), Target("sm_90", 4), Target("gfx942", 4)
#: Zero point, group size and K of weights that between them have every path.
WEIGHTS = (("none", 0, 193), ("codes", 32, 544), ("shift", 64, 160), ("codes", 7, 97), ("none", 128, 1280))
#: What one case gives: its name, its error and the bound.
Result = tuple[str, float, float]


def data(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Normal data with two outliers in a hundred, twenty times as large."""
    x = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.02, 20 * x, x).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        raise AssertionError(f"shape {list(got.shape)}, wanted {list(want.shape)}")
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30)) if want.numel() else 0.0


def weight(n: int, k: int, bits: int, group: int, mode: str, dtype: torch.dtype = F16, kind: str = "int") -> tuple[Any, ...]:
    """A packed weight ``(codes, scale, zero)`` of random codes, and the float64 matrix that it stands for."""
    groups, size = planes.group_count(k, group), group or k
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = ((torch.rand(n, groups) + 0.5) / 2**bits).to(dtype)
    zero: Tensor | None = None
    middle = 2 ** (bits - 1)
    if kind != "int":
        dtype8 = FLOAT8[kind.removeprefix("finite_")]
        codes = data(n, k).clamp(-200, 200).to(dtype8).view(torch.uint8)
        plain = codes.view(dtype8).double()
    else:
        plain = codes.double()

    def wide(part: Tensor) -> Tensor:
        return part.double().repeat_interleave(size, 1)[:, :k]

    if kind != "int":
        matrix = plain * wide(scale)
    elif mode == "none":
        matrix = (plain - middle) * wide(scale)
    elif mode == "codes":
        zero = torch.randint(max(0, middle - 3), middle + 2, (n, groups)).to(torch.uint8)
        matrix = (plain - wide(zero)) * wide(scale)
    else:
        zero = (-(middle + torch.randn(n, groups)) * scale.float()).to(dtype)
        matrix = plain * wide(scale) + wide(zero)
    packed = planes.pack(codes, scale, zero, bits, group)
    return (packed.codes, packed.scale, packed.zero), matrix


def product(m: int, n: int, k: int, bits: int, group: int, mode: str, x: torch.dtype, scale: torch.dtype = F16,
            kind: str = "int", target: Target = AMPERE) -> Result:  # fmt: skip
    from qcompile.kernels.triton.linear import linear_planes

    parts, matrix = weight(n, k, bits, group, mode, scale, kind)
    a = data(m, k, dtype=x)
    with pretend(target):
        got = linear_planes(a, *parts, None, bits, kind, group, n)
    name = f"M={m} N={n} K={k} {kind}{bits} group={group} {mode} x={x} scale={scale} {target.arch}"
    return name, error(got, a.double() @ matrix.T), BOUND[x]


def few_rows() -> Iterator[Result]:
    """GEMV: every code, every kind of group and zero point, tails of K and N."""
    for bits in (8, 4, 3, 2):
        for mode, group, k in WEIGHTS:
            yield product(1, 7, k, bits, group, mode, F16)
        yield product(2, 5, 1100, bits, 96, "codes", BF16, F32)
        yield product(1, 3, 1, bits, 0, "shift", F32, F32)
    for kind in FLOAT8:
        yield product(1, 7, 193, 8, 0, "none", F16, kind=kind)
        yield product(2, 5, 320, 8, 32, "none", BF16, BF16, kind=kind)
        yield product(1, 7, 193, 8, 0, "none", F16, kind=f"finite_{kind}")
        yield product(2, 5, 320, 8, 32, "none", BF16, BF16, kind=f"finite_{kind}", target=CDNA)
        yield product(1, 5, 100, 8, 50, "none", F32, F32, kind=f"finite_{kind}")
    for bits in (8, 4, 3, 2):  # AMD takes codes apart byte by byte
        for mode, group, k in WEIGHTS:
            yield product(1, 7, k, bits, group, mode, F16, target=CDNA)
        yield product(2, 5, 1100, bits, 96, "codes", BF16, F32, target=CDNA)
    yield product(1, 9, 4096, 4, 128, "codes", F16, target=CDNA)
    yield product(2, 3, 4096, 4, 32, "codes", F32, F32)  # K split among programs


def many_rows() -> Iterator[Result]:
    """GEMM: the same, at M from 3 to 300, whole and with K split."""
    for bits in (8, 4, 3, 2):
        for mode, group, k in WEIGHTS:
            yield product(3, 70, k, bits, group, mode, F16)
        yield product(17, 65, 1100, bits, 96, "codes", BF16, F32)
        yield product(40, 33, 256, bits, 64, "none", F32, F32)
        yield product(129, 130, 200, bits, 32, "codes", BF16)
    for kind in FLOAT8:
        yield product(5, 65, 193, 8, 0, "none", F16, kind=kind)
        yield product(33, 65, 320, 8, 32, "none", BF16, BF16, kind=kind, target=HOPPER)
        yield product(9, 33, 64, 8, 0, "none", F32, F32, kind=kind)
        for x, target in ((F16, AMPERE), (BF16, AMPERE), (BF16, CDNA)):
            yield product(5, 65, 193, 8, 32, "none", x, kind=f"finite_{kind}", target=target)
        yield product(70, 40, 256, 8, 0, "none", BF16, F32, kind=f"finite_{kind}", target=HOPPER)
        yield product(4, 33, 64, 8, 0, "none", F32, F32, kind=f"finite_{kind}")
    for bits in (8, 4, 3, 2):  # without arithmetic in bfloat16; wide blocks in parts
        for m, mode, group, k, x in ((9, "codes", 32, 544, BF16), (150, "codes", 128, 700, BF16), (70, "none", 0, 193, F16)):
            yield product(m, 70, k, bits, group, mode, x, target=CDNA)
    for bits in (3, 2):
        for m, mode, group, k in ((70, "codes", 32, 544), (70, "shift", 64, 1100), (130, "codes", 96, 200)):
            yield product(m, 70, k, bits, group, mode, F16, target=HOPPER)
        yield product(33, 70, 9, bits, 0, "none", F16, target=HOPPER)
    yield product(16, 64, 4096, 4, 128, "codes", F16)  # K split among programs
    yield product(300, 257, 320, 4, 128, "codes", F16, target=HOPPER)
    yield product(1200, 40, 96, 4, 32, "codes", F16)  # decoded first, then torch's matmul
    yield product(64, 300, 256, 4, 0, "none", BF16, target=CDNA)


def epilogues() -> Iterator[Result]:
    """Bias, activation, gate, product, residual; siblings; x of other strides and shapes; no rows at all."""
    from qcompile.kernels.ops._tiled import ACTIVATIONS
    from qcompile.kernels.triton.linear import linear_planes, linear_planes_split

    n, k = 36, 100
    with pretend(AMPERE):
        for index, name in enumerate(ACTIVATIONS):
            for glu in (False, True):
                for m in (1, 6):
                    parts, matrix = weight(2 * n if glu else n, k, 4, 32, "codes")
                    bias = torch.randn(len(matrix))
                    a, mul, add = data(m, k, dtype=F16), data(m, n, dtype=F16), data(m, n, dtype=F16)
                    pre = a.double() @ matrix.T + bias.double()
                    want = ACTIVATIONS[name](pre[:, :n]) * pre[:, n:] if glu else ACTIVATIONS[name](pre)
                    options = {"mul": mul if index % 2 else None, "add": add if index % 3 else None}
                    want = want * mul.double() if index % 2 else want
                    want = want + add.double() if index % 3 else want
                    got = linear_planes(a, *parts, bias, 4, "int", 32, n, name, glu=glu, **options)
                    yield f"{name} glu={glu} M={m} mul={bool(index % 2)} add={bool(index % 3)}", error(got, want), 8e-4
        parts, matrix = weight(90, k, 8, 0, "none")
        bias = torch.randn(90).half()
        for m in (1, 20, 1100):
            a = data(m, k, dtype=F16)
            got = linear_planes_split(a, *parts, bias, 8, "int", 0, [40, 1, 49])
            want = a.double() @ matrix.T + bias.double()
            yield f"siblings M={m}", max(error(g, w) for g, w in zip(got, want.split([40, 1, 49], 1), strict=True)), 8e-4
            contiguous = all(g.is_contiguous() for g in got)
            yield f"siblings are contiguous M={m}", float(not contiguous), 0.0
        wide = data(4, 3, 2 * k, dtype=F16)
        for name, a in (("strided rows", wide[..., :k]), ("strided columns", wide[..., ::2]), ("no rows", wide[:0, :, :k])):
            got = linear_planes(a, *parts, None, 8, "int", 0, 90)
            yield name, error(got, a.double() @ matrix.T), 8e-4
        dead = data(3, k, dtype=F32)
        dead[1, 5] = float("nan")
        got = linear_planes(dead, *weight(33, k, 4, 32, "codes")[0], None, 4, "int", 32, 33)
        yield "NaN stays in its row", float(got[1].isfinite().any() or not got[[0, 2]].isfinite().all()), 0.0


def rows() -> Iterator[Result]:
    """Decoding whole weights and looking rows up; every float8 code; stacks of experts."""
    from qcompile.kernels.triton.grouped import grouped_linear_planes
    from qcompile.kernels.triton.rows import dequantize_planes, embedding_planes

    with pretend(AMPERE):
        for bits in (8, 4, 3, 2):
            for mode, group, dtype in (("none", 0, F32), ("codes", 32, F16), ("shift", 7, BF16)):
                parts, matrix = weight(35, 100, bits, group, mode, F32)
                bound = {F32: 1e-6, F16: 5e-4, BF16: 4e-3}[dtype]
                got = dequantize_planes(*parts, bits, "int", group, 100, dtype)
                yield f"dequantize {bits} {mode} {dtype}", error(got, matrix), bound
                index = torch.tensor([[34, 0, 3], [3, 17, 34]])
                got = embedding_planes(index, *parts, bits, "int", group, 35, 100, dtype)
                yield f"embedding {bits} {mode} {dtype}", error(got, matrix[index]), bound
        outside = embedding_planes(torch.tensor([-1, 35, 2]), *parts, 2, "int", 7, 35, 100, F32)
        yield "out of range is NaN", float(not outside[:2].isnan().all() or bool(outside[2].isnan().any())), 0.0
        for kind, dtype in FLOAT8.items():
            codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 256)
            packed = planes.pack(codes, torch.ones(1, 1), None, 8, 0)
            got = dequantize_planes(packed.codes, packed.scale, None, 8, kind, 0, 256, F32)
            want = codes.view(dtype).float()
            finite = torch.where(want.isfinite(), codes, 0)
            packed = planes.pack(finite, torch.ones(1, 1), None, 8, 0)
            plain = dequantize_planes(packed.codes, packed.scale, None, 8, f"finite_{kind}", 0, 256, F32)
            yield f"all finite codes of {kind}", float(not torch.equal(plain, want.nan_to_num(0, 0, 0))), 0.0
            yield f"all codes of {kind}", float(not torch.equal(got.nan_to_num(-7), want.nan_to_num(-7))), 0.0
    yield from experts(grouped_linear_planes)


def experts(kernel: Callable[..., Tensor]) -> Iterator[Result]:
    """Grouped products: empty experts, tails, rows of no expert, the form without offsets."""
    for dtype, scheme, sizes in (
        (F16, "qint4/group=32/affine/float16", [5, 0, 17, 1]),
        (BF16, "qint8/group=96/symmetric/float32", [0, 0, 40, 3]),
        (F32, "qfloat8_e4m3fn/group=32/symmetric/float32", [2, 9, 1, 1]),
    ):
        q = QTensor.quantize(data(4, 33, 96), Scheme.parse(scheme))
        packed, parsed = pack_planes(q, None, False), q.scheme
        kind = "e4m3fn" if parsed.qtype.is_float else "int"
        options = packed.sizes["bits"], kind, packed.sizes["group_size"]
        ends = torch.tensor(sizes).cumsum(0)
        a = data(int(ends[-1]) + 2, 96, dtype=dtype)  # the last two rows are no expert's
        want = torch.zeros(len(a), 33, dtype=torch.float64)
        for e, (start, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
            want[start:end] = a[start:end].double() @ q.dequantize()[e].double().T
        with pretend(AMPERE):
            for form in (torch.int32, torch.int64):
                got = kernel(a, *packed.tensors, ends.to(form), *options)
                yield f"experts {scheme} {form}", error(got, want), BOUND[dtype]
            a = data(4, 3, 96, dtype=dtype)
            want = torch.bmm(a.double(), q.dequantize().double().transpose(1, 2))
            yield f"experts {scheme} in a batch", error(kernel(a, *packed.tensors, None, *options), want), BOUND[dtype]


def both_quantized() -> Iterator[Result]:
    """Codes x codes with scales by token and by row; normalization that ends in codes."""
    from qcompile.kernels.triton.quantized import linear_quantized

    pairs = [("qint8", "qint8"), *((f"qfloat8_{k}", f"qfloat8_{k}") for k in FLOAT8), ("qfloat8_e5m2", "qfloat8_e4m3fn")]
    for left, right in pairs:
        for m, n, k, granularity, target in (
            (1, 33, 97, "channel=0", AMPERE), (19, 40, 256, "tensor", HOPPER), (5, 64, 2048, "channel=0", AMPERE),
            (150, 130, 160, "channel=0", CDNA),
        ):  # fmt: skip
            q = QTensor.quantize(data(n, k), Scheme.parse(f"{right}/{granularity}/symmetric/float32"))
            scheme = f"{left}/{'tensor' if m == 19 else f'group={k}'}/symmetric/float32"
            x = QTensor.quantize(data(m, k), Scheme.parse(scheme))
            bias = torch.randn(n) if m != 5 else None
            if target is HOPPER and "fnuz" in left:
                continue
            with pretend(target if "fnuz" not in left else AMPERE):  # the interpreter has no fnuz type: decoded instead
                got = linear_quantized(x.data, x.scale, q.data, q.scale, bias, scheme, str(q.scheme), [n, k], F32)
            want = x.dequantize(F32).double() @ q.dequantize(F32).double().T
            yield f"{left} x {right} M={m} N={n} K={k}", error(got, want if bias is None else want + bias.double()), 2e-6
    yield from code_epilogues()
    yield from normalized()


def code_epilogues() -> Iterator[Result]:
    """What follows a product of codes; siblings; scales by group, which end within K; a fixed scale for all tokens."""
    from qcompile.kernels.ops.linear_quantized import linear_quantized as reference
    from qcompile.kernels.triton.quantized import linear_quantized, linear_quantized_split

    for kind, group, m, n, k in (
        ("qint8", 32, 1, 34, 97), ("qint8", 32, 19, 70, 544), ("qint8", 96, 7, 33, 193), ("qint8", 128, 70, 36, 1280),
        ("qint8", 0, 300, 34, 160), ("qfloat8_e4m3fn", 64, 9, 40, 200), ("qfloat8_e5m2", 32, 3, 16, 65),
    ):  # fmt: skip
        granularity = f"group={group}" if group else "channel=0"
        q = QTensor.quantize(data(n, k), Scheme.parse(f"{kind}/{granularity}/symmetric/float16"))
        scheme = f"{kind}/group={k}/symmetric/float32" if m != 19 else f"{kind}/tensor/symmetric/float32"
        x = QTensor.quantize(data(m, k), Scheme.parse(scheme))
        both = (x.data, x.scale, q.data, q.scale)
        bias, mul, add = torch.randn(n), torch.randn(m, n), torch.randn(m, n)
        for target in (AMPERE, HOPPER):
            with pretend(target):
                for options in ((None, "none", None, None, False), (bias, "silu", mul, add, False)):
                    given = (options[0], scheme, str(q.scheme), [n, k], F32, *options[1:])
                    want = reference(*both, *given[:4], torch.float64, "none").double()
                    if options[1] == "silu":
                        want = torch.nn.functional.silu(want) * mul + add
                    name = f"{q.scheme} M={m} N={n} K={k} {options[1]} {target.arch}"
                    yield name, error(linear_quantized(*both, *given), want), 2e-6
                pre = reference(*both, bias, scheme, str(q.scheme), [n, k], torch.float64)
                if n % 2 == 0:
                    gate, up = pre.chunk(2, -1)
                    given = (bias, scheme, str(q.scheme), [n, k], F32, "gelu_tanh", None, add[:, : n // 2], True)
                    want = torch.nn.functional.gelu(gate, approximate="tanh") * up + add[:, : n // 2]
                    yield f"{q.scheme} gate {target.arch}", error(linear_quantized(*both, *given), want), 2e-6
                sizes = [1, n - 8, 7]
                parts = linear_quantized_split(*both, bias, scheme, str(q.scheme), [n, k], BF16, sizes)
                worst = max(error(g, w) for g, w in zip(parts, pre.split(sizes, -1), strict=True))
                yield f"{q.scheme} siblings {target.arch}", worst, 4e-3
                contiguous = all(p.is_contiguous() and p.dtype == BF16 for p in parts)
                yield f"{q.scheme} siblings are contiguous", float(not contiguous), 0.0


def normalized() -> Iterator[Result]:
    """RMSNorm and LayerNorm with quantization: codes equal those of the reference but for ties, scales to rounding."""
    from qcompile.kernels.ops.norm_quantize import norm_quantize as reference
    from qcompile.kernels.triton.norm_quantize import norm_quantize

    for norm in ("rms", "layer", "none"):
        for qtype, dtype, k in (("qint8", F16, 97), ("qfloat8_e4m3fn", BF16, 160), ("qfloat8_e5m2", F32, 193)):
            x = data(2, 7, 2 * k, dtype=dtype)[..., ::2]
            x[1, 3] = 0
            weight, bias = torch.randn(k), (torch.randn(k) if norm == "layer" else None)
            for fixed in (None, torch.tensor(0.013 if qtype == "qint8" else 0.004), torch.tensor(0.0).half()):
                parts = (None, None) if norm == "none" else (weight, bias)
                with pretend(HOPPER):
                    codes, scale = norm_quantize(x, *parts, 1e-5, norm, qtype, fixed)
                want, want_scale = reference(x.double().float(), *parts, 1e-5, norm, qtype, fixed)
                name = f"{norm} {qtype} fixed={fixed}"
                yield f"{name} scale", error(scale, want_scale.double()), 1e-6
                steps = (codes.float() - want.float()).abs() / (1 if qtype == "qint8" else want.float().abs().clamp(min=0.1))
                yield f"{name} codes differ", float((steps > 0).float().mean()), 0.01
                yield f"{name} codes differ by more than one", float((steps > 1).any()), 0.0
    bad = data(3, 64)
    bad[1, 7] = float("inf")
    with pretend(HOPPER):
        codes, scale = norm_quantize(bad, None, None, 1e-5, "rms", "qint8")
    yield "infinity is seen", float(bool(scale[1].isfinite()) or not bool(scale[[0, 2]].isfinite().all())), 0.0
    bad[2, 3] = float("nan")
    with pretend(HOPPER):
        codes, scale = norm_quantize(bad, None, None, 0.0, "none", "qint8", torch.tensor(0.5))
    # infinity saturates, as in fake_quantize; NaN does not
    seen = int(codes[1, 7]) == 127 and scale.isfinite().flatten().tolist() == [True, True, False]
    yield "NaN is seen with a fixed scale", float(not seen), 0.0


FAMILIES: dict[str, Callable[[], Iterator[Result]]] = {
    "few_rows": few_rows,
    "many_rows": many_rows,
    "epilogues": epilogues,
    "rows": rows,
    "both_quantized": both_quantized,
}


def main(family: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    triton_interpreter.install()
    for name, found, bound in FAMILIES[family]():
        print(json.dumps([name, found, bound]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
