// Weight-only linear for few rows of x, on the "planes" layout (kernels/layouts/planes.py): y = act(x @ W.T + bias) [* mul]
// [+ add]; with QC_GLU, act(x @ Wg.T + bg) * (x @ Wu.T + bu) [* mul] [+ add], the gate's rows first.
//
// The host puts these definitions before the text (kernels/cuda/linear.py):
//   QC_BF16       x, mul, add and y are 0 half, 1 bfloat16            QC_BITS   4 or 8
//   QC_GROUP      columns that share a scale, a multiple of 32; 0 = all of a row
//   QC_SCALE      scale and shift are 0 float, 1 half, 2 bfloat16     QC_BIAS   the same for bias
//   QC_ZERO_KIND  0 symmetric (2^(bits-1)), 1 zero in code units (uint8), 2 shift in value units
//   QC_TILES      tiles of 16 rows of W that a warp works on: 1, 2; 2 with QC_GLU (one of the gate, one of the up rows)
//   QC_COLUMNS    tiles of 8 rows of x: 1, 2 or 4
//   QC_WARPS      warps of a block, a power of two; they share the rows and take turns at the columns
//   QC_ALIGNED    1: x may be read 16 bytes at a time (K is a multiple of 8)
//   QC_GLU, QC_HAS_BIAS, QC_HAS_MUL, QC_HAS_ADD 0 or 1; QC_ACTIVATION 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu, 5 sigmoid, 6 tanh,
//                                               7 relu6, 8 hardswish, 9 hardsigmoid
//
// Few rows of x leave tensor cores idle and memory busy, so W takes the 16 rows of an mma and x its 8 columns: one
// instruction for 256 weights whether M is 1 or 8. A lane needs the same k of W and of x; which k stand at which place
// does not matter as long as both agree. So lane l = 4 g + t simply reads 16 bytes of row g of W, which are columns
// 8t .. 8t + 7 of each run of the block, and the same columns of row g of x: no shuffle, no shared memory, every load 128 bits.
//
// Codes minus zero point are small integers, exact in 16 bits; the scale multiplies float32 sums, once a group. A shift adds
// shift * sum(x), which is one more mma, with ones for W.

#include "ptx.h"

#define RUN 32
#define RUNS (16 / QC_BITS)     // runs of a block
#define BLOCK (RUN * RUNS)      // columns of a block
#define BLOCK_BYTES 64
#define LANES 32

// Runs between two looks at a scale.
#if QC_GROUP == 0 || QC_GROUP % BLOCK == 0
#define FLUSH RUNS
#elif QC_BITS == 4 && QC_GROUP % (2 * RUN) == 0
#define FLUSH 2
#else
#define FLUSH 1
#endif
#define FLUSHES (RUNS / FLUSH)

#if QC_SCALE == 0
typedef float Scale;
__device__ __forceinline__ float scale_value(Scale s) { return s; }
#else
typedef u16 Scale;
__device__ __forceinline__ float scale_value(Scale s) { return QC_SCALE == 1 ? float_of_half(s) : float_of_bfloat(s); }
#endif

#if QC_BIAS == 0
typedef float Bias;
__device__ __forceinline__ float bias_value(Bias b) { return b; }
#else
typedef u16 Bias;
__device__ __forceinline__ float bias_value(Bias b) { return QC_BIAS == 1 ? float_of_half(b) : float_of_bfloat(b); }
#endif

#if QC_ZERO_KIND == 2
typedef Scale Zero;
#else
typedef unsigned char Zero;
#endif

__device__ __forceinline__ float activation_value(u16 v) { return QC_BF16 ? float_of_bfloat(v) : float_of_half(v); }
__device__ __forceinline__ u16 activation_of(float v) { return QC_BF16 ? bfloat_of_float(v) : half_of_float(v); }

// Two codes of run r of a word, less z: two 16-bit floats of neighbouring columns. A code under the mantissa of 2^e is 2^e + code.
__device__ __forceinline__ u32 decode(u32 word, int r, u32 z) {
#if QC_BF16 && QC_BITS == 4
    const u32 magic = and_or(word >> (4 * r), 0x000f000fu, 0x43004300u);  // 128 + code
    return fma_bfloat2(magic, 0x3f803f80u, 0xc300c300u + z * 0x10001u);   // -(128 + z)
#elif QC_BF16
    const float base = -8388608.0f - float(int(z));
    const float low = float_of_bits(permute_bytes(word, 0x4b000000u, r ? 0x7441u : 0x7440u)) + base;  // 2^23 + code
    const float high = float_of_bits(permute_bytes(word, 0x4b000000u, r ? 0x7443u : 0x7442u)) + base;
    return bfloat2_of_floats(low, high);
#elif QC_BITS == 4
    const u32 half_word = word >> (8 * (r / 2));
    if (r % 2 == 0) return add_half2(and_or(half_word, 0x000f000fu, 0x64006400u), 0xe400e400u + z * 0x10001u);  // 1024 + code
    return fma_half2(and_or(half_word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd400d400u + z * 0x100010u);  // 1024 + 16 code
#else
    return add_half2(permute_bytes(word, 0x64646464u, r ? 0x4341u : 0x4240u), 0xe400e400u + z * 0x10001u);
#endif
}

__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if QC_BF16
    mma_bfloat(sum, a, b0, b1);
#else
    mma_half(sum, a, b0, b1);
#endif
}

