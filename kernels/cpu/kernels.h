// What the registered operators (ops.cpp) ask of the kernels, in plain C++: no torch header, no allocation, no checks.
// Everything here has been validated by the caller; a kernel may trust every size and pointer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qcompile {

constexpr int kTile = 16;   // rows of the weight in a tile
constexpr int kBlock = 32;  // columns of the weight in a block
constexpr int kMostRows = 8;  // rows of activations in the largest register tile

enum class DType : int { kFloat32, kFloat16, kBFloat16 };
enum class Zero : int { kMiddle, kCode, kShift };  // 2^(bits-1), uint8 in code units, float in value units
enum class Code : int { kInteger, kE4m3fn, kE4m3fnuz, kE5m2 };  // float8 codes are 8 bits and have no zero point
enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh, kRelu6, kHardswish, kHardsigmoid };
constexpr Activation kLastActivation = Activation::kHardsigmoid;

inline size_t element_size(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// A weight in the tiled layout (layouts/tiled.py).
struct Weight {
  const uint8_t* codes;  // [tiles, blocks, 64 * bits]
  const void* scale;     // [tiles, groups, 16]
  const void* zero;      // [tiles, groups, 16], or null
  DType scale_dtype;
  Zero zero_kind;
  Code code;
  int bits;
  int64_t tiles, blocks, groups;
  int64_t cols;              // logical K
  int64_t group_size;        // columns of a full group (K when there is one group a row)
  int64_t blocks_per_group;  // blocks of a full group
};

// One output of a linear: `rows` rows of the weight, from `unit` on (a unit is a tile, or a gate and an up tile).
struct Part {
  int64_t unit, rows;
  void* out;         // [m, rows], x's dtype
  const char* bias;  // [rows] (glu: the up bias follows at `bias_up`), or null
  const char* bias_up;
};

// Runs body(begin, end) over [0, total) on the threads that torch uses.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t total, int64_t grain, Body body, void* context);

struct Linear {
  Weight w;
  const char* x;  // [m, cols], contiguous
  DType dtype;    // of x, mul, add and the outputs
  DType bias_dtype;
  int64_t m;
  const Part* parts;
  int64_t part_count, units;
  Activation activation;
  bool glu;
  bool exact;     // float activations; always with float8 codes, which x_scale and per_row then round to floats
  float x_scale;  // of all activations where it is known beforehand, else 0
  bool per_row;   // where it is not: one for each row of x, instead of one for each block of 32
  const char* mul;  // [m, rows of the only part], or null
  const char* add;
  char* scratch;  // ScratchPlan::bytes, 64-byte aligned
  int threads;
  ParallelFor parallel;
};

// A norm of rows: x / sqrt(mean(x^2) + eps) * weight + bias; with `centered`, x less its mean stands for x.
struct Norm {
  const char* weight;  // [cols], or null: there is no norm
  const char* bias;    // [cols], or null
  DType dtype;         // of both
  bool centered;
  float eps;
};

// Rows of their own: out = norm(x), [rows, cols], both contiguous.
struct NormRows {
  Norm norm;
  const char* x;
  char* out;
  DType dtype;  // of both
  int64_t rows, cols;
  ParallelFor parallel;
};

constexpr int kMostStages = 8;

// A linear over what stages before it gave, with or without a norm before it; or a norm alone: then linear.units is 0, and
// of the linear there is what it reads, and its only part, to which the norm writes.
struct Stage {
  Linear linear;  // its scratch is the thread's
  Norm norm;
};
// Stages over the same few rows (at most kMostRows).
struct Chain {
  const Stage* stages;
  int64_t count;
  char* scratch;  // thread_bytes for each thread, 64-byte aligned
  size_t thread_bytes;
  int threads;
  ParallelFor parallel;
};

struct Decode {
  Weight w;
  const void* indices;  // row numbers, or null: rows 0 .. count-1
  bool wide_indices;    // int64, else int32
  int64_t count;
  DType dtype;
  char* out;  // [count, cols]
  ParallelFor parallel;
};

// A float weight to codes (encode.h). The codes of a row are a stream of bits, in whole bytes.
struct Encode {
  const char* x;  // [rows, cols], contiguous
  DType dtype;
  int64_t rows, cols, groups;
  int64_t group_size;  // columns of a full group, at most `cols`
  int bits;            // 2 to 6, or 8
  Zero kind;           // kMiddle: symmetric codes, signed where they have 8 bits, else 2^(bits-1) more than they are
  uint8_t* data;       // [rows, row_bytes]
  int64_t row_bytes;
  void* scale;  // [rows, groups]
  DType scale_dtype;
  void* zero;       // [rows, groups], uint8 or the scale's dtype; nothing of kMiddle
  double* squares;  // [rows, 2]: the sums of squared errors and of squares; NaN where a row has no codes
  float* scratch;   // part_scratch floats for each part of the rows, 64-byte aligned
  int64_t parts, part_scratch;
  ParallelFor parallel;
};

// Scaled dot product attention. Strides are in bytes, of batch, head and position; the last axis is contiguous.
struct Attention {
  const char *q, *k, *v;  // [batch, heads, queries, dim], [batch, kv_heads, keys, dim or value_dim]
  const char* mask;       // [batch, heads, queries, keys], or null
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t mask_stride[4];  // 0 along an axis that the mask does not have
  DType dtype;             // of q, k, v and out
  bool mask_is_bool;       // true: seen; else a number that is added to the score
  bool causal;             // query i sees keys 0 .. i; there is no mask then
  DType mask_dtype;
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  float scale;
  char* out;      // [batch, heads, queries, value_dim]
  char* scratch;  // attention_scratch() bytes, 64-byte aligned
  int threads;
  ParallelFor parallel;
};

struct Conv;       // conv_args.h
struct Depthwise;

struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*decode)(const Decode&);
  void (*encode)(const Encode&);
  void (*attention)(const Attention&);
  void (*conv)(const Conv&);
  void (*conv_codes)(const Conv&);
  void (*depthwise)(const Depthwise&);
  void (*chain)(const Chain&);
  void (*norm)(const NormRows&);
};

