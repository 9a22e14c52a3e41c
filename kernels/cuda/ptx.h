// The few instructions that C++ has no word for, and 16-bit floats as bit patterns: no header of CUDA's is needed.
// Tests put an emulation of the same names in this file's place, and run linear.cu on the CPU.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;

struct alignas(16) u32x4 {
    u32 at[4];
};

// 16 bytes of a weight: read once, so they need no place in the L1 cache.
__device__ __forceinline__ u32x4 load_streaming(const void* from) {
    u32x4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.at[0]), "=r"(v.at[1]), "=r"(v.at[2]), "=r"(v.at[3])
                 : "l"(from));
    return v;
}

// Bits of `a` under the mask, and the bits of `b`.
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 b) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(a), "r"(mask), "r"(b));
    return v;
}

__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

__device__ __forceinline__ float float_of_half(u16 h) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
    return v;
}

__device__ __forceinline__ u16 half_of_float(float f) {
    u16 v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
}

__device__ __forceinline__ float float_of_bits(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float float_of_bfloat(u16 b) { return __uint_as_float(u32(b) << 16); }

__device__ __forceinline__ u16 bfloat_of_float(float f) {  // to nearest even, by hand: sm_75 has no instruction
    const u32 u = __float_as_uint(f);
    return f != f ? u16(0x7fc0) : u16((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

// a * b + c, two halves at once
__device__ __forceinline__ u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 v;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}

__device__ __forceinline__ u32 add_half2(u32 a, u32 b) {
    u32 v;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// sum += a x b: a is 16 rows x 16 columns, b 16 x 8. Lane l has row l / 4 (a[0], a[2]) and l / 4 + 8 (a[1], a[3]) of a, and
// column l / 4 of b; each register holds two neighbouring k.
__device__ __forceinline__ void mma_half(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    u32 v;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}

__device__ __forceinline__ u32 bfloat2_of_floats(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

__device__ __forceinline__ void mma_bfloat(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
