// Many rows of int8 activations, in registers that hold one or two tiles at a time: each four activations that are loaded meet
// all. A slab of each tile is first made ready: codes less their zero point become signed bytes, in the form that products
// take (V::make_ready), which every row block reads again. Products may be off by what only the weight decides: with VNNI x is
// read as x + 128, unsigned, which adds 128 times a block's weights; with AVX2 the signs of weights turn x into -x - 1 instead
// of -x (Avx2::dot). Either is what a product gives where x is 0, and its negative is where sums begin. So nothing is left to
// correct afterwards but zero points that do not fit a byte. V is an instruction set (isa_*.cpp) with kReadyTiles > 0.
#pragma once

#include "tile.h"

namespace qcompile {
namespace {

constexpr int64_t kFewRows = 20;    // up to so many, making a slab ready costs more than it saves
constexpr int kMaxRows = 144;      // rows of activations in a row block
constexpr int kReadyBlocks = 20;  // of all tiles at a time: 20 KiB, most of half an L1 cache

// Blocks [b0, b1) of a tile, ready to be multiplied. Scales and offsets are those of groups, from that of b0 on.
template <class V>
struct ReadyTile {
  static constexpr int kBytes = 8 * sizeof(typename V::Ready);  // of a block
  alignas(64) uint8_t codes[kReadyBlocks * kBytes];
  alignas(64) int32_t first[kReadyBlocks * kTile];    // of each block, or each piece of a group where x has one scale a row
  alignas(64) float scale[kReadyBlocks * kTile], offset[kReadyBlocks * kTile];
  bool corrected;  // whether offsets, each for a unit of the group's sum of activations, are other than 0

  template <int kBits>
  void make(const Weight& w, int64_t tile, int64_t b0, int64_t b1, bool by_group) {
    const uint8_t* cells = w.codes + (tile * w.blocks + b0) * 64 * kBits;
    uint8_t* out = codes;
    const int8_t nothing[4] = {V::kNothing, V::kNothing, V::kNothing, V::kNothing};
    corrected = false;
    const int64_t g0 = b0 / w.blocks_per_group;
    for (int64_t b = b0, g = g0; b < b1; ++g) {
      const int64_t end = min64(min64((g + 1) * w.blocks_per_group, w.blocks), b1);
      const typename V::Cell zero = group<kBits>(w, tile, g, int(g - g0));
      typename V::Int sum = V::no_int();
      for (; b < end; ++b, cells += 64 * kBits, out += kBytes) {
        for_each_chunk<V, kBits>(cells, [&](int chunk, typename V::Cell c) __attribute__((always_inline)) {
          const typename V::Ready ready = V::make_ready(V::sub_bytes(c, zero));
          V::store_ready(out + chunk * sizeof ready, ready);
          sum = V::dot(sum, V::broadcast4(nothing), ready);
        });
        if (!by_group || b + 1 == end) {
          V::store_int(first + (by_group ? g - g0 : b - b0) * kTile, V::negative(sum));
          sum = V::no_int();
        }
      }
    }
  }

