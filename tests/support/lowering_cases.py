"""Programs that Inductor lowers for a GPU: ``python lowering_cases.py run`` interprets what is generated and compares it
with float64, ``code ARCH`` compiles it and says what the machine code is, ``choices`` what autotuning would choose from,
``opaque`` what stays a call.

JSON lines, one a case. Processes of their own, as ``triton_cases.py``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton_interpreter
from fake_gpu import generate
from generated import Generated
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton_cases import AMPERE, BF16, CDNA, F16, F32, FLOAT8, HOPPER, data, error, weight

from qcompile.kernels.ops._tiled import ACTIVATIONS
from qcompile.kernels.triton.target import Target

qc = torch.ops.qcompile
A100, H100, MI300 = Target("sm_80", 108), Target("sm_90", 132), Target("gfx942", 304)


@dataclass(frozen=True)
class Case:
    """A program, what it is given, and what it must give.

    want: the same program on float64. bound: of the relative error. kinds: of the kernels that may be generated.
    sizes: with a dynamic number of rows, those that it is run with besides.
    """

    name: str
    function: Callable[..., Any]
    arguments: Sequence[Tensor]
    want: Callable[..., Any]
    bound: float
    kinds: tuple[str, ...]
    target: Target = AMPERE
    sizes: tuple[int, ...] = ()
    text: tuple[str, ...] = ()


def linear(
    n: int, k: int, m: int = 20, bits: int = 4, group: int = 32, mode: str = "codes", dtype: torch.dtype = F16,
    activation: str = "none", gate: bool = False, kind: str = "int", scale: torch.dtype = F16,
) -> tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]:  # fmt: skip
    """A linear with bias and residual, in codes and in float64, and its arguments ``x, codes, scale[, zero], bias, add``."""
    parts, matrix = weight(2 * n if gate else n, k, bits, group, mode, scale, kind)
    held = [part for part in parts if part is not None]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        codes, s, *zero, bias, add = rest
        z = zero[0] if zero else None
        return qc.linear_planes_forward(x, codes, s, z, bias, bits, kind, group, n, activation, None, add, gate)

    def want(x: Tensor, *rest: Tensor) -> Tensor:
        y, act = x.double() @ matrix.T + rest[-2].double(), ACTIVATIONS[activation]
        return (act(y[..., :n]) * y[..., n:] if gate else act(y)) + rest[-1].double()

    bias, add = torch.randn(2 * n if gate else n), data(m, n, dtype=dtype)
    return function, want, [data(m, k, dtype=dtype), *held, bias, add]


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """A next operator's quantization, with a fixed scale."""
    return qc.fake_quantize(x, scale, "qint8")


def normalized(x: Tensor, scale: Tensor) -> Tensor:
    """A next operator's norm, which needs whole rows."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + scale)).to(x.dtype)


def _normalized_wide(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + scale)


def _rounded_wide(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-128, 127).round() * scale


def recoded(x: Tensor, scale: Tensor) -> Tensor:
    """A next operator's norm and codes, one scale a token."""
    found, step = qc.norm_quantize(x, None, None, 1e-5, "rms", "qint8")
    return found.float() * step


def _recoded_wide(x: Tensor, scale: Tensor) -> Tensor:
    y = _normalized_wide(x, scale)
    step = y.abs().amax(-1, keepdim=True) / 127
    return (y / step).round() * step


def followed(
    name: str, made: tuple[Callable[..., Any], Callable[..., Any], list[Tensor]], after: str, bound: float, *kinds: str,
    **options: Any,
) -> Case:  # fmt: skip
    """A case of a linear and what comes after it."""
    function, want, arguments = made
    f, w = {"rounded": (rounded, _rounded_wide), "normalized": (normalized, _normalized_wide),
            "recoded": (recoded, _recoded_wide)}[after]  # fmt: skip
    step = float(want(*arguments).abs().max()) / 100 if after == "rounded" else 1e-5
    arguments = [torch.tensor(step), *arguments]
    return Case(name, lambda s, *a: f(function(*a), s), arguments, lambda s, *a: w(want(*a), s), bound, kinds, **options)


