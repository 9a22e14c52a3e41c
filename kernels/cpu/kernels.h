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
enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh };

inline size_t element_size(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// A weight in the tiled layout (layouts/tiled.py).
struct Weight {
  const uint8_t* codes;  // [tiles, blocks, 64 * bits]
  const void* scale;     // [tiles, groups, 16]
  const void* zero;      // [tiles, groups, 16], or null
  DType scale_dtype;
  Zero zero_kind;
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
  bool glu, exact;
  float x_scale;  // of all activations where it is known beforehand, else 0: each block of 32 has its own
  const char* mul;  // [m, rows of the only part], or null
  const char* add;
  char* scratch;  // ScratchPlan::bytes, 64-byte aligned
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

struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*decode)(const Decode&);
};

// Where the activations of a linear over m rows lie in its scratch, whatever the instruction set: byte offsets.
struct ScratchPlan {
  int64_t rows;  // m and its padding
  size_t scale, sums, bytes;

  ScratchPlan(const Weight& w, int64_t m, bool exact) {
    rows = m < kMostRows ? 1 : (m + kMostRows - 1) / kMostRows * kMostRows;
    while (rows < m) rows *= 2;
    auto pad = [](size_t n) { return (n + 63) / 64 * 64; };
    scale = pad(size_t(rows) * size_t(w.blocks) * kBlock * (exact ? 4 : 1));
    sums = scale + pad(size_t(rows) * size_t(w.blocks) * 4);
    bytes = sums + pad(size_t(rows) * size_t(w.groups) * 4);
  }
};

extern const Kernels kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#endif

// The kernels in use: the best this processor runs, or what QCOMPILE_ISA names. Throws std::runtime_error on a name
// that is unknown or that the processor lacks.
const Kernels& kernels();
void set_isa(const char* name);  // "" = choose again

}  // namespace qcompile
