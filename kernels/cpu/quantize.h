// Activations on the way in: int8 by blocks of 32 columns (scale = largest magnitude / 127, or one that is known), laid out
// block by block as the tiled weight is, padding 0; or, for the exact path, float32 in the same order.
#pragma once

#include "half.h"
#include "kernels.h"
#include "lanes.h"

namespace qcompile {
namespace {

// Rows lie in panels of as many as the register tile takes (the last one may be a smaller power of two, its missing rows
// 0), so that a panel is read front to back: codes [panel][block][row][32], scale [panel][block][row], and so on.
struct Quantized {
  int8_t* codes;
  float* scale;
  float* sums;  // [panel][group][row]: the sum of the group's quantized values, for the zero points
  // Null, or [panel][block + 1][row]: the sum of the block's codes, then what begin_sums makes of it.
  uint32_t* first = nullptr;

  // The panel that begins with a row.
  Quantized panel(const Weight& w, int64_t row) const {
    return {codes + row * w.blocks * kBlock, scale + row * w.blocks, sums + row * w.groups,
            first == nullptr ? nullptr : first + row * (w.blocks + 1)};
  }
};

// Calls f(g, b, column, valid) for each block b of a row, in order: its group, first column, and columns in use.
template <class Fn>
inline void for_each_block(const Weight& w, Fn f) {
  for (int64_t g = 0, b = 0; g < w.groups; ++g) {
    const int64_t end = g + 1 < w.groups ? (g + 1) * w.group_size : w.cols;
    for (int64_t column = g * w.group_size; column < end; column += kBlock, ++b)
      f(g, b, column, end - column < kBlock ? int(end - column) : kBlock);
  }
}

// 32 values of a row from `column` on, the last ones 0 where fewer are valid.
template <class V>
inline void load_block(const char* row, DType t, int64_t column, int valid, typename V::F& lo, typename V::F& hi) {
  const char* p = row + column * int64_t(element_size(t));
  lo = load_some<V>(p, t, valid < kTile ? valid : kTile);
  hi = valid <= kTile ? V::set1(0.0f) : load_some<V>(p + 16 * element_size(t), t, valid - kTile);
}

// The scale that a whole row takes: its largest magnitude / 127, NaN where not all of it is finite, 0 for a row of zeros.
template <class V>
float row_scale(const Weight& w, const char* row, DType t) {
  uint32_t largest = 0;
  for_each_block(w, [&](int64_t, int64_t, int64_t column, int valid) {
    typename V::F lo, hi;
    load_block<V>(row, t, column, valid, lo, hi);
    const uint32_t bits = V::largest_magnitude(lo, hi);
    largest = bits > largest ? bits : largest;
  });
  if (largest >= 0x7f800000u) return bits_to_float(0x7fc00000u);
  return bits_to_float(largest) < 1e-36f ? 0.0f : bits_to_float(largest) / 127.0f;
}

// A row as row `r` of a panel of `width`; the pointers are those of the panel. `known`: the scale of all blocks, or null.
template <class V>
void quantize_row(const Weight& w, const char* row, DType t, const Quantized& panel, int64_t r, int64_t width,
                  const float* known) {
  using F = typename V::F;
  bool whole = true;  // no block is NaN
  if (panel.first == nullptr)
    for (int64_t g = 0; g < w.groups; ++g) panel.sums[g * width + r] = 0.0f;
  const auto add = [&](int64_t g, int64_t b, float scale, int32_t codes) {
    if (panel.first != nullptr)
      panel.first[b * width + r] = uint32_t(codes);
    else
      panel.sums[g * width + r] += scale * float(codes);
  };
  const auto block = [&](int64_t g, int64_t b, int64_t column, int valid) {
    F lo, hi;
    load_block<V>(row, t, column, valid, lo, hi);
    int8_t* codes = panel.codes + (b * width + r) * kBlock;
    float& scale = panel.scale[b * width + r];
    const uint32_t bits = V::largest_magnitude(lo, hi);  // as an integer, where NaN > infinity > every number
    if (known != nullptr && *known > 0.0f && bits <= 0x7f800000u) {  // what lies outside of the range, infinity too, saturates
      const F top = V::set1(127.0f * *known), bottom = V::set1(-127.0f * *known);
      lo = V::max(V::min(lo, top), bottom);
      hi = V::max(V::min(hi, top), bottom);
      scale = *known;
      return add(g, b, scale, V::quantize(lo, hi, 1.0f / *known, codes));
    }
    const float largest = bits_to_float(bits);
    if (bits >= 0x7f800000u || largest < 1e-36f || known != nullptr) {
      // Not finite: the scale is NaN, and so is all that the row gives. Tiny: 127 / largest overflows; it counts as 0.
      std::memset(codes, 0, kBlock);
      scale = bits >= 0x7f800000u || (known != nullptr && *known != *known) ? bits_to_float(0x7fc00000u) : 0.0f;
      whole = whole && scale == 0.0f;
      return add(g, b, scale, 0);
    }
    scale = largest / 127.0f;
    add(g, b, scale, V::quantize(lo, hi, 127.0f / largest, codes));
  };
  bool done = false;
  if constexpr (V::kRoundsFour)
    if (known == nullptr && t == DType::kFloat32 && w.group_size % kBlock == 0) {
      alignas(16) int32_t sums[4];
      for (int64_t b = 0, g = 0, group_end = w.blocks_per_group; b < w.blocks;) {
        const int64_t column = b * kBlock, left = w.cols - column;
        float* scale = panel.scale + b * width + r;
        const bool four = left >= 4 * kBlock && V::quantize_four(reinterpret_cast<const float*>(row) + column,
                                                                 panel.codes + (b * width + r) * kBlock, width * kBlock,
                                                                 scale, width, sums);
        if (!four) block(g, b, column, int(left < kBlock ? left : kBlock));
        for (int i = 0; i < (four ? 4 : 1); ++i, ++b) {
          if (four) add(g, b, scale[i * width], sums[i]);
          if (b + 1 == group_end) ++g, group_end += w.blocks_per_group;
        }
      }
      done = true;
    }
  if (!done) for_each_block(w, block);
  if (!whole && known != nullptr)  // a row that has one scale is not asked for that of each block
    for (int64_t b = 0; b < w.blocks; ++b) panel.scale[b * width + r] = bits_to_float(0x7fc00000u);
}

// Once a panel's rows are there, from the sums of blocks: those of groups, if anybody asks for them; and for codes that are
// multiplied as they are stored, unsigned (many.h), -middle times the sum of the block's codes. Where a row has one scale that
// is of all blocks before; one more has all. Modulo 2^32.
inline void begin_sums(const Weight& w, const Quantized& panel, int64_t width, bool one_scale) {
  const uint32_t middle = 1u << (w.bits - 1);
  if (w.zero_kind != Zero::kMiddle) {
    std::memset(panel.sums, 0, size_t(w.groups * width) * 4);
    for (int64_t b = 0; b < w.blocks; ++b) {
      const int64_t g = b / w.blocks_per_group * width, at = b * width;
      for (int64_t r = 0; r < width; ++r) panel.sums[g + r] += panel.scale[at + r] * float(int32_t(panel.first[at + r]));
    }
  }
  if (!one_scale) {
    for (int64_t i = 0; i < w.blocks * width; ++i) panel.first[i] *= 0u - middle;
    return;
  }
  for (int64_t r = 0; r < width; ++r) {
    uint32_t before = 0;
    for (int64_t at = r; at < w.blocks * width; at += width) {
      const uint32_t own = panel.first[at];
      panel.first[at] = before;
      before -= middle * own;
    }
    panel.first[w.blocks * width + r] = before;
  }
}

// As quantize_row for the exact path; what is rounded, by a scale that is known, becomes float again.
template <class V>
void widen_row(const Weight& w, const char* row, DType t, float* panel, int64_t r, int64_t width, const float* known) {
  using F = typename V::F;
  for_each_block(w, [&](int64_t, int64_t b, int64_t column, int valid) {
    F part[2];
    load_block<V>(row, t, column, valid, part[0], part[1]);
    for (int i = 0; i < 2; ++i) {
      if (known != nullptr) {
        const F top = V::set1(127.0f), bottom = V::set1(-127.0f), scale = V::set1(*known);
        const F steps = *known > 0.0f ? V::mul(part[i], V::set1(1.0f / *known)) : V::set1(0.0f);
        part[i] = V::mul(V::round(V::max(bottom, V::min(top, steps))), scale);  // in this order NaN stays NaN
      }
      V::store(panel + (b * width + r) * kBlock + 16 * i, part[i]);
    }
  });
}

}  // namespace
}  // namespace qcompile
