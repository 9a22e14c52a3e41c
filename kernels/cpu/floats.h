// Products with float activations. One row (or two, of float8): the weight becomes floats in registers. More: a slab of a
// tile at a time becomes floats in the L1 cache, which all rows read. V is an instruction set (isa_*.cpp).
#pragma once

#include "tile.h"

namespace qcompile {
namespace {

constexpr int kFloatSlab = 8;  // blocks that are floats at a time: 16 KiB, half an L1 cache

// What of an integer code's group makes it a float: (u - zero) * scale, or u * scale + shift, rounded as in the definition.
template <class V>
struct GroupValue {
  using F = typename V::F;
  F scale, zero;
  bool shift;

  static GroupValue load(const Weight& w, int64_t tile, int64_t g) {
    const int64_t at = (tile * w.groups + g) * kTile, bytes = int64_t(element_size(w.scale_dtype));
    GroupValue r;
    r.shift = w.zero_kind == Zero::kShift;
    r.scale = V::load16(static_cast<const char*>(w.scale) + at * bytes, w.scale_dtype);
    switch (w.zero_kind) {
      case Zero::kMiddle: r.zero = V::set1(float(1 << (w.bits - 1))); break;
      case Zero::kCode: r.zero = V::load_u8(static_cast<const uint8_t*>(w.zero) + at); break;
      case Zero::kShift: r.zero = V::load16(static_cast<const char*>(w.zero) + at * bytes, w.scale_dtype); break;
    }
    return r;
  }
  F value(F u) const { return shift ? V::add(V::mul(u, scale), zero) : V::mul(V::sub(u, zero), scale); }
};

// Integer codes of any width.
template <class V, int kBits>
struct IntegerCodes {
  using F = typename V::F;
  static constexpr int kBytes = 64 * kBits;  // of a block
  static constexpr int kDirectRows = 1;
  static constexpr bool kNan = false;  // whether codes may be NaN, which nan_rows() tells

  // Blocks [b0, b1) of a tile as floats [column][16 rows].
  void decode(const Weight& w, int64_t tile, const uint8_t* cells, int64_t b0, int64_t b1, float* out) {
    for (int64_t b = b0; b < b1;) {
      const int64_t g = b / w.blocks_per_group, end = min64(min64((g + 1) * w.blocks_per_group, w.blocks), b1);
      const auto group = GroupValue<V>::load(w, tile, g);
      for (; b < end; ++b, cells += kBytes, out += kBlock * kTile)
        for_each_chunk<V, kBits>(cells, [&](int chunk, typename V::Cell c) __attribute__((always_inline)) {
          F u[4];
          V::widen(c, u);
          for (int i = 0; i < 4; ++i) V::store(out + (4 * chunk + i) * kTile, group.value(u[i]));
        });
    }
  }

  template <int MR>
  void dot(const Weight& w, const float* x, int64_t tile, const uint8_t* cells, float* totals) {
    static_assert(MR == 1, "more rows share a slab");
    F total[4];  // independent sums, to hide the latency of an FMA
    for (F& t : total) t = V::set1(0.0f);
    for (int64_t g = 0, b = 0; g < w.groups; ++g) {
      const auto group = GroupValue<V>::load(w, tile, g);
      const int64_t end = min64((g + 1) * w.blocks_per_group, w.blocks);
      for (; b < end; ++b, cells += kBytes)
        for_each_chunk<V, kBits>(cells, [&](int chunk, typename V::Cell c) __attribute__((always_inline)) {
          const float* column = x + b * kBlock + 4 * chunk;
          F u[4];
          V::widen(c, u);
          for (int i = 0; i < 4; ++i) total[i] = V::fma(group.value(u[i]), V::set1(column[i]), total[i]);
        });
    }
    V::store(totals, V::add(V::add(total[0], total[1]), V::add(total[2], total[3])));
  }
};

// float8 codes. A byte in the high half of 16 bits (e4m3: shifted down by one, under its sign) is a float16 but for a factor,
// and of a lane's 4 columns two become floats at once: 0 and 2, then 1 and 3. The floats of a row's two columns lie side by
// side; unzip() parts them. NaN, which only e5m2 shares with float16, is looked for on the side: where a tile holds one, it
// makes all that its row gives NaN, whatever it meets.
template <class V, Code kCode>
struct Float8Codes {
  using F = typename V::F;
  using Cell = typename V::Cell;
  static constexpr int kBytes = 512;
  static constexpr int kDirectRows = 2;
  static constexpr bool kFourBits = kCode != Code::kE5m2;  // of exponent
  static constexpr bool kNan = kFourBits;
  static constexpr float kFactor = float8_factor(kCode);

