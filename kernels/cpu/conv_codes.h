// Convolution on activations with one scale: int8 codes are read, and may be what is written, so that between convolutions
// nothing becomes a float. A block of output positions is gathered into panels of bytes, and the tiles of the weight pass over
// them; a sum is one integer for as long as the weight has one scale.
#pragma once

#include <type_traits>

#include "codes.h"
#include "finish.h"
#include "gather_codes.h"
#include "turns.h"

namespace qcompile {
namespace {

template <class V>
class ConvCodes {
  using F = typename V::F;

 public:
  explicit ConvCodes(const Conv& a)
      : a_(a), w_(a.w), plan_(a), turns_(plan_.pieces, plan_.slots), gather_(a, plan_), finish_(a) {
    group_rows_ = a.window.out_channels / a.groups;
    grouped_ = w_.groups > 1 || w_.zero_kind != Zero::kMiddle;
    sums_ = w_.zero_kind != Zero::kMiddle;
    const int64_t last = w_.cols - (w_.groups - 1) * w_.group_size;
    chunks_ = a.order == Order::kChannels ? 8 : chunks(w_.group_size);
    last_chunks_ = a.order == Order::kChannels ? 8 : chunks(last);
  }

  void run() {
    if (a_.window.positions() == 0) return;
    if (plan_.image) EncodeImage<V>(a_, reinterpret_cast<int8_t*>(a_.scratch)).run();
    a_.parallel(plan_.slots, 1, [](int64_t begin, int64_t end, void* self) {
      for (int64_t slot = begin; slot < end; ++slot) static_cast<ConvCodes*>(self)->compute(slot);
    }, this);
  }

 private:
  static_assert(V::kSignedTiles <= kMostTiles, "the plan has room for as many");
  static constexpr int kTogether = 32;  // rows that are finished together

  using Channels = typename Finish<V>::Channels;
  struct Slot {
    CodePanels panels;
    Slab slab;
  };

  static int chunks(int64_t columns) { return int((columns - (columns - 1) / kBlock * kBlock + 3) / 4); }

  Slot slot_of(int64_t slot) const {
    char* p = a_.scratch + plan_.slot + size_t(slot) * plan_.slot_bytes;
    return {{reinterpret_cast<int8_t*>(p), reinterpret_cast<float*>(p + plan_.slot_sums),
             reinterpret_cast<uint8_t*>(p + plan_.slot_flags), reinterpret_cast<int8_t*>(p + plan_.slot_patch)},
            {reinterpret_cast<uint8_t*>(p + plan_.slot_slab), reinterpret_cast<float*>(p + plan_.slot_scale),
             reinterpret_cast<int32_t*>(p + plan_.slot_start), w_.blocks, w_.groups, w_.blocks_per_group, chunks_, last_chunks_}};
  }

  void compute(int64_t slot) {
    const Slot s = slot_of(slot);
    int64_t held = -1;
    for (int64_t i = turns_.take(slot); i >= 0; i = turns_.take(slot)) {
      const ConvShares::Piece piece = plan_.piece(i);
      if (held != piece.block) gather_(s.panels, piece.group, piece.m0, piece.rows);
      held = piece.block;
      for (int64_t tile = piece.from; tile < piece.to;) tile += tiles<V::kSignedTiles>(s, piece, tile);
    }
  }

  // As many tiles together as there are left, kMost at most; returns how many.
  template <int kMost>
  int tiles(const Slot& s, const ConvShares::Piece& piece, int64_t tile) const {
    const int64_t left = piece.to - tile;
    if constexpr (kMost > 1)
      if (left < kMost || (kMost > 2 && left == kMost + 1)) return tiles<kMost - 1>(s, piece, tile);
    multiply<kMost>(s, piece, tile);
    return kMost;
  }

  template <int kTiles>
  void multiply(const Slot& s, const ConvShares::Piece& piece, int64_t group_tile) const {
    const int64_t tile = piece.group * plan_.group_tiles + group_tile;
    const F most = V::set1(float(w_.cols) * 127.0f * 128.0f);
    Channels channels[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      fill_tile<V>(w_, tile + t, s.slab, t);
      F scale = V::set1(a_.x_scale);
      if (!grouped_) scale = V::mul(scale, V::load(s.slab.scale + t * kTile));
      const int64_t n0 = (group_tile + t) * kTile;
      channels[t] = finish_.channels(piece.group * group_rows_ + n0, int(min64(kTile, group_rows_ - n0)), scale, most);
    }
    int m = 0;
    if constexpr (V::kRows * kTiles % 4 == 0) {
      bool whole = !grouped_;
      for (int t = 0; t < kTiles; ++t) whole = whole && channels[t].whole;
      for (; whole && m + V::kRows <= piece.rows; m += V::kRows)
        if ((s.panels.flags[m / V::kRows] & kHasNan) == 0)
          write<kTiles>(s, channels, piece.m0, m);
        else
          add_up<kTiles>(s, channels, tile, piece.m0, m, V::kRows);
    }
    for (; m < piece.rows; m += kTogether) add_up<kTiles>(s, channels, tile, piece.m0, m, int(min64(kTogether, piece.rows - m)));
  }

