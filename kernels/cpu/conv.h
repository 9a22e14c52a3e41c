// Convolution as a product: a block of output positions is gathered into panels of int8, 32 values with a scale each (or of
// floats), that stay in the L2 cache while every tile of the weight passes over them.
#pragma once

#include "activations.h"
#include "conv_args.h"
#include "lanes.h"
#include "tile.h"

namespace qcompile {
namespace {

template <class V>
class ConvRun {
 public:
  explicit ConvRun(const Conv& a) : a_(a), w_(a.w), v_(a.window), plan_(a) {
    const Window& v = a.window;
    pixels_.codes = reinterpret_cast<int8_t*>(a.scratch);
    pixels_.scale = reinterpret_cast<float*>(a.scratch + plan_.pixel_scale);
    pixels_.sums = reinterpret_cast<float*>(a.scratch + plan_.pixel_sums);
    group_channels_ = v.channels / a.groups;
    group_rows_ = v.out_channels / a.groups;
    direct_ = v.taps() == 1 && v.x_channel == 1;
    runs_ = a.order == Order::kPatch && a.groups == 1 && a.dtype == DType::kFloat32 && v.x_channel == 1 &&
            v.x_at[1] == v.channels && v.dilation[1] == 1;
    padded_ = w_;
    if (w_.groups == 1) padded_.cols = padded_.group_size = plan_.depth;  // of a patch, which is zeros beyond its columns
  }

  void run() {
    if (v_.positions() == 0 || v_.out_channels == 0) return;
    if (plan_.pixel_blocks > 0) {
      const int64_t grain = 1 + 32768 / (plan_.pixel_blocks * kBlock);
      a_.parallel(v_.pixels(), grain, [](int64_t begin, int64_t end, void* self) {
        for (int64_t pixel = begin; pixel < end; ++pixel) static_cast<ConvRun*>(self)->read_pixel(pixel);
      }, this);
    }
    a_.parallel(plan_.slots, 1, [](int64_t begin, int64_t end, void* self) {
      for (int64_t slot = begin; slot < end; ++slot) static_cast<ConvRun*>(self)->compute(slot);
    }, this);
  }

 private:
  static constexpr int kMaxRows = 128;
  static constexpr int kSlab = 32;  // blocks of a tile between panels: at most 16 KiB, half an L1 cache

  // The panels of one slot.
  struct Panels {
    Quantized x;
    float* wide;
    float* patch;  // one row before it is quantized
  };

  Panels panels(int64_t slot) const {
    char* p = a_.scratch + plan_.slot + size_t(slot) * plan_.slot_bytes;
    return {{reinterpret_cast<int8_t*>(p), reinterpret_cast<float*>(p + plan_.slot_scale),
             reinterpret_cast<float*>(p + plan_.slot_sums)},
            reinterpret_cast<float*>(p),
            reinterpret_cast<float*>(p + plan_.slot_patch)};
  }

  const char* pixel_at(int64_t n, int64_t row, int64_t column) const {
    return a_.x + (n * v_.x_batch + row * v_.x_at[0] + column * v_.x_at[1]) * int64_t(element_size(a_.dtype));
  }

  // A pixel's channels as int8, each group's padded to whole blocks.
  void read_pixel(int64_t pixel) {
    const int64_t column = pixel % v_.size[1], rest = pixel / v_.size[1];
    const char* from = pixel_at(rest / v_.size[0], rest % v_.size[0], column);
    const int64_t blocks = plan_.pixel_blocks / a_.groups;
    for (int64_t g = 0; g < a_.groups; ++g) {
      const int64_t at = pixel * plan_.pixel_blocks + g * blocks;
      Weight all{};  // one group of scales for each block: sums by block
      all.cols = group_channels_;
      all.group_size = kBlock;
      all.groups = all.blocks = blocks, all.blocks_per_group = 1;
      const char* channels = from + g * group_channels_ * int64_t(element_size(a_.dtype));
      quantize_row<V>(all, channels, a_.dtype, {pixels_.codes + at * kBlock, pixels_.scale + at, pixels_.sums + at}, 0, 1,
                      nullptr);
    }
  }

  void compute(int64_t slot) {
    const Panels p = panels(slot);
    std::memset(p.patch, 0, size_t(plan_.depth) * 4);
    const int64_t begin = plan_.pieces * slot / plan_.slots, end = plan_.pieces * (slot + 1) / plan_.slots;
    int64_t held = -1;
    for (int64_t i = begin; i < end; ++i) {
      const ConvShares::Piece piece = plan_.piece(i);
      if (held != piece.block) gather(p, piece.group, piece.m0, piece.rows);
      held = piece.block;
      for (int64_t tile = piece.from; tile < piece.to; ++tile) multiply(p, piece.group, tile, piece.m0, piece.rows);
    }
  }