  // NaN for the rows of the tile that hold one, else 0.
  F nan_rows(const Weight& w, const uint8_t* cells) const {
    constexpr uint8_t kNanByte = kCode == Code::kE4m3fn ? 0xfe : 0xff;
    if (!V::has_byte(seen_, kNanByte)) return V::set1(0.0f);
    Cell most = V::fill_bytes(0);
    for (int64_t j = 0; j < 8 * w.blocks; ++j) most = V::max_bytes(most, mark(V::load_cell(cells + 64 * j)));
    return V::nan_where(most, kNanByte);
  }

  void decode(const Weight& w, int64_t tile, const uint8_t* cells, int64_t b0, int64_t b1, float* out) {
    for (int64_t b = b0; b < b1; ++b, cells += kBytes, out += kBlock * kTile) {
      const F scale = load_scale(w, tile, b / w.blocks_per_group), factor = V::set1(kFactor);
      for (int j = 0; j < 8; ++j) {
        const Cell c = V::load_cell(cells + 64 * j);
        look_for_nan(c);
        F u[4];
        columns<0>(c, u[0], u[2]);
        columns<1>(c, u[1], u[3]);
        for (int i = 0; i < 4; ++i) V::store(out + (4 * j + i) * kTile, V::mul(V::mul(u[i], factor), scale));
      }
    }
  }

  // x: of each 4 values the middle two have changed places.
  template <int MR>
  void dot(const Weight& w, const float* x, int64_t tile, const uint8_t* cells, float* totals) {
    constexpr int kChains = MR == 1 ? 2 : 1;  // independent sums, to hide the latency of an FMA
    F total[MR];
    for (F& t : total) t = V::set1(0.0f);
    for (int64_t g = 0, b = 0; g < w.groups; ++g) {
      const int64_t end = min64((g + 1) * w.blocks_per_group, w.blocks);
      F lo[MR][kChains], hi[MR][kChains];
      for (int m = 0; m < MR; ++m)
        for (int i = 0; i < kChains; ++i) lo[m][i] = hi[m][i] = V::set1(0.0f);
      for (; b < end; ++b, cells += kBytes) {
        // By way of memory: converting from there is cheaper than parting registers, and the registers hold the sums.
        alignas(64) uint8_t half[2 * kBytes];
        for (int j = 0; j < 8; ++j) {
          __builtin_prefetch(cells + 64 * j + V::kPrefetch);
          const Cell c = V::load_cell(cells + 64 * j);
          look_for_nan(c);
          V::store_cell(half + 128 * j, V::template halves<false, kFourBits>(c));
          V::store_cell(half + 128 * j + 64, V::template halves<true, kFourBits>(c));
        }
        const char* at = reinterpret_cast<const char*>(half);
        const float* column = x + b * MR * kBlock;
        for (int i = 0; i < 16; i += kChains, at += 64 * kChains, column += 2 * kChains)
          for (int chain = 0; chain < kChains; ++chain) {
            const F l = V::load16(at + 64 * chain, DType::kFloat16), h = V::load16(at + 64 * chain + 32, DType::kFloat16);
            for (int m = 0; m < MR; ++m) {
              const F pair = V::set2(column + m * kBlock + 2 * chain);
              lo[m][chain] = V::fma(l, pair, lo[m][chain]);
              hi[m][chain] = V::fma(h, pair, hi[m][chain]);
            }
          }
      }
      const F scale = load_scale(w, tile, g);
      for (int m = 0; m < MR; ++m) {
        if constexpr (kChains == 2) {
          lo[m][0] = V::add(lo[m][0], lo[m][1]);
          hi[m][0] = V::add(hi[m][0], hi[m][1]);
        }
        F first, second;
        V::unzip(lo[m][0], hi[m][0], first, second);
        total[m] = V::fma(V::mul(V::add(first, second), V::set1(kFactor)), scale, total[m]);
      }
    }
    for (int m = 0; m < MR; ++m) V::store(totals + m * kTile, total[m]);
  }

