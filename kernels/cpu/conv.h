// Convolution as a product: a block of output positions is gathered into panels of int8, 32 values with a scale each (or of
// floats), that stay in the L2 cache while every tile of the weight passes over them.
#pragma once

#include "activations.h"
#include "conv_args.h"
#include "conv_gather.h"
#include "lanes.h"
#include "many.h"
#include "tile.h"

namespace qcompile {
namespace {

template <class V>
class ConvRun {
 public:
  explicit ConvRun(const Conv& a) : a_(a), w_(a.w), v_(a.window), plan_(a), gather_(a, plan_) {}

  void run() {
    if (v_.positions() == 0 || v_.out_channels == 0) return;
    if (plan_.pixel_blocks > 0) {
      const int64_t grain = 1 + 32768 / (plan_.pixel_blocks * kBlock);
      a_.parallel(v_.pixels(), grain, [](int64_t begin, int64_t end, void* self) {
        static_cast<ConvRun*>(self)->gather_.read_pixels(begin, end);
      }, this);
    }
    a_.parallel(plan_.slots, 1, [](int64_t begin, int64_t end, void* self) {
      for (int64_t slot = begin; slot < end; ++slot) static_cast<ConvRun*>(self)->compute(slot);
    }, this);
  }

 private:
  static constexpr int kMaxRows = 128;
  static constexpr int kSlab = 32;  // blocks of a tile between panels: at most 16 KiB, half an L1 cache

  void compute(int64_t slot) {
    const ConvPanels p = gather_.panels(slot);
    const int64_t begin = plan_.pieces * slot / plan_.slots, end = plan_.pieces * (slot + 1) / plan_.slots;
    int64_t held = -1;
    for (int64_t i = begin; i < end; ++i) {
      const ConvShares::Piece piece = plan_.piece(i);
      if (held != piece.block) gather_.gather(p, piece.group, piece.m0, piece.rows);
      held = piece.block;
      if constexpr (V::kReadyTiles > 0)
        if (gather_.together(piece.rows)) {
          for (int64_t tile = piece.from; tile < piece.to; tile += V::kReadyTiles)
            multiply_ready(p, piece.group, tile, int(min64(V::kReadyTiles, piece.to - tile)), piece.m0, piece.rows);
          continue;
        }
      for (int64_t tile = piece.from; tile < piece.to; ++tile) multiply(p, piece.group, tile, piece.m0, piece.rows);
    }
  }

  void multiply(const ConvPanels& p, int64_t group, int64_t tile, int64_t m0, int rows) {
    switch (w_.bits) {
      case 2: return multiply<2>(p, group, tile, m0, rows);
      case 3: return multiply<3>(p, group, tile, m0, rows);
      case 4: return multiply<4>(p, group, tile, m0, rows);
      case 5: return multiply<5>(p, group, tile, m0, rows);
      case 6: return multiply<6>(p, group, tile, m0, rows);
      default: return multiply<8>(p, group, tile, m0, rows);
    }
  }

  template <int kBits>
  void multiply(const ConvPanels& p, int64_t group, int64_t group_tile, int64_t m0, int rows) {
    alignas(64) float totals[kMaxRows * kTile];
    const int64_t tile = group * plan_.group_tiles + group_tile;
    if (a_.exact) {
      times_floats<V, IntegerCodes<V, kBits>>(w_, p.wide, rows, tile, 0, rows, totals);
      return epilogue(group, group_tile, m0, rows, totals);
    }
    for (int i = 0; i < (rows + V::kRows - 1) / V::kRows * V::kRows * kTile; ++i) totals[i] = 0.0f;
    constexpr bool kUnpack = kBits < 8 && (V::kUnpackFirst || 8 % kBits != 0);
    alignas(64) uint8_t unpacked[kUnpack ? kSlab * 512 : 1];
    for (int64_t b = 0; b < w_.blocks; b += kSlab) {
      const int64_t end = min64(b + kSlab, w_.blocks);
      const uint8_t* slab = w_.codes + (tile * w_.blocks + b) * 64 * kBits;
      if constexpr (kUnpack) {
        unpack_blocks<V, kBits>(slab, end - b, unpacked);
        slab = unpacked;
      }
      for (int m = 0; m < rows; m += V::kRows) {
        const int64_t ahead = !kUnpack && m == 0 ? (end - b) * 64 * kBits : 0;  // what follows in memory
        quantized_rows<kUnpack ? 8 : kBits, V::dot_kind(kBits), V::kRows>(p, rows - m, m, tile, slab, b, end, ahead,
                                                                          totals + m * kTile);
      }
    }
    epilogue(group, group_tile, m0, rows, totals);
  }

