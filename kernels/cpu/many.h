// Many rows of int8 activations, in registers that hold one or two tiles at a time: each four activations that are loaded meet
// all. A slab of each tile is first made ready, in the form that products take, and every panel reads it again. With VNNI
// (V::kReadyUnsigned) that is codes as they are stored, a byte each: they are too large by 2^(bits-1), and sums of products by
// that many times the sum of activations, whose negative is where they begin (Quantized::first). With AVX2 codes less
// 2^(bits-1) are magnitudes and signs, and signs turn x into -x - 1 instead of -x (Avx2::add_product): sums are off by what
// only the weight decides, the product of x = 0, whose negative is where they begin. So nothing is left to correct afterwards
// but zero points that lie elsewhere. V is an instruction set (isa_*.cpp) with kReadyTiles > 0.
#pragma once

#include "tile.h"

namespace qcompile {
namespace {

constexpr int64_t kFewRows = 20;    // up to so many, making a slab ready costs more than it saves
constexpr int kMaxRows = 144;      // rows of activations in a row block

// The rows of x in panels of kManyRows or one less, as equal as can be; or of `step` and what is left.
struct PanelShares {
  int64_t rows, count, step;
  bool even;

  PanelShares(int64_t m, int64_t most, bool equal) : rows(m), count((m + most - 1) / most), step(most), even(equal) {}
  int64_t begin(int64_t panel) const {
    return even ? panel * (rows / count) + min64(panel, rows % count) : min64(panel * step, rows);
  }
};

// Blocks [b0, b1) of a tile, ready to be multiplied. Scales and offsets are those of groups, from that of b0 on.
template <class V>
struct ReadyTile {
  static constexpr int kBytes = 8 * sizeof(typename V::Ready);  // of a block
  const uint8_t* codes;
  // of each block, or each piece of a group where x has one scale a row
  alignas(64) int32_t first[V::kReadyUnsigned ? 1 : V::kReadyBlocks * kTile];
  alignas(64) float scale[V::kReadyBlocks * kTile], offset[V::kReadyBlocks * kTile];

  template <int kBits>
  void make(const Weight& w, int64_t tile, int64_t b0, int64_t b1, bool by_group) {
    const int64_t g0 = b0 / w.blocks_per_group;
    for (int64_t g = g0; g <= (b1 - 1) / w.blocks_per_group; ++g) {
      const auto s = GroupScale<V>::load(w, tile, g, 1 << (kBits - 1));
      V::store(scale + (g - g0) * kTile, s.scale);
      V::store(offset + (g - g0) * kTile, s.offset);
    }
    const uint8_t* cells = w.codes + (tile * w.blocks + b0) * 64 * kBits;
    if constexpr (V::kReadyUnsigned && kBits == 8) {
      codes = cells;
    } else if constexpr (V::kReadyUnsigned) {
      unpack_blocks<V, kBits, false>(cells, b1 - b0, own_);
      codes = own_;
    } else {
      make_signed<kBits>(w, cells, b0, b1, by_group);
      codes = own_;
    }
  }

 private:
  template <int kBits>
  void make_signed(const Weight& w, const uint8_t* cells, int64_t b0, int64_t b1, bool by_group) {
    const int8_t nothing[4] = {};
    const typename V::Cell middle = V::fill_bytes(1 << (kBits - 1));
    uint8_t* out = own_;
    const int64_t g0 = b0 / w.blocks_per_group;
    for (int64_t b = b0, g = g0; b < b1; ++g) {
      const int64_t end = min64((g + 1) * w.blocks_per_group, b1);
      typename V::Int sum = V::no_int();
      for (; b < end; ++b, cells += 64 * kBits, out += kBytes) {
        for_each_chunk<V, kBits>(cells, [&](int chunk, typename V::Cell c) __attribute__((always_inline)) {
          const typename V::Ready ready = V::make_ready(V::sub_bytes(c, middle));
          V::store_ready(out + chunk * sizeof ready, ready);
          sum = V::add_product(sum, V::broadcast4(nothing), ready);
        });
        if (!by_group || b + 1 == end) {
          V::store_int(first + (by_group ? g - g0 : b - b0) * kTile, V::negative(sum));
          sum = V::no_int();
        }
      }
    }
  }