  // A whole panel, from row m on, whose sums become codes in their registers. A function of its own, for these.
  template <int kTiles>
  __attribute__((noinline)) void write(const Slot& s, const Channels* channels, int64_t m0, int m) const {
    const auto put = [&](F(&sums)[V::kRows][kTiles]) __attribute__((always_inline)) {
      finish_.template write<V::kRows, kTiles>(channels, m0 + m, sums);
    };
    product<kTiles, V::kRows, false>(s, m, put);
  }

  // Some panels, any of which may have fewer rows, by way of memory.
  template <int kTiles>
  void add_up(const Slot& s, const Channels* channels, int64_t tile, int64_t m0, int first, int rows) const {
    alignas(64) float totals[kTogether * kTiles * kTile];
    bool nan = false;
    for (int m = 0; m < rows; m += V::kRows) {
      float* to = totals + m * kTiles * kTile;
      grouped_ ? panel<kTiles, V::kRows, true>(s, first + m, rows - m, to)
               : panel<kTiles, V::kRows, false>(s, first + m, rows - m, to);
      if (sums_) take_off<kTiles>(s.panels.sums + (first + m) * w_.groups, tile, rows - m, to);
      if ((s.panels.flags[(first + m) / V::kRows] & kHasNan) == 0) continue;
      find_nan<kTiles>(s.panels.codes + (first + m) * plan_.depth, rows - m, to);
      nan = true;
    }
    for (int t = 0; t < kTiles; ++t)
      finish_.store(channels[t], m0 + first, rows, totals + t * kTile, kTiles * kTile, nan);
  }

  // panel_width() as a template argument.
  template <int kTiles, int kRows, bool kGrouped>
  __attribute__((noinline)) void panel(const Slot& s, int m, int rows, float* totals) const {
    if constexpr (kRows > 1)
      if (rows <= kRows / 2) return panel<kTiles, kRows / 2, kGrouped>(s, m, rows, totals);
    const auto keep = [&](F(&sums)[kRows][kTiles]) __attribute__((always_inline)) {
      for (int i = 0; i < kRows * kTiles; ++i) V::store(totals + i * kTile, sums[i / kTiles][i % kTiles]);
    };
    product<kTiles, kRows, kGrouped>(s, m, keep);
  }

  template <int kTiles, int kRows, bool kGrouped, class Take>
  __attribute__((always_inline)) void product(const Slot& s, int m, Take take) const {
    const int8_t* codes = s.panels.codes + m * plan_.depth;
    if constexpr (!std::is_same_v<typename V::Positive, typename V::Signed>)
      if ((s.panels.flags[m / V::kRows] & kHasNegative) == 0)
        return times_codes<V, typename V::Positive, kRows, kTiles, kGrouped>(s.slab, codes, take);
    times_codes<V, typename V::Signed, kRows, kTiles, kGrouped>(s.slab, codes, take);
  }

  // Rows with a NaN in them give nothing else.
  template <int kTiles>
  void find_nan(const int8_t* codes, int rows, float* totals) const {
    const int64_t width = panel_width<V>(rows);
    for (int64_t r = 0; r < width; ++r)
      for (int64_t i = 0; i < plan_.depth; ++i)
        if (codes[(i / kBlock * width + r) * kBlock + i % kBlock] == int8_t(uint8_t(kNan) ^ uint8_t(V::Signed::kZero)))
          for (int64_t k = 0; k < kTiles * kTile; ++k) totals[r * kTiles * kTile + k] = std::numeric_limits<float>::quiet_NaN();
  }

  // What the zero points, as far as they are not the middle of the codes, contribute to a panel.
  template <int kTiles>
  void take_off(const float* sums, int64_t tile, int rows, float* totals) const {
    const int64_t width = panel_width<V>(rows);
    for (int t = 0; t < kTiles; ++t) {
      for (int64_t g = 0; g < w_.groups; ++g) {
        const F offset = GroupScale<V>::load(w_, tile + t, g, float(1 << (w_.bits - 1))).offset;
        for (int64_t r = 0; r < width; ++r) {
          float* total = totals + (r * kTiles + t) * kTile;
          V::store(total, V::fnma(offset, V::set1(sums[g * width + r]), V::load(total)));
        }
      }
    }
  }

  const Conv& a_;
  const Weight& w_;
  const CodesPlan plan_;
  Turns turns_;
  const GatherCodes<V> gather_;
  const Finish<V> finish_;
  int64_t group_rows_ = 0;
  bool grouped_ = false, sums_ = false;
  int chunks_ = 8, last_chunks_ = 8;
};

template <class V>
void conv_codes(const Conv& a) {
  ConvCodes<V>(a).run();
}

}  // namespace
}  // namespace qcompile