 private:
  // The scales of a group; returns the zero points, of 16 rows x 4 columns.
  template <int kBits>
  typename V::Cell group(const Weight& w, int64_t tile, int64_t g, int at) {
    constexpr int kMiddle = 1 << (kBits - 1);
    const auto s = GroupScale<V>::load(w, tile, g, kMiddle);
    V::store(scale + at * kTile, s.scale);
    if (w.zero_kind == Zero::kMiddle) return V::fill_bytes(kMiddle);
    const uint8_t* zero = static_cast<const uint8_t*>(w.zero) + (tile * w.groups + g) * kTile;
    if constexpr (kBits < 8)
      if (w.zero_kind == Zero::kCode && V::below_128(zero)) {
        V::store(offset + at * kTile, V::set1(0.0f));
        return V::fours(zero);
      }
    V::store(offset + at * kTile, s.offset);
    corrected = true;
    return V::fill_bytes(kMiddle);
  }
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
  const auto begin = [&](int64_t at) __attribute__((always_inline)) {
    for (int t = 0; t < kTiles; ++t)
      for (int m = 0; m < MR; ++m) acc[t][m] = V::load_int(tiles[t].first + at * kTile);
  };
  for (int t = 0; t < kTiles; ++t)
    for (int m = 0; m < MR; ++m) sum[t][m] = kShort ? V::load(totals[t] + m * kTile) : V::set1(0.0f);
  for (int64_t b = b0, g = g0; b < b1; ++g) {
    const int64_t group_end = min64((g + 1) * w.blocks_per_group, w.blocks), end = kShort ? b + 1 : min64(group_end, b1);
    if (kOneScale) begin(g - g0);
    const float* row_scale = x_scale;
    for (; b < end; ++b, x += MR * kBlock, x_scale += MR) {
      if (!kOneScale) begin(b - b0);
      const uint8_t* cells[kTiles];
      for (int t = 0; t < kTiles; ++t) cells[t] = tiles[t].codes + (b - b0) * ReadyTile<V>::kBytes;
#pragma GCC unroll 8
      for (int chunk = 0; chunk < 8; ++chunk) {
        typename V::Ready c[kTiles];
        for (int t = 0; t < kTiles; ++t) c[t] = V::load_ready(cells[t] + chunk * sizeof c[t]);
        for (int m = 0; m < MR; ++m) {
          const auto four = V::broadcast4(x + m * kBlock + 4 * chunk);
          for (int t = 0; t < kTiles; ++t) acc[t][m] = V::dot(acc[t][m], four, c[t]);
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
        if (tiles[t].corrected && b == group_end) {
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

// The last panel of a row block may have fewer rows.
template <class V, int MR, int kTiles, bool kOneScale, bool kShort>
void dot_ready_rows(int rows, const Weight& w, const Quantized& panel, const ReadyTile<V>* tiles, int64_t b0, int64_t b1,
                    float* const* totals) {
  if constexpr (MR > 1)
    if (rows < MR) return dot_ready_rows<V, MR - 1, kTiles, kOneScale, kShort>(rows, w, panel, tiles, b0, b1, totals);
  dot_ready<V, MR, kTiles, kOneScale, kShort>(w, panel, tiles, b0, b1, totals);
}

// `rows` (at most kMaxRows) rows of x from m0 on, in panels of kManyRows, times one or two tiles that follow one another;
// done(row, rows, totals, totals of the second tile) for each panel.
template <class V, int kBits, class Done>
void times_ready(const Weight& w, const Quantized& x, bool one_scale, int64_t tile, int tiles, int64_t m0, int rows, Done done) {
  constexpr int MR = V::kManyRows, kMost = V::kReadyTiles;
  alignas(64) float totals[2][kMaxRows * kTile];
  ReadyTile<V> ready[kMost];
  for (int t = 0; t < tiles; ++t) std::memset(totals[t], 0, size_t(rows * kTile) * 4);
  const int64_t slabs = (w.blocks + kReadyBlocks - 1) / kReadyBlocks, slab = (w.blocks + slabs - 1) / slabs;
  const int panels = (rows + MR - 1) / MR;
  const int64_t share = (slab * kBits + panels - 1) / panels * 64;
  for (int first = 0, count; first < tiles; first += count) {
    count = tiles - first < kMost ? tiles - first : kMost;
    for (int64_t b = 0, end; b < w.blocks; b = end) {
      end = min64(b + slab, w.blocks);
      const uint8_t* next[kMost];  // what is made ready next time, fetched while there is much to compute
      for (int t = 0; t < count; ++t) {
        const int64_t own = tile + first + t;
        ready[t].template make<kBits>(w, own, b, end, one_scale);
        next[t] = w.codes + ((own + (end < w.blocks ? 0 : count)) * w.blocks + end % w.blocks) * 64 * kBits;
      }
      for (int m = 0; m < rows; m += MR) {
        for (int t = 0; t < count; ++t, next[t - 1] += share)
          for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next[t] + i);
        const int64_t at = m0 + m;
        const int width = int(min64(MR, rows - m));
        const Quantized panel = {x.codes + at * w.blocks * kBlock, x.scale + at * w.blocks, x.sums + at * w.groups};
        float* sums[2] = {totals[0] + m * kTile, totals[1] + m * kTile};
        const auto dot = [&](auto one, auto block) {
          constexpr bool kOne = decltype(one)::value, kShort = decltype(block)::value;
          count == kMost ? dot_ready_rows<V, MR, kMost, kOne, kShort>(width, w, panel, ready, b, end, sums + first)
                         : dot_ready_rows<V, MR, 1, kOne, kShort>(width, w, panel, ready, b, end, sums + first);
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
