// What a convolution multiplies: output positions as rows of int8, 32 values with a scale each, or of floats, with the columns
// in the weight's order.
#pragma once

#include "conv_args.h"
#include "lanes.h"
#include "many.h"
#include "tile.h"

namespace qcompile {
namespace {

// The panels of one thread.
struct ConvPanels {
  Quantized x;
  float* wide;
  float* patch;  // rows of a panel before they are quantized
};

template <class V>
class ConvGather {
 public:
  ConvGather(const Conv& a, const ConvPlan& plan) : a_(a), w_(a.w), v_(a.window), plan_(plan) {
    const Window& v = a.window;
    pixels_.codes = reinterpret_cast<int8_t*>(a.scratch);
    pixels_.scale = reinterpret_cast<float*>(a.scratch + plan_.pixel_scale);
    pixels_.first = reinterpret_cast<uint32_t*>(a.scratch + plan_.pixel_first);
    group_channels_ = v.channels / a.groups;
    tap_blocks_ = w_.blocks_per_group / v.taps();
    many_ = V::has_ready(w_.bits) && !a.exact;
    direct_ = v.taps() == 1 && v.x_channel == 1;
    runs_ = a.order == Order::kPatch && a.groups == 1 && a.dtype == DType::kFloat32 && v.x_channel == 1 &&
            v.x_at[1] == v.channels && v.dilation[1] == 1;
    turned_ = a.order == Order::kRows && a.dtype == DType::kFloat32 && v.x_channel == 1 && v.taps() <= kTile;
    padded_ = w_;
    if (w_.groups == 1) padded_.cols = padded_.group_size = plan_.depth;  // of a patch, which is zeros beyond its columns
  }

  // Those of a slot, empty.
  ConvPanels panels(int64_t slot) const {
    char* p = a_.scratch + plan_.slot + size_t(slot) * plan_.slot_bytes;
    float* patch = reinterpret_cast<float*>(p + plan_.slot_patch);
    std::memset(patch, 0, size_t(V::kRows * patch_floats()) * 4);
    return {{reinterpret_cast<int8_t*>(p), reinterpret_cast<float*>(p + plan_.slot_scale),
             reinterpret_cast<float*>(p + plan_.slot_sums),
             many_ && V::kReadyUnsigned ? reinterpret_cast<uint32_t*>(p + plan_.slot_first) : nullptr},
            reinterpret_cast<float*>(p),
            patch};
  }

  // Whether a tile that was made ready passes over so many rows (many.h).
  bool together(int64_t rows) const { return many_ && rows > kFewRows; }

  // Pixels' channels as int8, those of each group padded to whole blocks. Without padding what lies side by side is one row.
  void read_pixels(int64_t begin, int64_t end) const {
    const bool whole = group_channels_ % kBlock == 0, side_by_side = whole && v_.x_at[1] == v_.channels;
    const int64_t blocks = plan_.pixel_blocks / a_.groups;
    for (int64_t pixel = begin, run; pixel < end; pixel += run) {
      const int64_t column = pixel % v_.size[1], rest = pixel / v_.size[1];
      const char* from = pixel_at(rest / v_.size[0], rest % v_.size[0], column);
      run = side_by_side ? min64(v_.size[1] - column, end - pixel) : 1;
      const int64_t at = pixel * plan_.pixel_blocks;
      if (whole)
        read_channels(from, run * v_.channels, at, run * plan_.pixel_blocks);
      else
        for (int64_t g = 0; g < a_.groups; ++g)
          read_channels(from + g * group_channels_ * int64_t(element_size(a_.dtype)), group_channels_, at + g * blocks, blocks);
    }
  }

  // So many of them, as blocks of pixels from `at` on.
  void read_channels(const char* from, int64_t count, int64_t at, int64_t blocks) const {
    Weight all{};
    all.cols = count;
    all.group_size = kBlock;
    all.groups = all.blocks = blocks, all.blocks_per_group = 1;
    const Quantized to = {pixels_.codes + at * kBlock, pixels_.scale + at, nullptr, pixels_.first + at};
    quantize_row<V>(all, from, a_.dtype, to, 0, 1, nullptr);
  }

