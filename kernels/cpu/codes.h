// int8 activations that all have one scale times a weight as signed bytes: sums stay integers to the end of a group of scales.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace qcompile {
namespace {

// Some tiles of a weight, from `cells` on: [tile][block][8 cells], each byte a code less the middle of its range.
struct Slab {
  uint8_t* cells;
  float* scale;    // [tile][group][16]
  int32_t* start;  // [tile][group][16]: what the sums begin with, where the instruction set needs it
  int64_t blocks, groups, blocks_per_group;
  int chunks, last_chunks;  // in use in the last block of a group, and of the last group
};

template <class V, int kBits>
void fill_tile(const Weight& w, int64_t tile, const Slab& slab, int64_t to) {
  using Product = typename V::Signed;
  const typename V::Cell middle = V::fill_bytes(uint8_t(256 - (1 << (kBits - 1))));
  const uint8_t* from = w.codes + tile * w.blocks * 64 * kBits;
  uint8_t* cells = slab.cells + to * w.blocks * 512;
  alignas(64) const int8_t zeros[4] = {Product::kZero, Product::kZero, Product::kZero, Product::kZero};
  for (int64_t g = 0, b = 0; g < w.groups; ++g) {
    const int64_t at = to * w.groups + g;
    V::store(slab.scale + at * kTile, GroupScale<V>::load(w, tile, g, 0.0f).scale);
    typename Product::Acc sum[4] = {Product::zero(), Product::zero(), Product::zero(), Product::zero()};
    for (const int64_t end = min64(b + w.blocks_per_group, w.blocks); b < end; ++b, from += 64 * kBits, cells += 512) {
      const int used = b + 1 < end ? 8 : g + 1 < w.groups ? slab.chunks : slab.last_chunks;
      for_each_chunk<V, kBits>(from, [&](int chunk, typename V::Cell c) {
        const auto w = V::add_bytes(c, middle);
        V::store_cell(cells + 64 * chunk, w);
        if (Product::kZero != 0 && chunk < used) Product::step(sum[chunk % 4], Product::prepare(w), Product::spread(zeros));
      });
    }
    if constexpr (Product::kZero != 0) Product::store_negative(slab.start + at * kTile, sum);
  }
}

template <class V>
void fill_tile(const Weight& w, int64_t tile, const Slab& slab, int64_t to) {
  switch (w.bits) {
    case 2: return fill_tile<V, 2>(w, tile, slab, to);
    case 3: return fill_tile<V, 3>(w, tile, slab, to);
    case 4: return fill_tile<V, 4>(w, tile, slab, to);
    case 5: return fill_tile<V, 5>(w, tile, slab, to);
    case 6: return fill_tile<V, 6>(w, tile, slab, to);
    default: return fill_tile<V, 8>(w, tile, slab, to);
  }
}

// A panel of kRows rows x [block][row][32] times kTiles tiles; take(sums) has them in units of the scale of x, as floats in
// registers. kGrouped: the weight's own scales are in them too.
template <class V, class Product, int kRows, int kTiles, bool kGrouped, class Take>
__attribute__((always_inline)) inline void times_codes(const Slab& s, const int8_t* x, Take take) {
  using F = typename V::F;
  const uint8_t* cells = s.cells;
  const int64_t tile_bytes = s.blocks * 512;
  F total[kRows][kTiles];
  for (int64_t g = 0, b = 0; g < (kGrouped ? s.groups : 1); ++g) {
    typename Product::Acc acc[kRows][kTiles];
    for (int t = 0; t < kTiles; ++t) {
      typename Product::Acc start = Product::zero();
      if constexpr (Product::kZero != 0) start = Product::load(s.start + (t * s.groups + g) * kTile);
      for (int m = 0; m < kRows; ++m) acc[m][t] = start;
    }
    const auto step = [&](int chunk) __attribute__((always_inline)) {
      typename Product::Prepared w[kTiles];
      for (int t = 0; t < kTiles; ++t) w[t] = Product::prepare(V::load_cell(cells + t * tile_bytes + 64 * chunk));
      for (int m = 0; m < kRows; ++m) {
        const auto four = Product::spread(x + m * kBlock + 4 * chunk);
        for (int t = 0; t < kTiles; ++t) Product::step(acc[m][t], w[t], four);
      }
    };
    const int64_t end = min64(b + s.blocks_per_group, s.blocks);
    const int last = g + 1 < s.groups ? s.chunks : s.last_chunks;
    for (; b < end; ++b, cells += 512, x += kRows * kBlock) {
      // one loop for whole blocks and others: with two, compilers move the sums about between them
      const int used = b + 1 < end ? 8 : last;
#pragma GCC unroll 1
      for (int chunk = 0; chunk < used; ++chunk) step(chunk);
    }
    for (int t = 0; t < kTiles; ++t) {
      F scale;
      if constexpr (kGrouped) scale = V::load(s.scale + (t * s.groups + g) * kTile);
      for (int m = 0; m < kRows; ++m) {
        const F sum = Product::finish(acc[m][t]);
        if constexpr (!kGrouped)
          total[m][t] = sum;
        else
          total[m][t] = g == 0 ? V::mul(sum, scale) : V::fma(sum, scale, total[m][t]);
      }
    }
  }
  take(total);
}

}  // namespace
}  // namespace qcompile
