// A whole linear: quantize the activations, share tiles and row blocks among the threads, apply the epilogue.
#pragma once

#include <atomic>
#include <utility>

#include "activations.h"
#include "floats.h"
#include "lanes.h"
#include "many.h"
#include "tile.h"

namespace qcompile {
namespace {

constexpr int kSlab = 32;              // blocks of a tile between row blocks: at most 16 KiB, half an L1 cache
constexpr int kFloatBlock = 64;        // rows of a row block on the exact path: a slab that became floats is worth many
constexpr int64_t kThreadWork = 400000;  // multiply-adds of one row that are worth waking a thread for: 8 us of streaming
constexpr int64_t kSharedWork = 64 * kThreadWork;  // from here on a thread that is held up costs more than taking turns

template <class V>
class LinearRun {
  static_assert(kMostRows % V::kRows == 0 && kMaxRows % V::kRows == 0, "register tiles read whole padded rows");

 public:
  explicit LinearRun(const Linear& a)
      : a_(a), w_(a.w), plan_(a.w, a.m, a.exact), many_(V::has_ready(a.w.bits) && !a.exact && a.m > kFewRows),
        step_(a.exact ? V::kFloatRows : many_ ? V::kManyRows : V::kRows), panels_(a.m, step_, many_) {
    wide_ = reinterpret_cast<float*>(a.scratch);
    x_.codes = reinterpret_cast<int8_t*>(a.scratch);
    x_.scale = reinterpret_cast<float*>(a.scratch + plan_.scale);
    x_.sums = reinterpret_cast<float*>(a.scratch + plan_.sums);
    if (many_ && V::kReadyUnsigned) x_.first = reinterpret_cast<uint32_t*>(a.scratch + plan_.first);
  }

  void run() {
    if (a_.m == 0 || a_.units == 0) return;
    // about 2 values a cycle
    const int64_t grain = 1 + 16384 / (step_ * w_.blocks * kBlock + 1);
    a_.parallel(panels_.count, grain, [](int64_t begin, int64_t end, void* self) {
      for (int64_t panel = begin; panel < end; ++panel) {
        LinearRun* run = static_cast<LinearRun*>(self);
        run->read_panel(panel, run->a_.x, run->a_.dtype);
      }
    }, this);
    choose_row_block();
    const int64_t rows = a_.m == 1 ? 2 : min64(block_panels_ * step_, a_.m);  // one row waits for memory, twice as long as it computes
    const int64_t total = a_.units * row_blocks_, work = rows * w_.blocks * 512 * (a_.glu ? 2 : 1);
    if (total * work < kSharedWork) {
      a_.parallel(total, 1 + (a_.m == 1 ? kThreadWork : V::kThreadWork) / work, [](int64_t begin, int64_t end, void* self) {
        static_cast<LinearRun*>(self)->compute(begin, end);
      }, this);
      return;
    }
    a_.parallel(a_.threads, 1, [](int64_t begin, int64_t end, void* self) {
      for (int64_t i = begin; i < end; ++i) static_cast<LinearRun*>(self)->compute_shares();
    }, this);
  }

  // At most kMostRows rows of x, by one thread; then its units are a row block's.
  void read_few(const char* x, DType type) {
    for (int64_t panel = 0; panel < panels_.count; ++panel) read_panel(panel, x, type);
    block_panels_ = panels_.count;
    row_blocks_ = 1;
  }