// Where the activations of a linear over m rows lie in its scratch, whatever the instruction set: byte offsets.
struct ScratchPlan {
  int64_t rows;  // m and its padding
  size_t scale, sums, first, bytes;

  ScratchPlan(const Weight& w, int64_t m, bool exact) {
    rows = m < kMostRows ? 1 : (m + kMostRows - 1) / kMostRows * kMostRows;
    while (rows < m) rows *= 2;
    auto pad = [](size_t n) { return (n + 63) / 64 * 64; };
    scale = pad(size_t(rows) * size_t(w.blocks) * kBlock * (exact ? 4 : 1));
    sums = scale + pad(size_t(rows) * size_t(w.blocks) * 4);
    first = sums + pad(size_t(rows) * size_t(w.groups) * 4);
    bytes = first + (m > kMostRows && !exact ? pad(size_t(rows) * size_t(w.blocks + 1) * 4) : 0);
  }
};

// The part of a chain's scratch that a stage takes: its activations, and behind them its normalized rows.
inline size_t stage_bytes(const Linear& a) {
  return (ScratchPlan(a.w, a.m, a.exact).bytes + size_t(a.m * a.w.cols) * 4 + 127) / 64 * 64;
}

extern const Kernels kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;
void avx2_depthwise(const Depthwise&);
void avx2_decode(const Decode&);  // of kAvx2, for kAvxVnni
void avx2_encode(const Encode&);
void avx2_attention(const Attention&);
extern const Kernels kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

// The kernels in use: the best this processor runs, or what QCOMPILE_ISA names. Throws std::runtime_error on a name
// that is unknown or that the processor lacks.
const Kernels& kernels();
void set_isa(const char* name);  // "" = choose again

}  // namespace qcompile
