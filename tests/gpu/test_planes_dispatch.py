"""Which kernel a weight on a GPU gets, and that programs made of packed weights compute the same; no GPU is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import oracle
import pytest
import torch
from torch._subclasses import FakeTensorMode

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.dispatch import choose, kernels, register, unregister
from qcompile.kernels.triton.register import pack_planes, unpack_planes
from qcompile.kernels.triton.table import TABLE
from qcompile.kernels.triton.table import choose as configuration
from qcompile.kernels.triton.target import Target, pretend

qc = torch.ops.qcompile
MATRIX = [s for s in oracle.SCHEMES if "channel=1" not in s and "channel=-1" not in s]
STACK = ["qint4/group=32/affine/float16", "qint8/tensor/symmetric/float32", "qint3/block=3x8/shift/bfloat16",
         "qfloat8_e5m2/group=7/symmetric/float16"]  # fmt: skip
A100, T4, MI300, H100 = Target("sm_80", 108), Target("sm_75", 40), Target("gfx942", 304), Target("sm_90", 132)


@pytest.mark.parametrize("scheme", MATRIX)
def test_packing_is_undone_exactly(scheme: str) -> None:
    q = QTensor.quantize(oracle.data(30, 75), Scheme.parse(scheme))
    back = unpack_planes(pack_planes(q, None, False), q.scheme, q.shape, None, False)
    assert all(a is b is None or torch.equal(a.float(), b.float())
               for a, b in ((q.data, back.data), (q.scale, back.scale), (q.zero, back.zero)))  # fmt: skip
    assert back.data.dtype == q.data.dtype and back.scale.dtype == q.scale.dtype


@pytest.mark.parametrize("scheme", STACK)
def test_packing_a_stack_is_undone_exactly(scheme: str) -> None:
    q = QTensor.quantize(oracle.data(3, 10, 75), Scheme.parse(scheme))
    back = unpack_planes(pack_planes(q, None, False), q.scheme, q.shape, None, False)
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("scheme", MATRIX)
def test_the_reference_on_packed_weights_is_the_logical_one(scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    q = QTensor.quantize(oracle.data(30, 75), parsed)
    x, bias = oracle.data(4, 75, seed=1), torch.randn(30)
    (kernel,) = (k for k in kernels("linear", "cuda") if k.name == "triton-planes")
    packed = kernel.pack(q, None, False)
    logical = {"x": x, "bias": bias, "scheme": scheme, "activation": "silu", "mul": None, "add": None, "glu": False}
    got = kernel.target(*kernel.arguments(packed.tensors, packed.sizes, logical))
    want = oracle.wide(x) @ oracle.value(q).T + oracle.wide(bias)
    assert oracle.relative(got, want / (1 + pow(2.718281828459045, -want))) < 2e-6


@pytest.mark.parametrize(
    ("operator", "scheme", "shape", "says"),
    [
        ("linear", "qint4/group=32/affine/float16", (64, 64), ""),
        ("linear", "qint3/channel=0/symmetric/float32", (63, 65), ""),
        ("linear", "qfloat8_e4m3fn/channel=0/symmetric/float32", (64, 64), ""),
        ("embedding", "qint8/group=32/symmetric/float16", (64, 64), ""),
        ("grouped_linear", "qint4/group=32/affine/float16", (2, 64, 64), ""),
        ("linear", "qint4/channel=1/affine/float16", (64, 64), "scales must follow rows"),
        ("grouped_linear", "qint4/channel=0/affine/float16", (2, 64, 64), "scales of a stack"),
        ("conv", "qint8/channel=0/symmetric/float32", (8, 8, 3, 3), "no kernel"),
    ],
)
def test_what_is_chosen_for_a_gpu(operator: str, scheme: str, shape: tuple[int, ...], says: str) -> None:
    kernel, why = choose(operator, "cuda", Scheme.parse(scheme), shape, torch.float16)
    assert (kernel is not None and kernel.name == "triton-planes") if not says else kernel is None and says in why


def test_what_a_device_cannot_do_is_said() -> None:
    scheme = Scheme.parse("qfloat8_e4m3fn/channel=0/symmetric/float32")
    with pretend(T4):
        kernel, why = choose("linear", "cuda", scheme, (64, 64), torch.float16)
        assert kernel is None and "sm_80" in why and "sm_75" in why
    for target, mark in ((A100, "sm_80 has no such type"), (MI300, "gfx942 has no such type"), (H100, None)):
        with pretend(target):
            kernel, _ = choose("linear", "cuda", scheme, (64, 64), torch.float16)
            assert kernel is not None
            described = kernel.described(scheme, (64, 64), torch.float16)
            assert mark in described if mark else described == "triton-planes"


@pytest.mark.parametrize(
    ("m", "says"),
    [(1, "gemv template"), (16, "gemm template of Inductor's, K in 8 parts"), (512, "gemm template of Inductor's)"),
     (4000, "decoded, then")],
)  # fmt: skip
def test_the_report_says_how_a_call_is_computed(m: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme.parse("qint4/group=32/affine/float16")
    with pretend(A100), FakeTensorMode():
        x = torch.empty(m, 4096, dtype=torch.float16, device="cuda")
        kernel, _ = choose("linear", "cuda", scheme, (4096, 4096), torch.float16)
        assert kernel is not None
        monkeypatch.setattr("qcompile.kernels.cuda.linear.possible", lambda *_: False)
        assert f"triton-planes ({says}" in kernel.described(scheme, (4096, 4096), torch.float16, x)
        monkeypatch.setattr("qcompile.kernels.cuda.linear.possible", lambda *_: True)
        if m <= 8:
            assert kernel.described(scheme, (4096, 4096), torch.float16, x) == "triton-planes (called)"


@pytest.mark.parametrize("family", TABLE)
def test_the_table_covers_every_m(family: str) -> None:
    limits = [most for most, _ in TABLE[family]]
    assert limits[-1] == 0 and limits[:-1] == sorted(limits[:-1])
    targets = (A100, H100, MI300, Target("sm_89", 128), Target("sm_100", 148))
    (target,) = [t for t in targets if t.family == family]
    ways = [configuration(target, m, 4096, 4096, 4, False)[0].way for m in (1, 2, 3, 16, 17, 300, 5000)]
    assert ways == ["gemv", "gemv", "gemm", "gemm", "gemm", "gemm", "dense"]
    for m in (1, 16, 300):
        for k in (1, 33, 4096, 28672):
            config, split = configuration(target, m, 64, k, 4, False)
            blocks = -(-k // 128)
            assert 1 <= split <= max(1, blocks) and (config.way != "gemv" or split <= -(-blocks // config.bb))


def test_operators_on_fake_cuda_tensors() -> None:
    q = QTensor.quantize(oracle.data(30, 75), Scheme.parse("qint4/group=32/affine/float16"))
    packed = pack_planes(q, None, False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in packed.tensors if t is not None]
        x = torch.empty(2, 3, 75, dtype=torch.float16, device="cuda")
        y = qc.linear_planes(x, *parts, None, 4, "int", 32, 30)
        assert y.device.type == "cuda" and y.shape == (2, 3, 30) and y.dtype == torch.float16


@pytest.fixture
def planes_on_cpu() -> Iterator[None]:
    """The GPU's kernels offered for the CPU, where their operators run by the reference."""
    added = [register(dataclasses.replace(k, device="cpu", refuses=lambda *_: None)) for k in kernels(device="cuda")]
    yield
    for kernel in added:
        unregister(kernel)