  alignas(64) uint8_t own_[V::kReadyBlocks * kBytes];
};

// A panel of MR rows times kTiles tiles. kOneScale: a row of x has one scale, so that a group
// is summed in integers. kShort: groups are of one block. totals: of each tile, 16 floats a row.
template <class V, int MR, int kTiles, bool kOneScale, bool kShort>
void dot_ready(const Weight& w, const Quantized& panel, const ReadyTile<V>* tiles, int64_t b0,
               int64_t b1, float* const* totals) {
  using F = typename V::F;
  const int64_t g0 = b0 / w.blocks_per_group;
  const int8_t* x = panel.codes + b0 * MR * kBlock;
  const float* x_scale = panel.scale + b0 * MR;
  F sum[kTiles][MR];
  typename V::Int acc[kTiles][MR];
  // Sums of blocks [b, end), of the group at g - g0.
  const auto begin = [&](int64_t b, int64_t end, int64_t at) __attribute__((always_inline)) {
    if constexpr (V::kReadyUnsigned) {
      const uint32_t *first = panel.first + b * MR, *last = panel.first + end * MR;
      for (int m = 0; m < MR; ++m)
        for (int t = 0; t < kTiles; ++t) acc[t][m] = V::fill_int(kOneScale ? last[m] - first[m] : first[m]);
    } else {
      for (int t = 0; t < kTiles; ++t)
        for (int m = 0; m < MR; ++m) acc[t][m] = V::load_int(tiles[t].first + (kOneScale ? at : b - b0) * kTile);
    }
  };
  const bool corrected = w.zero_kind != Zero::kMiddle;
  for (int t = 0; t < kTiles; ++t)
    for (int m = 0; m < MR; ++m) sum[t][m] = kShort ? V::load(totals[t] + m * kTile) : V::set1(0.0f);
  for (int64_t b = b0, g = g0; b < b1; ++g) {
    const int64_t group_end = min64((g + 1) * w.blocks_per_group, w.blocks), end = kShort ? b + 1 : min64(group_end, b1);
    if (kOneScale) begin(b, end, g - g0);
    const float* row_scale = x_scale;
    for (; b < end; ++b, x += MR * kBlock, x_scale += MR) {
      if (!kOneScale) begin(b, b + 1, 0);
      const uint8_t* cells[kTiles];
      for (int t = 0; t < kTiles; ++t) cells[t] = tiles[t].codes + (b - b0) * ReadyTile<V>::kBytes;
#pragma GCC unroll 8
      for (int chunk = 0; chunk < 8; ++chunk) {
        typename V::Ready c[kTiles];
        for (int t = 0; t < kTiles; ++t) c[t] = V::load_ready(cells[t] + chunk * sizeof c[t]);
        for (int m = 0; m < MR; ++m) {
          const auto four = V::broadcast4(x + m * kBlock + 4 * chunk);
          for (int t = 0; t < kTiles; ++t) acc[t][m] = V::add_product(acc[t][m], four, c[t]);
        }
      }
      if (kOneScale) continue;
      for (int m = 0; m < MR; ++m) {
        const F scale = V::set1(x_scale[m]);
        for (int t = 0; t < kTiles; ++t) {
          const F value = V::to_float(acc[t][m]);
          if constexpr (kShort)
            sum[t][m] = V::fma(V::mul(value, scale), V::load(tiles[t].scale + (g - g0) * kTile), sum[t][m]);
          else
            sum[t][m] = V::fma(value, scale, sum[t][m]);
        }
      }
    }
    for (int t = 0; t < kTiles; ++t) {
      const F scale = V::load(tiles[t].scale + (g - g0) * kTile), offset = V::load(tiles[t].offset + (g - g0) * kTile);
      for (int m = 0; m < MR; ++m) {
        float* total = totals[t] + m * kTile;
        if constexpr (kOneScale) sum[t][m] = V::mul(V::to_float(acc[t][m]), V::set1(row_scale[m]));
        if constexpr (!kShort) V::store(total, V::fma(sum[t][m], scale, V::load(total)));
        if constexpr (!kShort) sum[t][m] = V::set1(0.0f);
        if (corrected && b == group_end) {
          const F x_sum = V::set1(panel.sums[g * MR + m]);
          if constexpr (kShort) sum[t][m] = V::fnma(offset, x_sum, sum[t][m]);
          else V::store(total, V::fnma(offset, x_sum, V::load(total)));
        }
      }
    }
  }
  if constexpr (kShort)
    for (int t = 0; t < kTiles; ++t)
      for (int m = 0; m < MR; ++m) V::store(totals[t] + m * kTile, sum[t][m]);
}

// More than kFewRows rows in so many panels are never less than `step - 1` each.
constexpr bool two_widths(int64_t step) {
  for (int64_t m = kFewRows + 1; m < step * step; ++m)
    if (m / ((m + step - 1) / step) < step - 1) return false;
  return true;
}

// Panels [p0, p1) of x, at most kMaxRows rows, times one or two tiles that follow one another; done(row, rows, totals, totals
// of the second tile) for each panel.
template <class V, int kBits, class Done>
void times_ready(const Weight& w, const Quantized& x, bool one_scale, int64_t tile, int tiles, const PanelShares& panels,
                 int64_t p0, int64_t p1, Done done) {
  constexpr int MR = V::kManyRows, kMost = V::kReadyTiles;
  static_assert(two_widths(MR));
  alignas(64) float totals[2][kMaxRows * kTile];
  ReadyTile<V> ready[kMost];
  const int64_t m0 = panels.begin(p0), rows = panels.begin(p1) - m0;
  for (int t = 0; t < tiles; ++t) std::memset(totals[t], 0, size_t(rows * kTile) * 4);
  const int64_t slabs = (w.blocks + V::kReadyBlocks - 1) / V::kReadyBlocks, slab = (w.blocks + slabs - 1) / slabs;
  const int64_t scales = kTile * int64_t(element_size(w.scale_dtype));
  const int64_t share = (slab * kBits + p1 - p0 - 1) / (p1 - p0) * 64;
  for (int first = 0, count; first < tiles; first += count) {
    count = tiles - first < kMost ? tiles - first : kMost;
    for (int64_t b = 0, end; b < w.blocks; b = end) {
      end = min64(b + slab, w.blocks);
      const uint8_t* next[kMost];  // what is made ready next time, fetched while there is much to compute
      for (int t = 0; t < count; ++t) {
        const int64_t own = tile + first + t;
        ready[t].template make<kBits>(w, own, b, end, one_scale);
        const int64_t later = own + (end < w.blocks ? 0 : count), begin = end % w.blocks;
        next[t] = w.codes + (later * w.blocks + begin) * 64 * kBits;
        for (int64_t g = begin / w.blocks_per_group; g * w.blocks_per_group < begin + slab; ++g)
          __builtin_prefetch(static_cast<const char*>(w.scale) + (later * w.groups + g) * scales);
      }
      for (int64_t p = p0; p < p1; ++p) {
        for (int t = 0; t < count; ++t, next[t - 1] += share)
          for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next[t] + i);
        const int64_t at = panels.begin(p);
        const int width = int(panels.begin(p + 1) - at);
        const Quantized panel = x.panel(w, at);
        float* sums[2] = {totals[0] + (at - m0) * kTile, totals[1] + (at - m0) * kTile};
        const auto dot = [&](auto one, auto block) {
          constexpr bool kOne = decltype(one)::value, kShort = decltype(block)::value;
          const auto rows = [&](auto tiles) {
            constexpr int kTiles = decltype(tiles)::value;
            width == MR ? dot_ready<V, MR, kTiles, kOne, kShort>(w, panel, ready, b, end, sums + first)
                        : dot_ready<V, MR - 1, kTiles, kOne, kShort>(w, panel, ready, b, end, sums + first);
          };
          count == kMost ? rows(std::integral_constant<int, kMost>{}) : rows(std::integral_constant<int, 1>{});
        };
        if (one_scale)
          dot(std::true_type{}, std::false_type{});
        else if (w.blocks_per_group == 1)
          dot(std::false_type{}, std::true_type{});
        else
          dot(std::false_type{}, std::false_type{});
        if (first + count == tiles && end == w.blocks) done(at, width, sums[0], sums[1]);
      }
    }
  }
}

}  // namespace
}  // namespace qcompile
