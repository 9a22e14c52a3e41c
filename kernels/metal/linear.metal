// Weight-only linear on the "rows" layout (kernels/layouts/rows.py): y = act(x @ W.T + bias) [* mul] [+ add].
//
// The host puts these definitions before the text, so that one source serves every scheme (kernels/metal/source.py):
//   QC_FLOAT      type of x, mul, add and y: half, float or bfloat
//   QC_TILE       type of the tiles that the matrix units read: half or float
//   QC_BITS       4 or 8: bits a code takes
//   QC_SCALE      type of scale: float, half or bfloat
//   QC_ZERO_KIND  0 symmetric (zero = 2^(bits-1)), 1 zero in code units (uchar), 2 shift in value units
//   QC_ZERO       type of zero
//   QC_BIAS       type of bias
//   QC_HAS_BIAS, QC_HAS_MUL, QC_HAS_ADD   0 or 1
//   QC_ACTIVATION 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu, 5 sigmoid, 6 tanh,
//                                               7 relu6, 8 hardswish, 9 hardsigmoid
//   QC_M          rows of x that gemv takes at once: 1 to 4
//   QC_ALIGNED    1 where every whole chunk of x may be read four elements at a time
//
// Sums are float32. A code enters as an unsigned number; what the zero point takes away is added up once a chunk:
//   sum (u - z) s x = s (sum u x - z sum x).

#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

#define CHUNK 16  // columns that share a scale and are read with one load
#define LANES 32
#define UNROLL _Pragma("clang loop unroll(full)")

#if QC_BITS == 4
typedef uint2 Word;  // one chunk of codes
#else
typedef uint4 Word;
#endif

typedef vec<QC_FLOAT, 4> Float4;

// Where a chunk of padded columns lies in x: its first column and how many of its 16 there are.
struct Span {
    int group;
    int start;
    int count;
};

inline Span span_of(int chunk, int chunks_per_group, int group_size, int K) {
    Span span;
    span.group = chunk / chunks_per_group;
    const int within = (chunk - span.group * chunks_per_group) * CHUNK;
    span.start = span.group * group_size + within;
    span.count = max(0, min(min(CHUNK, group_size - within), K - span.start));
    return span;
}

// Code j of a chunk, times 16^(j % 4) where there are two a byte: a mask alone, no shift. `Scaled` below undoes it.
inline float code_scaled(Word word, int j) {
#if QC_BITS == 4
    return float((word[j / 8] >> (j % 8 / 4 * 16)) & (15u << (4 * (j % 4))));
#else
    return float((word[j / 4] >> (8 * (j % 4))) & 255u);
#endif
}

inline float unscale(int j) {
#if QC_BITS == 4
    return j % 4 == 0 ? 1.0f : j % 4 == 1 ? 0.0625f : j % 4 == 2 ? 0.00390625f : 0.000244140625f;
#else
    return 1.0f;
#endif
}

// What a group adds to a sum of codes: w = u * scale + offset.
inline float offset_of(float scale, device const QC_ZERO* zero, int at) {
#if QC_ZERO_KIND == 0
    return -float(1 << (QC_BITS - 1)) * scale;
#elif QC_ZERO_KIND == 1
    return -float(zero[at]) * scale;
#else
    return float(zero[at]);
#endif
}

inline float erf_of(float v) {  // Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most
    const float a = fabs(v);
    const float t = 1.0f / (1.0f + 0.3275911f * a);
    const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float e = 1.0f - p * precise::exp(-a * a);
    return v < 0.0f ? -e : e;
}

#if QC_ACTIVATION >= 7
inline float to_six(float v) { return v < 0.0f ? 0.0f : v > 6.0f ? 6.0f : v; }  // NaN stays
#endif