  void gather(const Panels& p, int64_t group, int64_t m0, int rows) {
    for (int64_t r0 = 0; r0 < rows; r0 += V::kRows) {
      const int64_t width = panel_width<V>(rows - r0), used = min64(width, rows - r0);
      const Quantized x = {p.x.codes + r0 * plan_.depth, p.x.scale + r0 * w_.blocks, p.x.sums + r0 * w_.groups};
      float* wide = p.wide + r0 * plan_.depth;
      if (used < width && a_.exact) std::memset(wide, 0, size_t(width * plan_.depth) * 4);
      if (used < width && !a_.exact) {
        std::memset(x.codes, 0, size_t(width * plan_.depth));
        std::memset(x.scale, 0, size_t(width * w_.blocks) * 4);
        std::memset(x.sums, 0, size_t(width * w_.groups) * 4);
      }
      for (int64_t r = 0; r < used; ++r) gather_row(p, x, wide, group, m0 + r0 + r, r, width);
    }
  }

  void gather_row(const Panels& p, const Quantized& x, float* wide, int64_t group, int64_t position, int64_t r,
                  int64_t width) {
    const int64_t column = position % v_.out_size[1], rest = position / v_.out_size[1];
    const int64_t n = rest / v_.out_size[0];
    const int64_t top = rest % v_.out_size[0] * v_.stride[0] - v_.before[0], left = column * v_.stride[1] - v_.before[1];
    const int64_t channel = group * group_channels_;
    if (a_.order == Order::kChannels) {
      a_.exact ? widen_taps(wide, n, top, left, channel, r, width) : copy_taps(x, n, top, left, group, r, width);
      return;
    }
    if (direct_ && inside(top, left))
      return take_row(w_, pixel_at(n, top, left) + channel * int64_t(element_size(a_.dtype)), a_.dtype, x, wide, r, width);
    if (runs_ && left >= 0 && left + v_.kernel[1] <= v_.size[1])
      read_runs(p.patch, n, top, left);
    else if (a_.dtype == DType::kFloat32)
      read_patch(p.patch, n, top, left, channel, [](const char* at, int64_t i) {
        float f;
        std::memcpy(&f, at + 4 * i, 4);
        return f;
      });
    else
      read_patch(p.patch, n, top, left, channel, [&](const char* at, int64_t i) { return load_scalar(at, a_.dtype, i); });
    take_row(padded_, reinterpret_cast<const char*>(p.patch), DType::kFloat32, x, wide, r, width);
  }

  void take_row(const Weight& w, const char* row, DType t, const Quantized& x, float* wide, int64_t r, int64_t width) const {
    a_.exact ? widen_row<V>(w, row, t, wide, r, width, nullptr) : quantize_row<V>(w, row, t, x, r, width, nullptr);
  }

  bool inside(int64_t row, int64_t column) const {
    return row >= 0 && row < v_.size[0] && column >= 0 && column < v_.size[1];
  }

  // The values under the kernel where those of a row of it lie together.
  void read_runs(float* patch, int64_t n, int64_t top, int64_t left) const {
    const int64_t run = v_.kernel[1] * v_.channels;
    for (int64_t i = 0; i < v_.kernel[0]; ++i, patch += run) {
      const int64_t row = top + i * v_.dilation[0];
      if (row >= 0 && row < v_.size[0])
        copy_floats(patch, reinterpret_cast<const float*>(pixel_at(n, row, left)), run);
      else
        std::memset(patch, 0, size_t(run) * 4);
    }
  }

  static void copy_floats(float* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }

  // The values under the kernel as floats, in the order of the weight's columns.
  template <class Load>
  void read_patch(float* patch, int64_t n, int64_t top, int64_t left, int64_t channel, Load load) const {
    const int64_t taps = v_.taps(), size = int64_t(element_size(a_.dtype));
    const int64_t tap_step = a_.order == Order::kPatch ? group_channels_ : 1;
    const int64_t channel_step = a_.order == Order::kPatch ? 1 : taps;
    for (int64_t i = 0, tap = 0; i < v_.kernel[0]; ++i) {
      for (int64_t j = 0; j < v_.kernel[1]; ++j, ++tap) {
        const int64_t row = top + i * v_.dilation[0], column = left + j * v_.dilation[1];
        float* to = patch + tap * tap_step;
        if (!inside(row, column)) {
          for (int64_t c = 0; c < group_channels_; ++c) to[c * channel_step] = 0.0f;
          continue;
        }
        const char* from = pixel_at(n, row, column) + channel * v_.x_channel * size;
        for (int64_t c = 0; c < group_channels_; ++c) to[c * channel_step] = load(from, c * v_.x_channel);
      }
    }
  }

