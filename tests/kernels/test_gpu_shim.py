"""The emulator itself: that it computes what a GPU does, and that it reports what a GPU would not survive."""

from __future__ import annotations

import gpu_emulator
import pytest
import torch

pytestmark = pytest.mark.skipif(gpu_emulator.COMPILER is None, reason="needs a C++ compiler")

SOURCE = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

kernel void sums(device const float* x, device float* y, uint3 group [[threadgroup_position_in_grid]],
                 uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    threadgroup float parts[2];
    const float whole = simd_sum(x[group.x * 64 + simd * 32 + lane]);
    if (lane == 0) parts[simd] = whole;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0 && simd == 0) y[group.x] = parts[0] + parts[1];
}

kernel void no_barrier(device const float* x, device float* y, uint3 group [[threadgroup_position_in_grid]],
                       uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    threadgroup float parts[2];
    const float whole = simd_sum(x[group.x * 64 + simd * 32 + lane]);
    if (lane == 0) parts[simd] = whole;
    if (lane == 0 && simd == 0) y[group.x] = parts[0] + parts[1];
}

kernel void divergent(device const float* x, device float* y, uint3 group [[threadgroup_position_in_grid]],
                      uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    if (lane < 16) threadgroup_barrier(mem_flags::mem_threadgroup);
    y[0] = simd_sum(x[lane]);
}

kernel void leaves(device const float* x, device float* y, uint3 group [[threadgroup_position_in_grid]],
                   uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    if (lane == 3) return;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[0] = x[0];
}

kernel void reads_outside(device const float* x, device float* y, uint3 group [[threadgroup_position_in_grid]],
                          uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    y[lane % 2] = x[128 + 4 * lane];
}

kernel void writes_outside(device const float* x, device float* y, uint3 group [[threadgroup_position_in_grid]],
                           uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    if (lane == 5) y[2] = x[0];
}

kernel void product(device const float* x, device float* y, uint3 group [[threadgroup_position_in_grid]],
                    uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    simdgroup_float8x8 a, b, c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_load(a, x, 8);
    simdgroup_load(b, x + 64, 8, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(c, a, b, c);
    simdgroup_store(c, y, 8);
}
"""


def run(name: str, x: torch.Tensor, outputs: int, threads: int = 64, group: int = 64) -> torch.Tensor:
    y = torch.zeros(outputs)
    getattr(gpu_emulator.compile_metal(SOURCE), name)(x, y, threads=(threads,), group_size=(group,), arg_casts={})
    return y


def test_lanes_meet_and_blocks_follow_each_other() -> None:
    x = torch.randn(128)
    torch.testing.assert_close(run("sums", x, 2, 128), x.view(2, 64).sum(1))


def test_matrices() -> None:
    x = torch.randn(128)
    expected = x[:64].view(8, 8) @ x[64:].view(8, 8).T + 1
    torch.testing.assert_close(run("product", x, 64, 32, 32).view(8, 8), expected)


def test_a_missing_barrier_reads_what_nobody_wrote() -> None:
    assert run("no_barrier", torch.ones(64), 1).isnan().all()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("divergent", r"deadlock: lanes from 0 on wait at threadgroup_barrier in line \d+; from 16 on wait at simd_sum"),
        ("leaves", "from 3 on have left the kernel"),
        ("reads_outside", r"outside argument 0: byte \d+ of 512"),
        ("writes_outside", "wrote behind the end of argument 1"),
    ],
)
def test_what_goes_wrong_is_said(name: str, problem: str) -> None:
    with pytest.raises(gpu_emulator.KernelError, match=problem):
        run(name, torch.ones(128), 2, 32, 32)


def test_threads_must_fill_their_groups() -> None:
    with pytest.raises(ValueError, match="whole threadgroups"):
        run("sums", torch.ones(128), 2, 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_floats_round_as_torch_does(dtype: torch.dtype) -> None:
    name = "half" if dtype == torch.float16 else "bfloat"
    source = f"""
#include <metal_stdlib>
using namespace metal;
kernel void convert(device const float* x, device {name}* y, device float* back,
                    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                    uint simd [[simdgroup_index_in_threadgroup]]) {{
    const int i = group.x * 32 + lane;
    y[i] = {name}(x[i]);
    back[i] = float(y[i]);
}}
"""
    special = torch.tensor(
        [0.0, -0.0, 65504, 65519.9, 65520, 1e30, -1e30, 6e-8, 2.9e-8, 6.1e-5, float("inf"), float("-inf")]
    )
    x = torch.cat([special, torch.randn(20), 1e-6 * torch.randn(64), 1 + torch.arange(96) * 2.0**-12, 1e5 * torch.randn(64)])
    x, y = x[: len(x) // 32 * 32].contiguous(), torch.empty(len(x) // 32 * 32, dtype=dtype)
    back = torch.empty(len(x))
    gpu_emulator.compile_metal(source).convert(x, y, back, threads=(len(x),), group_size=(32,), arg_casts={})
    assert torch.equal(y.view(torch.int16), x.to(dtype).view(torch.int16)) and torch.equal(back, x.to(dtype).float())
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[: 2**16].float()
    y, back = torch.empty(2**16, dtype=dtype), torch.empty(2**16)
    gpu_emulator.compile_metal(source).convert(every, y, back, threads=(2**16,), group_size=(32,), arg_casts={})
    finite = every.isfinite()
    assert torch.equal(back[finite], every[finite]) and back[every.isnan()].isnan().all()