class Block(torch.nn.Module):
    """Siblings, a gate, a residual, a lookup: what is stacked and fused before it is packed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(20, 64)
        self.q, self.k = torch.nn.Linear(64, 48), torch.nn.Linear(64, 40)
        self.gate, self.up = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(64, 96, bias=False)
        self.down = torch.nn.Linear(96, 64)

    def forward(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.table(index)
        return self.q(x), self.k(x), x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("weights", ["qint4", "qint8", "qfloat8"])
def test_a_program_packed_for_a_gpu_computes_the_same(weights: str, planes_on_cpu: None) -> None:
    import qcompile

    index = torch.arange(6).view(2, 3)
    exported = torch.export.export(Block().eval(), (index,))
    quantized = qcompile.quantize(exported, weights=weights)
    with torch.no_grad():
        want = quantized.module()(index)
    compiled = qcompile.compile(quantized)
    with torch.no_grad():
        got = compiled(index)
    for g, w in zip(got, want, strict=True):
        assert float((g - w).norm() / w.norm()) < 1e-5


def test_a_frozen_module_is_packed_for_a_gpu(planes_on_cpu: None) -> None:
    import qcompile

    model, index = Block().eval(), torch.arange(6).view(2, 3)
    qcompile.quantize(model, weights="qint4")
    with torch.no_grad():
        want = model(index)
        qcompile.freeze(model)
        assert "packed for triton-planes" in str(model.down.q_weight)
        for got in (model(index), torch.compile(model, backend="aot_eager")(index)):
            for g, w in zip(got, want, strict=True):
                assert float((g - w).norm() / w.norm()) < 1e-5
        assert oracle.relative(model.down.weight @ torch.eye(96), oracle.wide(model.down.weight.dequantize())) < 1e-6
    logical = model.down.q_weight.logical()
    state = model.state_dict()
    assert torch.equal(state["down.weight._data"], logical.data)
    model.load_state_dict(state)