inline float activate(float v) {
#if QC_ACTIVATION == 1
    return v > 0.0f ? v : (v != v ? v : 0.0f);
#elif QC_ACTIVATION == 2
    return 0.5f * v * (1.0f + erf_of(v * 0.70710678f));
#elif QC_ACTIVATION == 3
    return 0.5f * v * (1.0f + precise::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
#elif QC_ACTIVATION == 4
    return v / (1.0f + precise::exp(-v));
#elif QC_ACTIVATION == 5
    return 1.0f / (1.0f + precise::exp(-v));
#elif QC_ACTIVATION == 6
    return precise::tanh(v);
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

inline void finish(
    float sum, int row, int column, int N, device const QC_BIAS* bias, device const QC_FLOAT* mul,
    device const QC_FLOAT* add, device QC_FLOAT* y
) {
    const long at = long(row) * N + column;
#if QC_HAS_BIAS
    sum += float(bias[column]);
#endif
    sum = activate(sum);
#if QC_HAS_MUL
    sum *= float(mul[at]);
#endif
#if QC_HAS_ADD
    sum += float(add[at]);
#endif
    y[at] = QC_FLOAT(sum);
}

// A few rows of x. A simdgroup takes ROWS rows of W; its lanes take turns at their chunks, 32 of which lie side by side.
// Threads: 64 a threadgroup; grid: ceil(N / (2 ROWS)) x ceil(M / QC_M).
#define ROWS 4

kernel void gemv(
    device const QC_FLOAT* x [[buffer(0)]],      // [M, K]
    device const uchar* codes [[buffer(1)]],     // [N, chunks * 2 * QC_BITS]
    device const QC_SCALE* scale [[buffer(2)]],  // [N, groups]
    device const QC_ZERO* zero [[buffer(3)]],    // [N, groups]
    device const QC_BIAS* bias [[buffer(4)]],    // [N]
    device const QC_FLOAT* mul [[buffer(5)]],    // [M, N]
    device const QC_FLOAT* add [[buffer(6)]],    // [M, N]
    device QC_FLOAT* y [[buffer(7)]],            // [M, N]
    constant int& M [[buffer(8)]],
    constant int& N [[buffer(9)]],
    constant int& K [[buffer(10)]],
    constant int& group_size [[buffer(11)]],
    constant int& groups [[buffer(12)]],
    constant int& chunks [[buffer(13)]],
    uint3 where [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd_index [[simdgroup_index_in_threadgroup]]
) {
    const int first_n = (int(where.x) * 2 + int(simd_index)) * ROWS;
    const int first_m = int(where.y) * QC_M;
    const int chunks_per_group = (group_size + CHUNK - 1) / CHUNK;

    float sum[QC_M][ROWS];
    UNROLL
    for (int m = 0; m < QC_M; m++) {
        UNROLL
        for (int r = 0; r < ROWS; r++) sum[m][r] = 0.0f;
    }
    for (int chunk = int(lane); chunk < chunks; chunk += LANES) {
        const Span span = span_of(chunk, chunks_per_group, group_size, K);
        float values[QC_M][CHUNK];
        float total[QC_M];
        UNROLL
        for (int m = 0; m < QC_M; m++) {
            // a row beyond the last is computed again and not written
            device const QC_FLOAT* from = x + long(min(first_m + m, M - 1)) * K + span.start;
            total[m] = 0.0f;
#if QC_ALIGNED
            if (span.count == CHUNK) {
                UNROLL
                for (int j = 0; j < CHUNK; j += 4) {
                    const Float4 four = *(device const Float4*)(from + j);
                    UNROLL
                    for (int i = 0; i < 4; i++) values[m][j + i] = float(four[i]);
                }
            } else
#endif
            {
                UNROLL
                for (int j = 0; j < CHUNK; j++) values[m][j] = j < span.count ? float(from[j]) : 0.0f;
            }
            UNROLL
            for (int j = 0; j < CHUNK; j++) {
                total[m] += values[m][j];
                values[m][j] *= unscale(j);
            }
        }
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            const int n = min(first_n + r, N - 1);
            const Word word = *(device const Word*)(codes + (long(n) * chunks + chunk) * (2 * QC_BITS));
            const int at = n * groups + span.group;
            const float s = float(scale[at]);
            const float offset = offset_of(s, zero, at);
            UNROLL
            for (int m = 0; m < QC_M; m++) {
                float dot = 0.0f;
                UNROLL
                for (int j = 0; j < CHUNK; j++) dot = fma(code_scaled(word, j), values[m][j], dot);
                sum[m][r] += s * dot + offset * total[m];
            }
        }
    }
    UNROLL
    for (int m = 0; m < QC_M; m++) {
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            const float whole = simd_sum(sum[m][r]);
            if (lane == 0 && first_m + m < M && first_n + r < N) {
                finish(whole, first_m + m, first_n + r, N, bias, mul, add, y);
            }
        }
    }
}

// Many rows of x: tiles of 32 x 64 results, 32 columns at a time. All 128 threads decode one chunk of W each and copy 8
// elements of x into threadgroup memory; then each of the 4 simdgroups multiplies its 16 x 32 part as 2 x 4 matrices.
// Threads: 128 a threadgroup; grid: ceil(N / 64) x ceil(M / 32).
#define TILE_M 32
#define TILE_N 64
#define TILE_K 32
#define STRIDE 40  // of a row of a tile: TILE_K, and 8 that keep rows out of each other's banks

kernel void gemm(
    device const QC_FLOAT* x [[buffer(0)]],
    device const uchar* codes [[buffer(1)]],
    device const QC_SCALE* scale [[buffer(2)]],
    device const QC_ZERO* zero [[buffer(3)]],
    device const QC_BIAS* bias [[buffer(4)]],
    device const QC_FLOAT* mul [[buffer(5)]],
    device const QC_FLOAT* add [[buffer(6)]],
    device QC_FLOAT* y [[buffer(7)]],
    constant int& M [[buffer(8)]],
    constant int& N [[buffer(9)]],
    constant int& K [[buffer(10)]],
    constant int& group_size [[buffer(11)]],
    constant int& groups [[buffer(12)]],
    constant int& chunks [[buffer(13)]],
    uint3 where [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd_index [[simdgroup_index_in_threadgroup]]
) {
    threadgroup QC_TILE x_tile[TILE_M * STRIDE];
    threadgroup QC_TILE w_tile[TILE_N * STRIDE];
    threadgroup float y_tile[TILE_M * TILE_N];

    const int thread_index = int(simd_index) * LANES + int(lane);
    const int first_n = int(where.x) * TILE_N;
    const int first_m = int(where.y) * TILE_M;
    const int chunks_per_group = (group_size + CHUNK - 1) / CHUNK;
    const int part_m = int(simd_index) / 2 * 16;
    const int part_n = int(simd_index) % 2 * 32;

    simdgroup_float8x8 sum[2][4];
    UNROLL
    for (int i = 0; i < 2; i++) {
        UNROLL
        for (int j = 0; j < 4; j++) sum[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (int base = 0; base < chunks; base += TILE_K / CHUNK) {
        {  // x: thread t copies columns 8 (t % 4) .. + 8 of row t / 4
            const int row = thread_index / 4;
            const int column = thread_index % 4 * 8;
            const Span span = span_of(base + column / CHUNK, chunks_per_group, group_size, K);
            const bool there = first_m + row < M && base + column / CHUNK < chunks;
            const int left = there ? span.count - column % CHUNK : 0;
            device const QC_FLOAT* from = x + long(min(first_m + row, M - 1)) * K + span.start + column % CHUNK;
            UNROLL
            for (int j = 0; j < 8; j++) {
                x_tile[row * STRIDE + column + j] = QC_TILE(j < left ? float(from[j]) : 0.0f);
            }
        }
        {  // W: thread t decodes chunk t % 2 of row t / 2
            const int row = thread_index / 2;
            const int n = min(first_n + row, N - 1);
            const int chunk = min(base + thread_index % 2, chunks - 1);
            const Word word = *(device const Word*)(codes + (long(n) * chunks + chunk) * (2 * QC_BITS));
            const int at = n * groups + chunk / chunks_per_group;
            const float s = float(scale[at]);
            const float offset = offset_of(s, zero, at);
            UNROLL
            for (int j = 0; j < CHUNK; j++) {
                const float code = code_scaled(word, j) * unscale(j);
                w_tile[row * STRIDE + thread_index % 2 * CHUNK + j] = QC_TILE(fma(code, s, offset));
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL
        for (int k = 0; k < TILE_K; k += 8) {
            simdgroup_matrix<QC_TILE, 8, 8> a[2];
            simdgroup_matrix<QC_TILE, 8, 8> b[4];
            UNROLL
            for (int i = 0; i < 2; i++) simdgroup_load(a[i], x_tile + (part_m + 8 * i) * STRIDE + k, STRIDE);
            UNROLL
            for (int j = 0; j < 4; j++) {
                simdgroup_load(b[j], w_tile + (part_n + 8 * j) * STRIDE + k, STRIDE, ulong2(0, 0), true);
            }
            UNROLL
            for (int i = 0; i < 2; i++) {
                UNROLL
                for (int j = 0; j < 4; j++) simdgroup_multiply_accumulate(sum[i][j], a[i], b[j], sum[i][j]);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            simdgroup_store(sum[i][j], y_tile + (part_m + 8 * i) * TILE_N + part_n + 8 * j, TILE_N);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int at = thread_index; at < TILE_M * TILE_N; at += 128) {
        const int row = first_m + at / TILE_N;
        const int column = first_n + at % TILE_N;
        if (row < M && column < N) finish(y_tile[at], row, column, N, bias, mul, add, y);
    }
}
