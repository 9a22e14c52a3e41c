// Convolution on activations with one scale: int8 codes are read, and may be what is written, so that between convolutions
// nothing becomes a float. A block of output positions is gathered into panels of bytes, and the tiles of the weight pass over
// them; a sum is one integer for as long as the weight has one scale.
#pragma once

#include "codes.h"
#include "encode_image.h"
#include "finish.h"

namespace qcompile {
namespace {

template <class V>
class ConvCodes {
  using F = typename V::F;

 public:
  explicit ConvCodes(const Conv& a)
      : a_(a), w_(a.w), v_(a.x_codes ? a.window : together(a.window)), plan_(a), finish_(a) {
    x_ = reinterpret_cast<const int8_t*>(a.x_codes ? a.x : a.scratch);
    x_end_ = x_ + (v_.batch - 1) * v_.x_batch + (v_.size[0] - 1) * v_.x_at[0] + (v_.size[1] - 1) * v_.x_at[1] + v_.channels;
    group_channels_ = v_.channels / a.groups;
    group_rows_ = v_.out_channels / a.groups;
    pieces_ = plan_.row_blocks * plan_.splits * a.groups;
    pointwise_ = v_.taps() == 1 && v_.stride[0] == 1 && v_.stride[1] == 1 && v_.before[0] == 0 && v_.before[1] == 0 &&
                 v_.out_size[0] == v_.size[0] && v_.out_size[1] == v_.size[1] && v_.x_at[1] == v_.channels &&
                 v_.x_at[0] == v_.size[1] * v_.channels && v_.x_batch == v_.size[0] * v_.x_at[0];
    grouped_ = w_.groups > 1 || w_.zero_kind != Zero::kMiddle;
    sums_ = w_.zero_kind != Zero::kMiddle;
    const int64_t last = w_.cols - (w_.groups - 1) * w_.group_size;
    chunks_ = a.order == Order::kChannels ? 8 : chunks(w_.group_size);
    last_chunks_ = a.order == Order::kChannels ? 8 : chunks(last);
  }

  void run() {
    if (v_.positions() == 0) return;
    if (!a_.x_codes) EncodeImage<V>(a_, reinterpret_cast<int8_t*>(a_.scratch)).run();
    a_.parallel(plan_.slots, 1, [](int64_t begin, int64_t end, void* self) {
      for (int64_t slot = begin; slot < end; ++slot) static_cast<ConvCodes*>(self)->compute(slot);
    }, this);
  }

 private:
  static_assert(V::kSignedTiles <= kMostTiles, "the plan has room for as many");
  static constexpr uint64_t kFlip = uint64_t(0x0101010101010101) * uint8_t(V::Signed::kZero);

  // 32 bytes of ones, then 32 of zeros.
  alignas(64) static constexpr uint64_t kMask[2 * kBlock / 8] = {~uint64_t(0), ~uint64_t(0), ~uint64_t(0), ~uint64_t(0)};

  struct Panels {
    int8_t* codes;  // [panel][block][row][32]
    float* sums;    // [panel][group][row], where there are zero points
    Slab slab;
    int8_t* patch;  // one row before it is cut into blocks
  };

  static int chunks(int64_t columns) { return int((columns - (columns - 1) / kBlock * kBlock + 3) / 4); }

  Panels panels(int64_t slot) const {
    char* p = a_.scratch + plan_.slot + size_t(slot) * plan_.slot_bytes;
    return {reinterpret_cast<int8_t*>(p),
            reinterpret_cast<float*>(p + plan_.slot_sums),
            {reinterpret_cast<uint8_t*>(p + plan_.slot_slab), reinterpret_cast<int32_t*>(p + plan_.slot_start), w_.blocks,
             w_.groups, w_.blocks_per_group, chunks_, last_chunks_},
            reinterpret_cast<int8_t*>(p + plan_.slot_patch)};
  }

  void compute(int64_t slot) {
    const Panels p = panels(slot);
    const int64_t begin = pieces_ * slot / plan_.slots, end = pieces_ * (slot + 1) / plan_.slots;
    int64_t held = -1;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t split = piece % plan_.splits, rest = piece / plan_.splits;
      const int64_t group = rest % a_.groups, m0 = rest / a_.groups * plan_.row_block;
      const int rows = int(min64(plan_.row_block, v_.positions() - m0));
      if (held != rest) gather(p, group, m0, rows);
      held = rest;
      const int64_t from = plan_.group_tiles * split / plan_.splits, to = plan_.group_tiles * (split + 1) / plan_.splits;
      for (int64_t tile = from; tile < to;) {
        if (tile + V::kSignedTiles <= to) {
          multiply<V::kSignedTiles>(p, group, tile, m0, rows);
          tile += V::kSignedTiles;
        } else {
          multiply<1>(p, group, tile++, m0, rows);
        }
      }
    }
  }

