// In the place of kernels/cuda/ptx.h: the same names, computed on the CPU by lanes that are fibers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fibers.h"
#include "floats.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(n)
#define __shared__ SHIM_SHARED

typedef unsigned short u16;
typedef unsigned int u32;
struct alignas(16) u32x4 {
    u32 at[4];
};

struct Dim {
    int x, y, z;
};
inline Dim& shim_block() {
    static Dim at;
    return at;
}
#define threadIdx (Dim{shim::block().current, 0, 0})
#define blockIdx shim_block()
inline void __syncthreads(int line = __builtin_LINE()) { shim::meet(shim::IN_BLOCK, "__syncthreads", line); }
using std::min;

inline u32x4 load_streaming(const void* from) {
    if ((uintptr_t)from % 16) shim::fail("a load of 16 bytes that is not aligned");
    return *(const u32x4*)from;
}
inline u32 and_or(u32 a, u32 mask, u32 b) { return (a & mask) | b; }
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    u32 v = 0;
    for (int i = 0; i < 4; i++) v |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return v;
}
inline float float_of_bits(u32 bits) { return shim::float_of(bits); }
inline float float_of_half(u16 h) { return shim::half_to_float(h); }
inline u16 half_of_float(float f) { return shim::float_to_half(f); }
inline float float_of_bfloat(u16 b) { return shim::bfloat_to_float(b); }
inline u16 bfloat_of_float(float f) { return shim::float_to_bfloat(f); }

inline u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 v = 0;
    for (int s = 0; s < 32; s += 16) {
        // a product of halves is exact in float; the sums here are, too
        const float f = float_of_half(a >> s) * float_of_half(b >> s) + float_of_half(c >> s);
        v |= (u32)half_of_float(f) << s;
    }
    return v;
}
inline u32 add_half2(u32 a, u32 b) { return fma_half2(a, 0x3c003c00u, b); }
inline u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    u32 v = 0;
    for (int s = 0; s < 32; s += 16) {
        const float f = float_of_bfloat(a >> s) * float_of_bfloat(b >> s) + float_of_bfloat(c >> s);
        v |= (u32)bfloat_of_float(f) << s;
    }
    return v;
}
inline u32 bfloat2_of_floats(float low, float high) { return bfloat_of_float(low) | (u32)bfloat_of_float(high) << 16; }

// mma.m16n8k16 as the PTX manual lays out its fragments.
inline void shim_mma(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, float (*wide)(u16), int line) {
    struct Brought {
        float a[4][2], b[2][2];
    } mine;
    for (int i = 0; i < 2; i++) {
        for (int r = 0; r < 4; r++) mine.a[r][i] = wide(a[r] >> 16 * i);
        mine.b[0][i] = wide(b0 >> 16 * i);
        mine.b[1][i] = wide(b1 >> 16 * i);
    }
    shim::meet(shim::IN_WARP, "mma", line, &mine, sizeof mine);
    const int group = shim::lane_index() / 4, thread = shim::lane_index() % 4;
    for (int e = 0; e < 4; e++) {
        const int row = group + e / 2 * 8, column = 2 * thread + e % 2;
        float dot = 0;
        for (int k = 0; k < 16; k++) {
            const Brought& left = shim::seen_by<Brought>(row % 8 * 4 + k % 8 / 2);
            const Brought& right = shim::seen_by<Brought>(column * 4 + k % 8 / 2);
            dot += left.a[row / 8 + 2 * (k / 8)][k % 2] * right.b[k / 8][k % 2];
        }
        sum[e] += dot;
    }
}
inline void mma_half(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, int line = __builtin_LINE()) {
    shim_mma(sum, a, b0, b1, float_of_half, line);
}
inline void mma_bfloat(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, int line = __builtin_LINE()) {
    shim_mma(sum, a, b0, b1, float_of_bfloat, line);
}