  void multiply_ready(const ConvPanels& p, int64_t group, int64_t tile, int tiles, int64_t m0, int rows) {
    switch (w_.bits) {
      case 2: return multiply_ready<2>(p, group, tile, tiles, m0, rows);
      case 3: return multiply_ready<3>(p, group, tile, tiles, m0, rows);
      case 4: return multiply_ready<4>(p, group, tile, tiles, m0, rows);
      case 5: return multiply_ready<5>(p, group, tile, tiles, m0, rows);
      case 6: return multiply_ready<6>(p, group, tile, tiles, m0, rows);
      default: return multiply_ready<8>(p, group, tile, tiles, m0, rows);
    }
  }

  template <int kBits>
  void multiply_ready(const ConvPanels& p, int64_t group, int64_t group_tile, int tiles, int64_t m0, int rows) {
    if constexpr (V::has_ready(kBits)) {
      const auto done = [&](int64_t m, int count, float* first, float* second) {
        epilogue(group, group_tile, m0 + m, count, first);
        if (tiles == 2) epilogue(group, group_tile + 1, m0 + m, count, second);
      };
      const PanelShares shares(rows, V::kManyRows, true);
      times_ready<V, kBits>(w_, p.x, false, group * plan_.group_tiles + group_tile, tiles, shares, 0, shares.count, done);
    }
  }

  // panel_width() as a template argument.
  template <int kBits, int kDot, int MR>
  void quantized_rows(const ConvPanels& p, int rows, int64_t m, int64_t tile, const uint8_t* cells, int64_t b0, int64_t b1,
                      int64_t ahead, float* totals) const {
    if constexpr (MR > 1)
      if (rows <= MR / 2) return quantized_rows<kBits, kDot, MR / 2>(p, rows, m, tile, cells, b0, b1, ahead, totals);
    dot_quantized<V, kBits, kDot, MR, false>(w_, p.x, m, tile, cells, b0, b1, ahead, totals);
  }

  void epilogue(int64_t group, int64_t group_tile, int64_t m0, int rows, float* totals) const {
    using F = typename V::F;
    const int64_t n0 = group_tile * kTile, group_rows = v_.out_channels / a_.groups;
    const int64_t first = group * group_rows + n0, size = int64_t(element_size(a_.dtype));
    const int count = int(min64(kTile, group_rows - n0));
    F bias = V::set1(0.0f);
    if (a_.bias != nullptr) bias = load_some<V>(a_.bias + first * int64_t(element_size(a_.bias_dtype)), a_.bias_dtype, count);
    if (a_.dtype == DType::kFloat32 && count == kTile && a_.add == nullptr) {
      float* out = reinterpret_cast<float*>(a_.out) + m0 * v_.out_channels + first;
      return Act<V>::apply(a_.activation, bias, totals, rows, out, v_.out_channels);
    }
    Act<V>::apply(a_.activation, bias, totals, rows, totals, kTile);
    for (int m = 0; m < rows; ++m) {
      const int64_t at = ((m0 + m) * v_.out_channels + first) * size;
      F y = V::load(totals + m * kTile);
      if (a_.add != nullptr) y = Act<V>::apply(a_.after, V::add(y, load_some<V>(a_.add + at, a_.dtype, count)));
      store_some<V>(a_.out + at, a_.dtype, y, count);
    }
  }

  const Conv& a_;
  const Weight& w_;
  const Window& v_;
  const ConvPlan plan_;
  const ConvGather<V> gather_;
};

template <class V>
void conv(const Conv& a) {
  ConvRun<V>(a).run();
}

}  // namespace
}  // namespace qcompile