  // The rows of a register tile: kRows, or for the last few the smallest power of two that holds them.
  static int64_t panel_width(int64_t rows) {
    int64_t width = V::kRows;
    while (width / 2 >= rows) width /= 2;
    return width;
  }

  void gather(const Panels& p, int64_t group, int64_t m0, int rows) const {
    for (int64_t r0 = 0; r0 < rows; r0 += V::kRows) {
      const int64_t width = panel_width(rows - r0), used = min64(width, rows - r0);
      int8_t* codes = p.codes + r0 * plan_.depth;
      for (int64_t r = 0; r < used; ++r) gather_row(p, codes + r * kBlock, group, m0 + r0 + r, width);
      if (sums_) sum_up(codes, p.sums + r0 * w_.groups, width);
    }
  }

  // A block of 32 codes, of which `count` are the row's and the rest 0. `end`: of what may be read.
  void put(int8_t* to, const int8_t* from, int64_t count, const int8_t* end) const {
    uint64_t eights[kBlock / 8], mask[kBlock / 8];
    if (from + kBlock <= end) {
      std::memcpy(eights, from, kBlock);
      std::memcpy(mask, reinterpret_cast<const char*>(kMask) + kBlock - count, kBlock);
      for (int i = 0; i < kBlock / 8; ++i) eights[i] &= mask[i];
    } else {
      std::memset(eights, 0, kBlock);
      std::memcpy(eights, from, size_t(count));
    }
    for (uint64_t& eight : eights) eight ^= kFlip;
    std::memcpy(to, eights, kBlock);
  }

  // A row in the order of the weight's columns, cut into blocks of its groups of scales.
  void cut(int8_t* to, const int8_t* row, const int8_t* end, int64_t width) const {
    for_each_block(w_, [&](int64_t, int64_t b, int64_t column, int valid) {
      put(to + b * width * kBlock, row + column, valid, end);
    });
  }

  void gather_row(const Panels& p, int8_t* to, int64_t group, int64_t position, int64_t width) const {
    const int64_t channel = group * group_channels_;
    if (pointwise_) return cut(to, x_ + position * v_.channels + channel, x_end_, width);
    const int64_t column = position % v_.out_size[1], rest = position / v_.out_size[1];
    const int64_t n = rest / v_.out_size[0];
    const int64_t top = rest % v_.out_size[0] * v_.stride[0] - v_.before[0], left = column * v_.stride[1] - v_.before[1];
    const int8_t* image = x_ + n * v_.x_batch + channel;
    if (a_.order == Order::kChannels) return copy_taps(to, image, top, left, width);
    if (v_.taps() == 1 && inside(top, left))
      return cut(to, image + top * v_.x_at[0] + left * v_.x_at[1], x_end_, width);
    a_.order == Order::kPatch ? read_patch(p.patch, image, top, left) : read_rows(p.patch, image, top, left);
    cut(to, p.patch, p.patch + plan_.depth, width);
  }

  bool inside(int64_t row, int64_t column) const {
    return row >= 0 && row < v_.size[0] && column >= 0 && column < v_.size[1];
  }

  // Position, channel: what lies together stays together.
  void read_patch(int8_t* patch, const int8_t* image, int64_t top, int64_t left) const {
    const bool whole = a_.groups == 1 && v_.dilation[1] == 1 && v_.x_at[1] == v_.channels && left >= 0 &&
                       left + v_.kernel[1] <= v_.size[1];
    const int64_t run = v_.kernel[1] * group_channels_;
    for (int64_t i = 0; i < v_.kernel[0]; ++i, patch += run) {
      const int64_t row = top + i * v_.dilation[0];
      if (row < 0 || row >= v_.size[0]) {
        std::memset(patch, 0, size_t(run));
        continue;
      }
      const int8_t* from = image + row * v_.x_at[0] + left * v_.x_at[1];
      if (whole) {
        std::memcpy(patch, from, size_t(run));
        continue;
      }
      for (int64_t j = 0; j < v_.kernel[1]; ++j) {
        const int64_t column = left + j * v_.dilation[1];
        if (column >= 0 && column < v_.size[1])
          std::memcpy(patch + j * group_channels_, from + j * v_.dilation[1] * v_.x_at[1], size_t(group_channels_));
        else
          std::memset(patch + j * group_channels_, 0, size_t(group_channels_));
      }
    }
  }

  // Channel, position.
  void read_rows(int8_t* patch, const int8_t* image, int64_t top, int64_t left) const {
    const int64_t taps = v_.taps();
    for (int64_t i = 0, tap = 0; i < v_.kernel[0]; ++i) {
      for (int64_t j = 0; j < v_.kernel[1]; ++j, ++tap) {
        const int64_t row = top + i * v_.dilation[0], column = left + j * v_.dilation[1];
        const int8_t* from = inside(row, column) ? image + row * v_.x_at[0] + column * v_.x_at[1] : nullptr;
        for (int64_t c = 0; c < group_channels_; ++c) patch[c * taps + tap] = from == nullptr ? int8_t(0) : from[c];
      }
    }
  }