// 8 neighbouring elements of a row of x, from column k on; zeros beyond the last column or row.
__device__ __forceinline__ u32x4 load_x(const u16* row, int k, int K, bool there) {
    u32x4 v = {{0, 0, 0, 0}};
    if (!there) return v;
#if QC_ALIGNED
    if (k < K) v = *reinterpret_cast<const u32x4*>(row + k);
#else
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 low = k + 2 * i < K ? row[k + 2 * i] : 0;
        const u32 high = k + 2 * i + 1 < K ? row[k + 2 * i + 1] : 0;
        v.at[i] = low | high << 16;
    }
#endif
    return v;
}

// What a warp reads of W for one block of columns.
struct Stage {
    u32x4 words[QC_TILES][2];  // rows g and g + 8 of each tile
    Scale scale[FLUSHES][QC_TILES][2];
#if QC_ZERO_KIND != 0
    Zero zero[FLUSHES][QC_TILES][2];
#endif
};

__device__ __forceinline__ void load_stage(
    Stage& stage, const char* codes, const Scale* scale, const Zero* zero, const int (&rows)[QC_TILES][2], int block,
    int blocks, int groups, int t
) {
#pragma unroll
    for (int i = 0; i < QC_TILES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const long long at = (long long)(rows[i][h]) * blocks + block;
            stage.words[i][h] = load_streaming(codes + at * BLOCK_BYTES + 16 * t);
#pragma unroll
            for (int f = 0; f < FLUSHES; f++) {
#if QC_GROUP
                const int group = min((block * BLOCK + f * FLUSH * RUN) / QC_GROUP, groups - 1);
#else
                const int group = 0;
#endif
                const long long place = (long long)(rows[i][h]) * groups + group;
                stage.scale[f][i][h] = scale[place];
#if QC_ZERO_KIND != 0
                stage.zero[f][i][h] = zero[place];
#endif
            }
        }
    }
}

#if QC_ACTIVATION >= 7
__device__ __forceinline__ float to_six(float v) { return v < 0.0f ? 0.0f : v > 6.0f ? 6.0f : v; }  // NaN stays
#endif

__device__ __forceinline__ float activate(float v) {
#if QC_ACTIVATION == 1
    return v > 0.0f ? v : (v != v ? v : 0.0f);
#elif QC_ACTIVATION == 2
    return 0.5f * v * (1.0f + erff(v * 0.70710678f));
#elif QC_ACTIVATION == 3
    return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
#elif QC_ACTIVATION == 4
    return v / (1.0f + expf(-v));
#elif QC_ACTIVATION == 5
    return 1.0f / (1.0f + expf(-v));
#elif QC_ACTIVATION == 6
    return tanhf(v);
#elif QC_ACTIVATION == 7
    return to_six(v);
#elif QC_ACTIVATION == 8
    return v * to_six(v + 3.0f) / 6.0f;
#elif QC_ACTIVATION == 9
    return to_six(v + 3.0f) / 6.0f;
#elif QC_ACTIVATION == 0
    return v;
#else
#error "an activation that is not known here"
#endif
}