  void compute(int64_t begin, int64_t end) {
    alignas(64) float totals[2][kMaxRows * kTile];
    const Part* part = a_.parts;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i % a_.units, p0 = i / a_.units * block_panels_, p1 = min64(p0 + block_panels_, panels_.count);
      const int64_t m0 = panels_.begin(p0);
      const int rows = int(panels_.begin(p1) - m0);
      if (unit < part->unit) part = a_.parts;
      while (part + 1 < a_.parts + a_.part_count && unit >= part[1].unit) ++part;
      if constexpr (V::kReadyTiles > 0)
        if (many_) {
          const bool both = V::kReadyTiles > 1 && !a_.glu && i + 1 < end && unit + 1 < a_.units;
          const Part* next = both && part + 1 < a_.parts + a_.part_count && unit + 1 >= part[1].unit ? part + 1 : part;
          many_rows({{part, unit}, {next, unit + 1}}, a_.glu || both ? 2 : 1, p0, p1);
          i += both;
          continue;
        }
      if (a_.glu) {
        tile_times_rows(2 * unit, m0, rows, totals[0]);
        tile_times_rows(2 * unit + 1, m0, rows, totals[1]);
      } else {
        tile_times_rows(unit, m0, rows, totals[0]);
      }
      epilogue(*part, unit, m0, rows, totals[0], a_.glu ? totals[1] : nullptr);
    }
  }

 private:
  struct Output {
    const Part* part;
    int64_t unit;
  };

  // A part of what is left, again and again, large ones first: no thread waits long for one that another program holds up.
  void compute_shares() {
    const int64_t total = a_.units * row_blocks_;
    int64_t begin = next_.load(std::memory_order_relaxed);
    while (begin < total) {
      const int64_t share = 3 * (total - begin) / (4 * a_.threads) / 2 * 2;  // whole pairs of tiles
      const int64_t end = min64(begin + (share < 2 ? 2 : share), total);
      if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      compute(begin, end);
      begin = next_.load(std::memory_order_relaxed);
    }
  }

  void read_panel(int64_t p, const char* x, DType type) {
    const int64_t bytes = w_.cols * int64_t(element_size(type)), values = w_.blocks * kBlock;
    const int64_t m0 = panels_.begin(p), rows = panels_.begin(p + 1) - m0;
    const int64_t width = many_ || a_.exact ? rows : panel_width<V>(rows);
    float* wide = wide_ + m0 * values;
    const Quantized panel = x_.panel(w_, m0);
    if (rows < width) {
      std::memset(panel.codes, 0, size_t(width * values));
      std::memset(panel.scale, 0, size_t(width * w_.blocks) * 4);
      std::memset(panel.sums, 0, size_t(width * w_.groups) * 4);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const char* row = x + (m0 + r) * bytes;
      const bool rounded = a_.per_row || a_.x_scale != 0.0f;
      const float known = a_.per_row ? row_scale<V>(w_, row, type) : a_.x_scale;
      if (a_.exact)
        widen_row<V>(w_, row, type, wide, r, width, rounded ? &known : nullptr);
      else
        quantize_row<V>(w_, row, type, panel, r, width, rounded ? &known : nullptr);
    }
    if (x_.first != nullptr) begin_sums(w_, panel, width, a_.per_row || a_.x_scale != 0.0f);
    if (w_.code != Code::kInteger && a_.m <= 2)  // as Float8Codes::dot takes them
      for (int64_t i = 0; i < width * values; i += 4) std::swap(wide[i + 1], wide[i + 2]);
  }

  // Row blocks: as many rows as the L2 cache keeps, in equal shares, and enough of them for every thread.
  void choose_row_block() {
    const int64_t row_bytes = w_.blocks * kBlock + w_.blocks * 4 + 1;
    int64_t rows = a_.exact ? kFloatBlock : V::kRowBlockBytes / row_bytes;
    rows = rows > kMaxRows ? kMaxRows : rows < 4 * V::kRows ? 4 * V::kRows : rows;
    int64_t blocks = (a_.m + rows - 1) / rows;
    const int64_t wanted = (4 * a_.threads + a_.units - 1) / a_.units;
    if (a_.threads > 1 && blocks < wanted) blocks = wanted;
    rows = (a_.m + blocks - 1) / blocks;
    block_panels_ = min64((rows + step_ - 1) / step_, kMaxRows / step_);
    row_blocks_ = (panels_.count + block_panels_ - 1) / block_panels_;
  }