  // Calls f(row, column, group of scales, its first block of a pixel, how many, first block of the panel) for each tap.
  template <class Fn>
  void for_each_tap(int64_t top, int64_t left, Fn f) const {
    int64_t b = 0, first = 0;
    for (int64_t g = 0; g < w_.groups; ++g) {
      const int64_t count = (min64((g + 1) * w_.blocks_per_group, w_.blocks) - b) / v_.taps();
      for (int64_t i = 0; i < v_.kernel[0]; ++i)
        for (int64_t j = 0; j < v_.kernel[1]; ++j, b += count)
          f(top + i * v_.dilation[0], left + j * v_.dilation[1], g, first, count, b);
      first += count;
    }
  }

  void copy_taps(const Quantized& x, int64_t n, int64_t top, int64_t left, int64_t group, int64_t r, int64_t width) const {
    for (int64_t g = 0; g < w_.groups; ++g) x.sums[g * width + r] = 0.0f;
    const int64_t group_blocks = plan_.pixel_blocks / a_.groups;
    for_each_tap(top, left, [&](int64_t row, int64_t column, int64_t g, int64_t first, int64_t count, int64_t b) {
      int8_t* codes = x.codes + (b * width + r) * kBlock;
      float* scale = x.scale + b * width + r;
      if (!inside(row, column)) {
        for (int64_t i = 0; i < count; ++i, codes += width * kBlock, scale += width) {
          std::memset(codes, 0, kBlock);
          *scale = 0.0f;
        }
        return;
      }
      const int64_t pixel = (n * v_.size[0] + row) * v_.size[1] + column;
      const int64_t at = pixel * plan_.pixel_blocks + group * group_blocks + first;
      const int8_t* from = pixels_.codes + at * kBlock;
      float sum = 0.0f;
      for (int64_t i = 0; i < count; ++i, codes += width * kBlock, scale += width) {
        std::memcpy(codes, from + i * kBlock, kBlock);
        *scale = pixels_.scale[at + i];
        sum += pixels_.sums[at + i];
      }
      x.sums[g * width + r] += sum;
    });
  }

  void widen_taps(float* wide, int64_t n, int64_t top, int64_t left, int64_t channel, int64_t r, int64_t width) const {
    for_each_tap(top, left, [&](int64_t row, int64_t column, int64_t, int64_t first, int64_t count, int64_t b) {
      const bool seen = inside(row, column);
      const char* from = seen ? pixel_at(n, row, column) : nullptr;
      for (int64_t i = 0; i < count; ++i) {
        typename V::F lo = V::set1(0.0f), hi = lo;
        const int64_t c = (first + i) * kBlock;
        if (seen) load_block<V>(from, a_.dtype, channel + c, int(min64(kBlock, group_channels_ - c)), lo, hi);
        V::store(wide + ((b + i) * width + r) * kBlock, lo);
        V::store(wide + ((b + i) * width + r) * kBlock + 16, hi);
      }
    });
  }

  void multiply(const Panels& p, int64_t group, int64_t tile, int64_t m0, int rows) {
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
  void multiply(const Panels& p, int64_t group, int64_t group_tile, int64_t m0, int rows) {
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

  // panel_width() as a template argument.
  template <int kBits, int kDot, int MR>
  void quantized_rows(const Panels& p, int rows, int64_t m, int64_t tile, const uint8_t* cells, int64_t b0, int64_t b1,
                      int64_t ahead, float* totals) const {
    if constexpr (MR > 1)
      if (rows <= MR / 2) return quantized_rows<kBits, kDot, MR / 2>(p, rows, m, tile, cells, b0, b1, ahead, totals);
    dot_quantized<V, kBits, kDot, MR, false>(w_, p.x, m, tile, cells, b0, b1, ahead, totals);
  }

  void epilogue(int64_t group, int64_t group_tile, int64_t m0, int rows, const float* totals) const {
    using F = typename V::F;
    const int64_t n0 = group_tile * kTile, first = group * group_rows_ + n0, size = int64_t(element_size(a_.dtype));
    const int count = int(min64(kTile, group_rows_ - n0));
    F bias = V::set1(0.0f);
    if (a_.bias != nullptr) bias = load_some<V>(a_.bias + first * int64_t(element_size(a_.bias_dtype)), a_.bias_dtype, count);
    for (int m = 0; m < rows; ++m) {
      const int64_t at = ((m0 + m) * v_.out_channels + first) * size;
      F y = Act<V>::apply(a_.activation, V::add(V::load(totals + m * kTile), bias));
      if (a_.add != nullptr) y = Act<V>::apply(a_.after, V::add(y, load_some<V>(a_.add + at, a_.dtype, count)));
      store_some<V>(a_.out + at, a_.dtype, y, count);
    }
  }

  const Conv& a_;
  const Weight& w_;
  const Window& v_;
  const ConvPlan plan_;
  Weight padded_{};
  Quantized pixels_{};
  int64_t group_channels_ = 0, group_rows_ = 0;
  bool direct_ = false, runs_ = false;
};

template <class V>
void conv(const Conv& a) {
  ConvRun<V>(a).run();
}

}  // namespace
}  // namespace qcompile