def cases() -> Iterator[Case]:
    """Every form of a linear, and what may be in one kernel with it."""
    # a rounding that falls to the other side is a whole step
    yield followed("K in one piece", linear(96, 512, 33, activation="silu"), "rounded", 8e-3, "template")
    yield followed("K split, then a norm", linear(64, 4096, 16), "normalized", 8e-4, "template", "persistent_reduction",
                   target=A100)  # fmt: skip
    yield followed("one row, K split", linear(40, 8192, 1), "normalized", 8e-4, "template", "persistent_reduction",
                   target=A100)  # fmt: skip
    yield followed("one row", linear(41, 193, 1, bits=8, mode="shift", group=0), "rounded", 8e-3, "template")
    yield followed("two rows", linear(41, 1100, 2, dtype=BF16, bits=2), "rounded", 2e-2, "template")
    yield followed("gate", linear(72, 512, 20, activation="silu", gate=True), "rounded", 8e-3, "template")
    yield followed("gate, one row", linear(33, 256, 1, activation="gelu", gate=True), "rounded", 8e-3, "template")
    yield followed("gate, two rows", linear(33, 256, 2, activation="relu", gate=True), "rounded", 8e-3, "template")
    yield followed("gate, K split", linear(40, 4096, 5, activation="silu", gate=True), "rounded", 8e-3, "template",
                   "pointwise", target=A100)  # fmt: skip
    yield followed("many rows", linear(40, 256, 1100), "rounded", 8e-3, "pointwise", "pointwise",
                   text=("dequantize_planes.default(", "extern_kernels.addmm("))  # fmt: skip
    yield followed("any number of rows", linear(72, 512, 33), "rounded", 8e-3, "template", sizes=(2, 5, 70))
    yield followed("any number of rows, gate", linear(72, 512, 33, gate=True), "rounded", 8e-3, "template", sizes=(2, 70))
    yield followed("any number of rows, K split", linear(40, 4096, 9), "normalized", 8e-4, "template",
                   "persistent_reduction", target=A100, sizes=(2, 20))  # fmt: skip
    for bits, group, mode, dtype, target, bound in (
        (3, 64, "shift", BF16, HOPPER, 2e-2), (8, 0, "none", F32, AMPERE, 8e-3), (2, 7, "codes", F16, CDNA, 8e-3),
        (4, 128, "none", BF16, CDNA, 2e-2),
    ):  # fmt: skip
        made = linear(70, 200, 18, bits, group, mode, dtype)
        yield followed(f"{bits} bits {mode} {dtype} {target.arch}", made, "rounded", bound, "template", target=target)
    for kind in FLOAT8:
        made = linear(33, 193, 9, 8, 0, "none", kind=kind)
        yield followed(kind, made, "rounded", 8e-3, "template")
    yield from in_codes()
    yield from views()
    norm, codes_too = "persistent_reduction", ("persistent_reduction", "template") * 4
    yield layer("a layer", None, 1e-5, norm, "template", "pointwise", "template", norm, "template", "template")
    yield layer("a layer of codes", "qint8", 2e-3, *codes_too)