 private:
  static F load_scale(const Weight& w, int64_t tile, int64_t g) {
    const int64_t at = (tile * w.groups + g) * kTile * int64_t(element_size(w.scale_dtype));
    return V::load16(static_cast<const char*>(w.scale) + at, w.scale_dtype);
  }
  // Columns kOdd and kOdd + 2 of a cell, without the factor.
  template <int kOdd>
  static void columns(Cell c, F& first, F& second) {
    F lo, hi;
    V::widen_halves(V::template halves<kOdd == 1, kFourBits>(c), lo, hi);
    V::unzip(lo, hi, first, second);
  }
  // What is largest where the code is NaN. e4m3fn: 0x7f and 0xff, doubled 0xfe. e4m3fnuz: 0x80, + 0x7f 0xff.
  static Cell mark(Cell c) { return V::add_bytes(c, kCode == Code::kE4m3fn ? c : V::fill_bytes(0x7f)); }
  void look_for_nan(Cell c) {
    if constexpr (kNan) seen_ = V::max_bytes(seen_, mark(c));
  }

  typename V::Bytes seen_ = V::no_bytes();
};

// A panel of MR rows times the blocks [b0, b1), which are floats. kPadded: one of fewer rows has a power of two of them.
template <class V, int MR, bool kPadded>
void dot_floats(int rows, const float* panel, const float* slab, int64_t b0, int64_t b1, float* totals) {
  constexpr int kFewer = kPadded ? MR / 2 : MR - 1;
  if constexpr (MR > 1)
    if (rows <= kFewer) return dot_floats<V, kFewer, kPadded>(rows, panel, slab, b0, b1, totals);
  using F = typename V::F;
  constexpr int kChains = MR == 1 ? 4 : MR <= 3 ? 2 : 1;
  F total[MR][kChains];
  for (int m = 0; m < MR; ++m) {
    total[m][0] = V::load(totals + m * kTile);
    for (int i = 1; i < kChains; ++i) total[m][i] = V::set1(0.0f);
  }
  const float* x = panel + b0 * MR * kBlock;
  for (int64_t b = b0; b < b1; ++b, x += MR * kBlock)
    for (int k = 0; k < kBlock; k += 4, slab += 4 * kTile) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const F value = V::load(slab + i * kTile);
        for (int m = 0; m < MR; ++m)
          total[m][i % kChains] = V::fma(value, V::set1(x[m * kBlock + k + i]), total[m][i % kChains]);
      }
    }
  for (int m = 0; m < MR; ++m) {
    for (int i = 1; i < kChains; ++i) total[m][0] = V::add(total[m][0], total[m][i]);
    V::store(totals + m * kTile, total[m][0]);
  }
}

// `rows` rows of x from m0 on, of m in all, times a tile. x lies in panels of kRows (quantize.h), or where it is not padded of
// kFloatRows.
template <class V, class Codes, bool kPadded = true>
void times_floats(const Weight& w, const float* x, int64_t m, int64_t tile, int64_t m0, int rows, float* totals) {
  using F = typename V::F;
  const uint8_t* cells = w.codes + tile * w.blocks * Codes::kBytes;
  const int64_t values = w.blocks * kBlock;
  Codes codes;
  if (m == 1) {
    codes.template dot<1>(w, x, tile, cells, totals);
  } else if (m <= Codes::kDirectRows) {
    codes.template dot<Codes::kDirectRows>(w, x, tile, cells, totals);
  } else {
    constexpr int kPanel = kPadded ? V::kRows : V::kFloatRows;
    for (int i = 0; i < (rows + kPanel - 1) / kPanel * kPanel * kTile; ++i) totals[i] = 0.0f;
    alignas(64) float slab[kFloatSlab * kBlock * kTile];
    for (int64_t b = 0; b < w.blocks; b += kFloatSlab) {
      const int64_t end = min64(b + kFloatSlab, w.blocks);
      codes.decode(w, tile, cells + b * Codes::kBytes, b, end, slab);
      for (int r = 0; r < rows; r += kPanel)
        dot_floats<V, kPanel, kPadded>(rows - r, x + (m0 + r) * values, slab, b, end, totals + r * kTile);
    }
  }
  if constexpr (Codes::kNan) {
    const F nan = codes.nan_rows(w, cells);
    for (int r = 0; r < rows; ++r) V::store(totals + r * kTile, V::add(V::load(totals + r * kTile), nan));
  }
}

}  // namespace
}  // namespace qcompile