  // Blocks of a pixel's channels for each position under the kernel; of each group of scales in turn.
  void copy_taps(int8_t* to, const int8_t* image, int64_t top, int64_t left, int64_t width) const {
    int64_t b = 0, first = 0;
    for (int64_t g = 0; g < w_.groups; ++g) {
      const int64_t count = (min64((g + 1) * w_.blocks_per_group, w_.blocks) - b) / v_.taps();
      for (int64_t i = 0; i < v_.kernel[0]; ++i) {
        for (int64_t j = 0; j < v_.kernel[1]; ++j) {
          const int64_t row = top + i * v_.dilation[0], column = left + j * v_.dilation[1];
          const int8_t* from = inside(row, column) ? image + row * v_.x_at[0] + column * v_.x_at[1] : nullptr;
          for (int64_t k = first; k < first + count; ++k, ++b) {
            int8_t* block = to + b * width * kBlock;
            if (from == nullptr)
              std::memset(block, V::Signed::kZero, kBlock);
            else
              put(block, from + k * kBlock, min64(kBlock, group_channels_ - k * kBlock), x_end_);
          }
        }
      }
      first += count;
    }
  }

  // The sums of each group of a panel's rows, for the zero points.
  void sum_up(const int8_t* codes, float* sums, int64_t width) const {
    for (int64_t g = 0; g < w_.groups; ++g) {
      const int64_t begin = g * w_.blocks_per_group, end = min64(begin + w_.blocks_per_group, w_.blocks);
      for (int64_t r = 0; r < width; ++r) {
        int32_t sum = 0;
        for (int64_t b = begin; b < end; ++b)
          for (int i = 0; i < kBlock; ++i) sum += int8_t(uint8_t(codes[(b * width + r) * kBlock + i]) ^ uint8_t(kFlip));
        sums[g * width + r] = float(sum);
      }
    }
  }

  template <int kTiles>
  void multiply(const Panels& p, int64_t group, int64_t group_tile, int64_t m0, int rows) const {
    const int64_t tile = group * plan_.group_tiles + group_tile;
    typename Finish<V>::Channels channels[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      fill_tile<V>(w_, tile + t, p.slab, t);
      F scale = V::set1(a_.x_scale);
      if (!grouped_) scale = V::mul(scale, GroupScale<V>::load(w_, tile + t, 0, 0.0f).scale);
      const int64_t n0 = (group_tile + t) * kTile;
      channels[t] = finish_.channels(group * group_rows_ + n0, int(min64(kTile, group_rows_ - n0)), scale);
    }
    for (int m = 0; m < rows; m += V::kRows) rows_of<kTiles, V::kRows>(p, tile, m0, m, rows - m, channels);
  }

  // panel_width() as a template argument.
  template <int kTiles, int kRows>
  void rows_of(const Panels& p, int64_t tile, int64_t m0, int m, int rows,
               const typename Finish<V>::Channels* channels) const {
    if constexpr (kRows > 1)
      if (rows <= kRows / 2) return rows_of<kTiles, kRows / 2>(p, tile, m0, m, rows, channels);
    const int8_t* codes = p.codes + m * plan_.depth;
    if (!grouped_)
      return times_codes<V, kRows, kTiles>(p.slab, codes, [&](int r, int t, int64_t, F sum) __attribute__((always_inline)) {
        if (r < rows) finish_.store(channels[t], m0 + m + r, sum);
      });
    const float* sums = p.sums + m * w_.groups;
    const float middle = float(1 << (w_.bits - 1));
    alignas(64) float totals[kRows * kTiles * kTile];
    times_codes<V, kRows, kTiles>(p.slab, codes, [&](int r, int t, int64_t g, F sum) __attribute__((always_inline)) {
      const GroupScale<V> s = GroupScale<V>::load(w_, tile + t, g, middle);
      float* total = totals + (r * kTiles + t) * kTile;
      F y = g == 0 ? V::mul(sum, s.scale) : V::fma(sum, s.scale, V::load(total));
      if (sums_) y = V::fnma(s.offset, V::set1(sums[g * kRows + r]), y);
      V::store(total, y);
      if (g + 1 == w_.groups && r < rows) finish_.store(channels[t], m0 + m + r, y);
    });
  }

  const Conv& a_;
  const Weight& w_;
  const Window v_;
  const CodesPlan plan_;
  const Finish<V> finish_;
  const int8_t* x_ = nullptr;
  const int8_t* x_end_ = nullptr;
  int64_t group_channels_ = 0, group_rows_ = 0, pieces_ = 0;
  bool pointwise_ = false, grouped_ = false, sums_ = false;
  int chunks_ = 8, last_chunks_ = 8;
};

template <class V>
void conv_codes(const Conv& a) {
  ConvCodes<V>(a).run();
}

}  // namespace
}  // namespace qcompile