def codes(
    n: int, k: int, m: int, group: int = 0, gate: bool = False, dtype: torch.dtype = torch.int8
) -> tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]:
    """A linear of codes by codes with bias, activation and residual: arguments ``x, x_scale, data, scale, bias, add``."""
    rows, name = 2 * n if gate else n, {torch.int8: "qint8", torch.float8_e4m3fn: "qfloat8_e4m3fn"}[dtype]
    x_scheme = f"{name}/group={k}/symmetric/float32"
    scheme = f"{name}/group={group}/symmetric/float16" if group else f"{name}/channel=0/symmetric/float16"

    def code(*shape: int) -> Tensor:
        return (60 * torch.randn(shape)).clamp(-120, 120).to(dtype)

    def function(x: Tensor, x_scale: Tensor, w: Tensor, scale: Tensor, bias: Tensor, add: Tensor) -> Tensor:
        given = (x, x_scale, w, scale, bias, x_scheme, scheme, [rows, k], F16)
        return qc.linear_quantized(*given, "silu", None, add, gate)

    def want(x: Tensor, x_scale: Tensor, w: Tensor, scale: Tensor, bias: Tensor, add: Tensor) -> Tensor:
        wide = scale.double().view(rows, -1).repeat_interleave(group or k, 1)[:, :k]
        y, act = x.double() @ (w.double() * wide).T * x_scale.double() + bias.double(), ACTIVATIONS["silu"]
        return (act(y[:, :n]) * y[:, n:] if gate else act(y)) + add.double()

    scale = (torch.rand(rows, -(-k // group)) if group else torch.rand(rows)).add(0.5).to(F16) / 1000
    arguments = [code(m, k), torch.rand(m, 1) / 100, code(rows, k), scale, torch.randn(rows), data(m, n, dtype=F16)]
    return function, want, arguments


def in_codes() -> Iterator[Case]:
    """Products of codes, and what follows them."""
    yield followed("codes", codes(72, 256, 20), "rounded", 8e-3, "template")
    yield followed("codes in groups", codes(72, 256, 20, group=32), "rounded", 8e-3, "template")
    yield followed("codes with a gate", codes(40, 200, 9, gate=True), "rounded", 8e-3, "template")
    float8 = codes(40, 128, 9, dtype=torch.float8_e4m3fn)
    yield followed("codes of float8", float8, "rounded", 8e-3, "template", target=HOPPER)
    kinds = ("template", "persistent_reduction")
    yield followed("codes, K split, then codes", codes(64, 4096, 5), "recoded", 8e-3, *kinds, target=A100)
    yield followed("codes, any number of rows", codes(64, 256, 20), "recoded", 8e-3, *kinds)
    yield followed("codes, many rows", codes(64, 128, 65), "recoded", 8e-3, "template", "pointwise",
                   text=("norm_quantize.default(",))  # fmt: skip


def views() -> Iterator[Case]:
    """x of other shapes and strides; siblings."""
    function, want, (x, *rest) = linear(40, 96, 12)
    wide = data(3, 4, 200, dtype=F16)
    add = rest[-1].view(3, 4, 40)
    yield Case("a slice, three axes", lambda x, *a: function(x.narrow(-1, 104, 96), *a), [wide, *rest[:-1], add],
               lambda x, *a: want(x.narrow(-1, 104, 96), *a), 8e-4, ("template",))  # fmt: skip
    yield Case("a transposed x", lambda x, *a: function(x.t(), *a), [x.t().contiguous(), *rest],
               lambda x, *a: want(x.t(), *a), 8e-4, ("pointwise", "template"))  # fmt: skip
    for name, k, m, target in (("siblings", 256, 20, AMPERE), ("siblings, K split", 4096, 5, A100)):
        parts, matrix = weight(96, k, 4, 32, "codes")
        bias = torch.randn(96)

        def stacked(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor) -> Tensor:
            q, k, v = qc.linear_planes_split_forward(x, codes, scale, zero, bias, 4, "int", 32, [48, 16, 32])
            return torch.cat([v * 2, k.float().square().to(k.dtype), q], dim=1)

        def apart(x: Tensor, *rest: Tensor, matrix: Tensor = matrix, bias: Tensor = bias) -> Tensor:
            q, k, v = (x.double() @ matrix.T + bias.double()).split([48, 16, 32], dim=1)
            return torch.cat([v * 2, k.square(), q], dim=1)

        kinds = ("template", "pointwise") if target is AMPERE else ("template", "pointwise", "pointwise")
        yield Case(name, stacked, [data(m, k, dtype=F16), *parts, bias], apart, 2e-3, kinds, target)


class Layer(torch.nn.Module):
    """What stands between two attentions: norm, siblings, output projection and residual, norm, gate, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = torch.nn.RMSNorm(64, eps=1e-5), torch.nn.RMSNorm(64, eps=1e-5)
        self.q, self.k, self.o = (torch.nn.Linear(64, 64) for _ in range(3))
        self.gate, self.up = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(64, 96, bias=False)
        self.down = torch.nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        x = x + self.o(self.q(h) * self.k(h))
        h = self.after(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


def layer(name: str, activations: str | None, bound: float, *kinds: str) -> Case:
    """A layer, through every pass, to a program for a GPU, and from there to what runs on it."""
    import qcompile
    from qcompile.export import lowered
    from qcompile.kernels.dispatch import kernels, register, unregister

    added = [register(dataclasses.replace(k, device="cpu", refuses=lambda *_: None)) for k in kernels(device="cuda")]
    try:
        x = torch.randn(20, 64)
        exported = torch.export.export(Layer().eval(), (x,))
        weights = "qint8" if activations else "qint4"
        exported = qcompile.quantize(exported, weights=weights, activations=activations, min_elements=0)
        program = lowered(exported)
    finally:
        for kernel in added:
            unregister(kernel)
    held = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    inputs = [named.get(n.name) for n in program.graph.find_nodes(op="placeholder")]
    arguments = [x if name is None else held[name].detach() for name in inputs]

    def want(*given: Tensor) -> Tensor:
        return exported.module()(given[inputs.index(None)]).double()

    return Case(name, program.graph_module, arguments, want, bound, kinds)


def run() -> Iterator[tuple[str, float, float, list[str], list[str], bool]]:
    """Name, error, bound, kinds of kernels that were launched, kinds that were to be, whether the expected text is there."""
    for case in cases():
        generated = Generated(generate(case.function, case.arguments, case.target, dynamic=bool(case.sizes)))
        said = all(text in generated.source for text in case.text)
        rows = case.arguments[-1].shape[0]
        for size in (rows, *case.sizes):
            again = [data(size, *a.shape[1:], dtype=a.dtype) if case.sizes and i in (1, len(case.arguments) - 1) else a
                     for i, a in enumerate(case.arguments)]  # fmt: skip
            (got,) = generated(*again)
            name = case.name if size == rows else f"{case.name}: {size}"
            launched = [k.kind for k in generated.launched]
            yield name, error(got, case.want(*again)), case.bound, launched, list(case.kinds), said


def large(target: Target, m: int, n: int, gate: bool, dtype: torch.dtype, bits: int) -> Generated:
    """The program of a layer of a real model's size: bias, activation, residual and what rounds the result for the next.

    dtype: of x; int8 stands for codes on both sides.
    """
    k, groups = 4096, 32
    rows = 2 * n if gate else n
    if dtype == torch.int8:
        with FakeTensorMode():
            product, _, arguments = codes(n, k, m, gate=gate)
        return Generated(generate(product, arguments, target))
    tensors = [torch.empty(m, k, dtype=dtype), torch.empty(rows, k * bits // 16, dtype=torch.int16),
               torch.empty(rows, groups, dtype=dtype), torch.empty(rows, groups, dtype=torch.uint8),
               torch.empty(rows, dtype=dtype), torch.empty(m, n, dtype=dtype), torch.tensor(0.5)]  # fmt: skip

    def function(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor, add: Tensor, step: Tensor) -> Tensor:
        y = qc.linear_planes_forward(x, codes, scale, zero, bias, bits, "int", 128, n, "silu", None, add, gate)
        return rounded(y, step)

    return Generated(generate(function, tensors, target))


def code(arch: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and facts of the templates that real layers get."""
    from qcompile.kernels.triton.static_code import read, weights_per_step

    (target,) = [t for t in (A100, H100, MI300) if t.arch == arch]
    for m, n, gate, dtype, bits in (
        (1, 14336, True, F16, 4), (1, 4096, False, BF16, 8), (16, 4096, False, F16, 4), (16, 14336, True, BF16, 4),
        (64, 14336, False, F16, 8), (512, 4096, False, BF16, 4), (5, 14336, True, torch.int8, 8),
        (300, 4096, False, torch.int8, 8),
    ):  # fmt: skip
        (kernel,) = large(target, m, n, gate, dtype, bits).templates
        decoded = 0 if dtype == torch.int8 else weights_per_step(kernel.constants)
        facts = read(kernel.compiled(arch), arch, kernel.options["num_warps"], decoded)
        split = kernel.constants["SPLIT"]
        yield f"M={m} N={n} gate={gate} {dtype} {bits} bits split={split}", dataclasses.asdict(facts)


def choices() -> Iterator[tuple[str, list[str], list[str]]]:
    """What autotuning is given: the configurations of the choices, and the table's."""
    from qcompile.kernels.triton.table import choose

    for target in (A100, MI300):
        for m in (1, 16, 512):
            found: list[Any] = []

            def take(name: str, choices: list[Any], *_: Any, found: list[Any] = found, **__: Any) -> tuple[Any, Any]:
                found.extend(choices)
                return choices[0].output_node(), choices[0]

            with (
                torch._inductor.config.patch(max_autotune=True),
                mock.patch("qcompile.kernels.triton.lowering.autotune_select_algorithm", take),
            ):
                large(target, m, 4096, False, F16, 4)
            seed = choose(target, m, 4096, 4096, 4, False)[0]
            first = [f"BN={seed.bn}", f"num_warps={seed.warps}", f"num_stages={seed.stages}"]
            yield f"{target.arch} M={m}", [c.description for c in found], first


def opaque() -> Iterator[tuple[str, list[str]]]:
    """The calls that stay calls, where the CUDA C++ kernel takes so few rows."""
    function, _, arguments = linear(32, 256, 4)

    def program(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor, add: Tensor) -> tuple[Tensor, ...]:
        y = function(x, codes, scale, zero, bias, add)
        return y, *qc.linear_planes_split_forward(x, codes, scale, zero, bias, 4, "int", 32, [8, 24])

    source = generate(program, arguments, A100, compiler=True)
    made = Generated(source)
    yield "few rows", [*made.kinds, *re.findall(r"= torch\.ops\.qcompile\.(\w+)\.default\(", source)]


if __name__ == "__main__":
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    what, *rest = sys.argv[1:]
    if what == "run":
        triton_interpreter.install()
    for line in {"run": run, "code": code, "choices": choices, "opaque": opaque}[what](*rest):
        print(json.dumps(line), flush=True)