  // The tiles of one or two units: a gate and an up tile, or two that follow one another.
  void many_rows(const Output (&to)[2], int tiles, int64_t p0, int64_t p1) {
    switch (w_.bits) {
      case 2: return many_rows<2>(to, tiles, p0, p1);
      case 3: return many_rows<3>(to, tiles, p0, p1);
      case 4: return many_rows<4>(to, tiles, p0, p1);
      case 5: return many_rows<5>(to, tiles, p0, p1);
      case 6: return many_rows<6>(to, tiles, p0, p1);
      default: return many_rows<8>(to, tiles, p0, p1);
    }
  }
  template <int kBits>
  void many_rows(const Output (&to)[2], int tiles, int64_t p0, int64_t p1) {
    if constexpr (V::has_ready(kBits)) {
      const auto done = [&](int64_t m, int count, float* first, float* second) {
        epilogue(*to[0].part, to[0].unit, m, count, first, a_.glu ? second : nullptr);
        if (!a_.glu && tiles == 2) epilogue(*to[1].part, to[1].unit, m, count, second, nullptr);
      };
      const bool one_scale = a_.per_row || a_.x_scale != 0.0f;
      const int64_t tile = a_.glu ? 2 * to[0].unit : to[0].unit;
      for (int t = 0; t < tiles; ++t) {  // from memory in good time: the bias that results are waiting for
        const Part& part = *to[t].part;
        if (part.bias != nullptr)
          __builtin_prefetch(part.bias + (to[t].unit - part.unit) * kTile * int64_t(element_size(a_.bias_dtype)));
      }
      times_ready<V, kBits>(w_, x_, one_scale, tile, tiles, panels_, p0, p1, done);
    }
  }

  void tile_times_rows(int64_t tile, int64_t m0, int rows, float* totals) {
    switch (w_.code) {
      case Code::kE4m3fn: return floats<Float8Codes<V, Code::kE4m3fn>>(tile, m0, rows, totals);
      case Code::kE4m3fnuz: return floats<Float8Codes<V, Code::kE4m3fnuz>>(tile, m0, rows, totals);
      case Code::kE5m2: return floats<Float8Codes<V, Code::kE5m2>>(tile, m0, rows, totals);
      case Code::kInteger: break;
    }
    switch (w_.bits) {
      case 2: return tile_times_rows<2>(tile, m0, rows, totals);
      case 3: return tile_times_rows<3>(tile, m0, rows, totals);
      case 4: return tile_times_rows<4>(tile, m0, rows, totals);
      case 5: return tile_times_rows<5>(tile, m0, rows, totals);
      case 6: return tile_times_rows<6>(tile, m0, rows, totals);
      default: return tile_times_rows<8>(tile, m0, rows, totals);
    }
  }

  template <class Codes>
  void floats(int64_t tile, int64_t m0, int rows, float* totals) {
    times_floats<V, Codes, false>(w_, wide_, a_.m, tile, m0, rows, totals);
  }

  template <int kBits>
  void tile_times_rows(int64_t tile, int64_t m0, int rows, float* totals) {
    if (a_.exact) return floats<IntegerCodes<V, kBits>>(tile, m0, rows, totals);
    for (int i = 0; i < (rows + V::kRows - 1) / V::kRows * V::kRows * kTile; ++i) totals[i] = 0.0f;
    const uint8_t* cells = w_.codes + tile * w_.blocks * 64 * kBits;
    if (rows <= V::kRows) {
      const int64_t ahead = min64(V::kPrefetch, w_.blocks * 64 * kBits);  // of a small weight no more than a tile
      quantized_rows<kBits, V::dot_kind(kBits), V::kRows>(rows, m0, tile, cells, 0, w_.blocks, ahead, totals);
      return;
    }
    constexpr bool kUnpack = kBits < 8 && (V::kUnpackFirst || 8 % kBits != 0);
    alignas(64) uint8_t unpacked[kUnpack ? kSlab * 512 : 1];
    for (int64_t b = 0; b < w_.blocks; b += kSlab) {
      const int64_t end = min64(b + kSlab, w_.blocks);
      const uint8_t* slab = cells + b * 64 * kBits;
      if constexpr (kUnpack) {
        unpack_blocks<V, kBits>(slab, end - b, unpacked);
        slab = unpacked;
      }
      for (int m = 0; m < rows; m += V::kRows) {
        const int64_t ahead = !kUnpack && m == 0 ? kSlab * 64 * kBits : 0;  // the next slab; unpacking sees to it itself
        quantized_rows<kUnpack ? 8 : kBits, V::dot_kind(kBits), V::kRows>(rows - m, m0 + m, tile, slab, b, end, ahead,
                                                                          totals + m * kTile);
      }
    }
  }