// Grid: ceil(outputs / rows of a block) x ceil(M / (8 QC_COLUMNS)); outputs = N, or N / 2 with QC_GLU.
extern "C" __global__ void __launch_bounds__(LANES * QC_WARPS) qcompile_linear(
    const u16* __restrict__ x,        // [M, K]
    const char* __restrict__ codes,   // [N, blocks * 64 bytes]
    const Scale* __restrict__ scale,  // [N, groups]
    const Zero* __restrict__ zero,    // [N, groups]
    const Bias* __restrict__ bias,    // [N]
    const u16* __restrict__ mul,      // [M, outputs]
    const u16* __restrict__ add,      // [M, outputs]
    u16* __restrict__ y,              // [M, outputs]
    int M, int N, int K, int groups
) {
    __shared__ float parts[QC_WARPS > 1 ? QC_WARPS / 2 : 1][QC_TILES * QC_COLUMNS * 4][LANES];
    const int lane = threadIdx.x % LANES;
    const int warp = threadIdx.x / LANES;
    const int g = lane / 4;
    const int t = lane % 4;
    const int blocks = (K + BLOCK - 1) / BLOCK;
    const int first_m = blockIdx.y * (8 * QC_COLUMNS);
#if QC_GLU
    const int outputs = N / 2;
    const int first_n = blockIdx.x * 16;
    const int tile_step = outputs;
#else
    const int outputs = N;
    const int first_n = blockIdx.x * (16 * QC_TILES);
    const int tile_step = 16;
#endif

    int rows[QC_TILES][2];  // a row beyond the last is read again and not written
    const u16* x_rows[QC_COLUMNS];
    bool there[QC_COLUMNS];
#pragma unroll
    for (int i = 0; i < QC_TILES; i++) {
        rows[i][0] = min(first_n + i * tile_step + g, N - 1);
        rows[i][1] = min(first_n + i * tile_step + g + 8, N - 1);
    }
#pragma unroll
    for (int c = 0; c < QC_COLUMNS; c++) {
        there[c] = first_m + 8 * c + g < M;
        x_rows[c] = x + (long long)(first_m + 8 * c + g) * K;
    }

    float sum[QC_TILES][QC_COLUMNS][4] = {};
    Stage stage;
    if (warp < blocks) load_stage(stage, codes, scale, zero, rows, warp, blocks, groups, t);
    for (int block = warp; block < blocks; block += QC_WARPS) {
        const Stage now = stage;
        if (block + QC_WARPS < blocks) load_stage(stage, codes, scale, zero, rows, block + QC_WARPS, blocks, groups, t);
#pragma unroll
        for (int f = 0; f < FLUSHES; f++) {
            float part[QC_TILES][QC_COLUMNS][4] = {};
#if QC_ZERO_KIND == 2
            float total[QC_COLUMNS][4] = {};
#endif
#pragma unroll
            for (int r = f * FLUSH; r < (f + 1) * FLUSH; r++) {
                u32x4 xs[QC_COLUMNS];
#pragma unroll
                for (int c = 0; c < QC_COLUMNS; c++) {
                    xs[c] = load_x(x_rows[c], block * BLOCK + r * RUN + 8 * t, K, there[c]);
                }
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
#pragma unroll
                    for (int i = 0; i < QC_TILES; i++) {
                        u32 a[4];
#pragma unroll
                        for (int h = 0; h < 2; h++) {
#if QC_ZERO_KIND == 0
                            const u32 z = 1u << (QC_BITS - 1);
#elif QC_ZERO_KIND == 1
                            const u32 z = now.zero[f][i][h];
#else
                            const u32 z = 0;
#endif
                            a[h] = decode(now.words[i][h].at[j], r, z);
                            a[h + 2] = decode(now.words[i][h].at[j + 1], r, z);
                        }
#pragma unroll
                        for (int c = 0; c < QC_COLUMNS; c++) multiply(part[i][c], a, xs[c].at[j], xs[c].at[j + 1]);
                    }
#if QC_ZERO_KIND == 2
                    const u32 one = QC_BF16 ? 0x3f803f80u : 0x3c003c00u;
                    const u32 ones[4] = {one, one, one, one};
#pragma unroll
                    for (int c = 0; c < QC_COLUMNS; c++) multiply(total[c], ones, xs[c].at[j], xs[c].at[j + 1]);
#endif
                }
            }
#pragma unroll
            for (int i = 0; i < QC_TILES; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float s = scale_value(now.scale[f][i][e / 2]);
#pragma unroll
                    for (int c = 0; c < QC_COLUMNS; c++) {
                        sum[i][c][e] += s * part[i][c][e];
#if QC_ZERO_KIND == 2
                        sum[i][c][e] += scale_value(now.zero[f][i][e / 2]) * total[c][e];
#endif
                    }
                }
            }
        }
    }

    // The warps' sums, in halves: the upper half leaves its own, the lower adds them.
#pragma unroll
    for (int half = QC_WARPS / 2; half > 0; half /= 2) {
        if (warp >= half && warp < 2 * half) {
#pragma unroll
            for (int e = 0; e < QC_TILES * QC_COLUMNS * 4; e++) {
                parts[warp - half][e][lane] = sum[e / (4 * QC_COLUMNS)][e / 4 % QC_COLUMNS][e % 4];
            }
        }
        __syncthreads();
        if (warp < half) {
#pragma unroll
            for (int e = 0; e < QC_TILES * QC_COLUMNS * 4; e++) {
                sum[e / (4 * QC_COLUMNS)][e / 4 % QC_COLUMNS][e % 4] += parts[warp][e][lane];
            }
        }
        __syncthreads();
    }
    if (warp > 0) return;
#pragma unroll
    for (int c = 0; c < QC_COLUMNS; c++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int m = first_m + 8 * c + 2 * t + e % 2;
#pragma unroll
            for (int i = 0; i < (QC_GLU ? 1 : QC_TILES); i++) {
                const int n = first_n + 16 * i + g + e / 2 * 8;
                if (m >= M || n >= outputs) continue;
                float v = sum[i][c][e];
                const long long at = (long long)(m) * outputs + n;
#if QC_HAS_BIAS
                v += bias_value(bias[n]);
#endif
                v = activate(v);
#if QC_GLU
                float up = sum[QC_TILES - 1][c][e];
#if QC_HAS_BIAS
                up += bias_value(bias[n + outputs]);
#endif
                v *= up;
#endif
#if QC_HAS_MUL
                v *= activation_value(mul[at]);
#endif
#if QC_HAS_ADD
                v += activation_value(add[at]);
#endif
                y[at] = activation_of(v);
            }
        }
    }
}