  // Positions from m0 on, for a group of channels.
  void gather(const ConvPanels& p, int64_t group, int64_t m0, int rows) const {
    const bool ready = together(rows);
    const PanelShares shares(rows, ready ? V::kManyRows : V::kRows, ready);
    Place at = place(m0);
    for (int64_t panel = 0; panel < shares.count; ++panel) {
      const int64_t r0 = shares.begin(panel), used = shares.begin(panel + 1) - r0;
      const int64_t width = ready ? used : panel_width<V>(used);
      Quantized x = p.x.panel(w_, r0);
      if (!ready) x.first = nullptr;
      float* wide = p.wide + r0 * plan_.depth;
      if (used < width && a_.exact) std::memset(wide, 0, size_t(width * plan_.depth) * 4);
      if (used < width && !a_.exact) {
        std::memset(x.codes, 0, size_t(width * plan_.depth));
        std::memset(x.scale, 0, size_t(width * w_.blocks) * 4);
        std::memset(x.sums, 0, size_t(width * w_.groups) * 4);
      }
      if (a_.order == Order::kChannels || direct_) {
        for (int64_t r = 0; r < used; ++r, next(at)) gather_row(x, wide, p.patch, group, at, r, width);
      } else {
        // Of all rows before the first is quantized: what was just stored in pieces cannot be loaded at once.
        for (int64_t r = 0; r < used; ++r, next(at)) read_row(p.patch + r * patch_floats(), group, at);
        for (int64_t r = 0; r < used; ++r)
          take_row(padded_, reinterpret_cast<const char*>(p.patch + r * patch_floats()), DType::kFloat32, x, wide, r, width);
      }
      if (x.first != nullptr) begin_sums(w_, x, width, false);
    }
  }

 private:
  const char* pixel_at(int64_t n, int64_t row, int64_t column) const {
    return a_.x + (n * v_.x_batch + row * v_.x_at[0] + column * v_.x_at[1]) * int64_t(element_size(a_.dtype));
  }

  int64_t patch_floats() const { return plan_.depth + kTile; }

  // An output position.
  struct Place {
    int64_t n, row, column;
  };
  Place place(int64_t position) const {
    const int64_t rest = position / v_.out_size[1];
    return {rest / v_.out_size[0], rest % v_.out_size[0], position % v_.out_size[1]};
  }
  void next(Place& at) const {
    if (++at.column < v_.out_size[1]) return;
    at.column = 0;
    if (++at.row < v_.out_size[0]) return;
    at.row = 0;
    ++at.n;
  }

  void gather_row(const Quantized& x, float* wide, const float* patch, int64_t group, const Place& at, int64_t r,
                  int64_t width) const {
    const int64_t n = at.n, top = at.row * v_.stride[0] - v_.before[0], left = at.column * v_.stride[1] - v_.before[1];
    const int64_t channel = group * group_channels_;
    if (a_.order == Order::kChannels)
      return a_.exact ? widen_taps(wide, n, top, left, channel, r, width) : copy_taps(x, n, top, left, group, r, width);
    if (inside(top, left))
      return take_row(w_, pixel_at(n, top, left) + channel * int64_t(element_size(a_.dtype)), a_.dtype, x, wide, r, width);
    take_row(padded_, reinterpret_cast<const char*>(patch), DType::kFloat32, x, wide, r, width);  // zeros
  }

  void read_row(float* patch, int64_t group, const Place& at) const {
    const int64_t n = at.n, top = at.row * v_.stride[0] - v_.before[0], left = at.column * v_.stride[1] - v_.before[1];
    const int64_t channel = group * group_channels_;
    if (runs_ && left >= 0 && left + v_.kernel[1] <= v_.size[1])
      read_runs(patch, n, top, left);
    else if (turned_)
      read_turned(patch, n, top, left, channel);
    else if (a_.dtype == DType::kFloat32)
      read_patch(patch, n, top, left, channel, [](const char* at, int64_t i) {
        float f;
        std::memcpy(&f, at + 4 * i, 4);
        return f;
      });
    else
      read_patch(patch, n, top, left, channel, [&](const char* at, int64_t i) { return load_scalar(at, a_.dtype, i); });
  }

  void take_row(const Weight& w, const char* row, DType t, const Quantized& x, float* wide, int64_t r, int64_t width) const {
    a_.exact ? widen_row<V>(w, row, t, wide, r, width, nullptr) : quantize_row<V>(w, row, t, x, r, width, nullptr);
  }