  // panel_width() as a template argument.
  template <int kBits, int kDot, int MR>
  void quantized_rows(int rows, int64_t m0, int64_t tile, const uint8_t* cells, int64_t b0, int64_t b1, int64_t ahead,
                      float* totals) {
    if constexpr (MR > 1)
      if (rows <= MR / 2) return quantized_rows<kBits, kDot, MR / 2>(rows, m0, tile, cells, b0, b1, ahead, totals);
    if (a_.per_row || a_.x_scale != 0.0f)
      dot_quantized<V, kBits, kDot, MR, true>(w_, x_, m0, tile, cells, b0, b1, ahead, totals);
    else
      dot_quantized<V, kBits, kDot, MR, false>(w_, x_, m0, tile, cells, b0, b1, ahead, totals);
  }

  void epilogue(const Part& part, int64_t unit, int64_t m0, int rows, float* totals, const float* up_totals) {
    using F = typename V::F;
    const int64_t n0 = (unit - part.unit) * kTile, size = int64_t(element_size(a_.dtype));
    const int count = int(min64(kTile, part.rows - n0));
    const int64_t bias_at = n0 * int64_t(element_size(a_.bias_dtype));
    const auto load_bias = [&](const char* p) {
      return p == nullptr ? V::set1(0.0f) : load_some<V>(p + bias_at, a_.bias_dtype, count);
    };
    const F bias = load_bias(part.bias), bias_up = load_bias(part.bias_up);
    const DType type = a_.dtype;
    const int64_t stride = part.rows * size, at = (m0 * part.rows + n0) * size;
    char* out = static_cast<char*>(part.out) + at;
    if (rows > 1 && type == DType::kFloat32 && count == kTile && !a_.glu && a_.mul == nullptr && a_.add == nullptr)
      return Act<V>::apply(a_.activation, bias, totals, rows, reinterpret_cast<float*>(out), part.rows);
    const Activation activation = a_.activation;
    const bool at_once = rows > 1 && activation != Activation::kNone;
    if (at_once) Act<V>::apply(activation, bias, totals, rows, totals, kTile);
    const char *mul = a_.mul == nullptr ? nullptr : a_.mul + at, *add = a_.add == nullptr ? nullptr : a_.add + at;
    for (int64_t m = 0, row = 0; m < rows; ++m, row += stride) {
      F y = V::load(totals + m * kTile);
      if (!at_once) y = V::add(y, bias);
      if (!at_once && activation != Activation::kNone) y = Act<V>::apply(activation, y);
      if (up_totals != nullptr) y = V::mul(y, V::add(V::load(up_totals + m * kTile), bias_up));
      if (mul != nullptr) y = V::mul(y, load_some<V>(mul + row, type, count));
      if (add != nullptr) y = V::add(y, load_some<V>(add + row, type, count));
      store_some<V>(out + row, type, y, count);
    }
  }

  const Linear& a_;
  const Weight& w_;
  const ScratchPlan plan_;
  const bool many_;
  const int64_t step_;  // rows of a panel, at most
  const PanelShares panels_;
  Quantized x_{};
  float* wide_ = nullptr;
  int64_t block_panels_ = 0, row_blocks_ = 0;  // panels of a row block
  std::atomic<int64_t> next_{0};
};

template <class V>
void linear(const Linear& a) {
  LinearRun<V>(a).run();
}

}  // namespace
}  // namespace qcompile