  bool inside(int64_t row, int64_t column) const {
    return row >= 0 && row < v_.size[0] && column >= 0 && column < v_.size[1];
  }

  // The values under the kernel, channel by channel, 16 of them at a time: rows of channels become rows of taps. What is
  // stored beyond a channel's taps is 0, and is overwritten by the next channel's.
  void read_turned(float* patch, int64_t n, int64_t top, int64_t left, int64_t channel) const {
    const int64_t taps = v_.taps();
    const float* from[kTile];
    for (int64_t i = 0, tap = 0; i < v_.kernel[0]; ++i)
      for (int64_t j = 0; j < v_.kernel[1]; ++j, ++tap) {
        const int64_t row = top + i * v_.dilation[0], column = left + j * v_.dilation[1];
        from[tap] = inside(row, column) ? reinterpret_cast<const float*>(pixel_at(n, row, column)) + channel : nullptr;
      }
    alignas(64) float turned[kTile * kTile];
    typename V::F rows[kTile];
    for (auto& row : rows) row = V::set1(0.0f);
    for (int64_t c = 0; c < group_channels_; c += kTile) {
      const int count = int(min64(kTile, group_channels_ - c));
      for (int64_t tap = 0; tap < taps; ++tap)
        if (from[tap] != nullptr)
          rows[tap] = load_some<V>(reinterpret_cast<const char*>(from[tap] + c), DType::kFloat32, count);
      V::transpose(rows, turned, kTile);
      for (int i = 0; i < count; ++i) V::store(patch + (c + i) * taps, V::load(turned + i * kTile));
    }
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
    const int64_t all = plan_.tap_blocks;
    for (int64_t g = 0; g < w_.groups; ++g) {
      const int64_t count = min64(tap_blocks_, all - first);
      for (int64_t i = 0; i < v_.kernel[0]; ++i)
        for (int64_t j = 0; j < v_.kernel[1]; ++j, b += count)
          f(top + i * v_.dilation[0], left + j * v_.dilation[1], g, first, count, b);
      first += count;
    }
  }

  void copy_taps(const Quantized& x, int64_t n, int64_t top, int64_t left, int64_t group, int64_t r, int64_t width) const {
    const bool summed = x.first == nullptr;
    if (summed)
      for (int64_t g = 0; g < w_.groups; ++g) x.sums[g * width + r] = 0.0f;
    const int64_t group_blocks = plan_.tap_blocks;
    for_each_tap(top, left, [&](int64_t row, int64_t column, int64_t g, int64_t first, int64_t count, int64_t b) {
      int8_t* codes = x.codes + (b * width + r) * kBlock;
      const int64_t to = b * width + r;
      if (!inside(row, column)) {
        for (int64_t i = 0; i < count; ++i, codes += width * kBlock) {
          std::memset(codes, 0, kBlock);
          x.scale[to + i * width] = 0.0f;
          if (!summed) x.first[to + i * width] = 0;
        }
        return;
      }
      const int64_t pixel = (n * v_.size[0] + row) * v_.size[1] + column;
      const int64_t at = pixel * plan_.pixel_blocks + group * group_blocks + first;
      const int8_t* from = pixels_.codes + at * kBlock;
      float sum = 0.0f;
      for (int64_t i = 0; i < count; ++i, codes += width * kBlock) {
        std::memcpy(codes, from + i * kBlock, kBlock);
        const float scale = pixels_.scale[at + i];
        x.scale[to + i * width] = scale;
        if (!summed)
          x.first[to + i * width] = pixels_.first[at + i];
        else
          sum += scale * float(int32_t(pixels_.first[at + i]));
      }
      if (summed) x.sums[g * width + r] += sum;
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

  const Conv& a_;
  const Weight& w_;
  const Window& v_;
  const ConvPlan& plan_;
  Weight padded_{};
  Quantized pixels_{};
  int64_t group_channels_ = 0;
  int64_t tap_blocks_ = 0;  // blocks of a tap in a full group of scales
  bool direct_ = false, runs_ = false, turned_ = false, many_ = false;
};

}  // namespace
}  // namespace qcompile
