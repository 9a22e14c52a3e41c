// Panels of int8 activations for a product (conv_codes.h): blocks of 32 codes under the kernel, of the rows of a register tile
// side by side.
#pragma once

#include "encode_image.h"
#include "tile.h"

namespace qcompile {
namespace {

enum : uint8_t { kHasNan = 1, kHasNegative = 2 };  // of a panel

// Some rows.
struct CodePanels {
  int8_t* codes;   // [panel][block][row][32]
  float* sums;     // [panel][group][row], where there are zero points
  uint8_t* flags;  // [panel]
  int8_t* patch;   // the rows of a panel before they are cut into blocks
};

template <class V>
class GatherCodes {
 public:
  // x becomes int8 before, in scratch, where the plan says so.
  GatherCodes(const Conv& a, const CodesPlan& plan)
      : a_(a), w_(a.w), v_(plan.image ? together(a.window) : a.window), depth_(plan.depth), patch_(plan.patch) {
    by_row_ = !a.x_codes && !plan.image;
    x_ = reinterpret_cast<const int8_t*>(plan.image ? a.scratch : a.x);
    x_end_ = x_ + (v_.batch - 1) * v_.x_batch + (v_.size[0] - 1) * v_.x_at[0] + (v_.size[1] - 1) * v_.x_at[1] + v_.channels;
    group_channels_ = v_.channels / a.groups;
    pointwise_ = v_.taps() == 1 && v_.before[0] == 0 && v_.before[1] == 0 &&
                 (v_.out_size[0] - 1) * v_.stride[0] < v_.size[0] && (v_.out_size[1] - 1) * v_.stride[1] < v_.size[1];
    in_turn_ = pointwise_ && v_.stride[0] == 1 && v_.stride[1] == 1 && v_.x_at[0] == v_.size[1] * v_.x_at[1] &&
               v_.x_batch == v_.size[0] * v_.x_at[0];
    patches_ = by_row_ || (!pointwise_ && a.order != Order::kChannels);
    sums_ = w_.zero_kind != Zero::kMiddle;
    even_ = w_.groups == 1 || w_.group_size % kBlock == 0;
  }

  // `rows` output positions from m0 on.
  void operator()(const CodePanels& p, int64_t group, int64_t m0, int rows) const {
    Position at = position_of(m0);
    for (int64_t r0 = 0; r0 < rows; r0 += V::kRows) {
      const int64_t width = panel_width<V>(rows - r0), used = min64(width, rows - r0);
      int8_t* codes = p.codes + r0 * depth_;
      Seen seen{};
      if (in_turn_ && !by_row_) {
        const int8_t* from = x_ + group * group_channels_ + (m0 + r0) * v_.x_at[1];
        for (int64_t r = 0; r < used; ++r, from += v_.x_at[1]) cut(codes + r * kBlock, from, x_end_, width, seen);
      } else {
        for (int64_t r = 0; r < used; ++r, at = after(at))
          gather_row(p.patch + r * patch_, codes + r * kBlock, group, at, width, seen);
        for (int64_t r = 0; patches_ && r < used; ++r)
          cut(codes + r * kBlock, p.patch + r * patch_, p.patch + (r + 1) * patch_, width, seen);
      }
      p.flags[r0 / V::kRows] = uint8_t((tops(seen.nan) ? kHasNan : 0) | (tops(seen.all) ? kHasNegative : 0));
      if (sums_) sum_up(codes, p.sums + r0 * w_.groups, width);
    }
  }

 private:
  using Bytes = uint8_t __attribute__((vector_size(kBlock)));
  // as many bytes of ones, then of zeros
  alignas(64) static constexpr uint64_t kOnes[2 * kBlock / 8] = {~uint64_t(0), ~uint64_t(0), ~uint64_t(0), ~uint64_t(0)};

  // Of some codes, byte by byte: which were NaN, and all of their bits.
  struct Seen {
    Bytes nan, all;
  };

  static Bytes load(const void* from) {
    Bytes r;
    std::memcpy(&r, from, kBlock);
    return r;
  }
  static void store(int8_t* to, Bytes codes, Seen& seen) {
    seen.nan |= Bytes(codes == uint8_t(kNan));
    seen.all |= codes;
    codes ^= uint8_t(V::Signed::kZero);
    std::memcpy(to, &codes, kBlock);
  }
  // Whether any has its top bit set.
  static bool tops(const Bytes& bytes) {
    uint64_t eights[kBlock / 8];
    std::memcpy(eights, &bytes, kBlock);
    return ((eights[0] | eights[1] | eights[2] | eights[3]) & 0x8080808080808080u) != 0;
  }

  // A block of 32 codes, of which `count` are the row's and the rest 0. `end`: of what may be read.
  static void put(int8_t* to, const int8_t* from, int64_t count, const int8_t* end, Seen& seen) {
    if (count == kBlock) return store(to, load(from), seen);
    if (from + kBlock <= end) return store(to, load(from) & load(reinterpret_cast<const char*>(kOnes) + kBlock - count), seen);
    int8_t some[kBlock] = {};
    std::memcpy(some, from, size_t(count));
    store(to, load(some), seen);
  }

  // A row in the order of the weight's columns, cut into blocks of its groups of scales.
  void cut(int8_t* to, const int8_t* row, const int8_t* end, int64_t width, Seen& seen) const {
    if (!even_) {
      for_each_block(w_, [&](int64_t, int64_t b, int64_t column, int valid) {
        put(to + b * width * kBlock, row + column, valid, end, seen);
      });
      return;
    }
    const int64_t step = width * kBlock;
    int64_t left = w_.cols;
    for (; left >= kBlock; left -= kBlock, row += kBlock, to += step) store(to, load(row), seen);
    if (left > 0) put(to, row, left, end, seen);
  }

  // Of an output.
  struct Position {
    int64_t n, row, column;
  };
  Position position_of(int64_t m) const {
    const int64_t rest = m / v_.out_size[1];
    return {rest / v_.out_size[0], rest % v_.out_size[0], m % v_.out_size[1]};
  }
  Position after(Position at) const {
    if (++at.column < v_.out_size[1]) return at;
    return at.row + 1 < v_.out_size[0] ? Position{at.n, at.row + 1, 0} : Position{at.n + 1, 0, 0};
  }

  // Into the panel, or where patches_ into `patch`.
  void gather_row(int8_t* patch, int8_t* to, int64_t group, Position at, int64_t width, Seen& seen) const {
    const int64_t top = at.row * v_.stride[0] - v_.before[0], left = at.column * v_.stride[1] - v_.before[1];
    if (by_row_) return encode_row(patch, group, at.n, top, left);
    const int8_t* image = x_ + at.n * v_.x_batch + group * group_channels_;
    if (pointwise_) return cut(to, image + top * v_.x_at[0] + left * v_.x_at[1], x_end_, width, seen);
    if (a_.order == Order::kChannels) return copy_taps(to, image, top, left, width, seen);
    a_.order == Order::kPatch ? read_patch(patch, image, top, left) : read_rows(patch, image, top, left);
  }

  // A pixel, of floats.
  void encode_row(int8_t* patch, int64_t group, int64_t n, int64_t row, int64_t column) const {
    const int64_t at = n * v_.x_batch + row * v_.x_at[0] + column * v_.x_at[1] + group * group_channels_;
    if (inside(row, column))
      encode<V>(a_.x + at * int64_t(element_size(a_.dtype)), a_.dtype, 1.0f / a_.x_scale, group_channels_, patch);
    else
      std::memset(patch, 0, size_t(group_channels_));
  }

  bool inside(int64_t row, int64_t column) const {
    return row >= 0 && row < v_.size[0] && column >= 0 && column < v_.size[1];
  }

  // In whole blocks where they may be read: what follows in a patch is written later.
  void copy(int8_t* to, const int8_t* from, int64_t count) const {
    for (; count > 0; count -= kBlock, from += kBlock, to += kBlock)
      std::memcpy(to, from, from + kBlock <= x_end_ ? kBlock : size_t(count < kBlock ? count : kBlock));
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
        copy(patch, from, run);
        continue;
      }
      for (int64_t j = 0; j < v_.kernel[1]; ++j) {
        const int64_t column = left + j * v_.dilation[1];
        if (column >= 0 && column < v_.size[1])
          copy(patch + j * group_channels_, from + j * v_.dilation[1] * v_.x_at[1], group_channels_);
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
  void copy_taps(int8_t* to, const int8_t* image, int64_t top, int64_t left, int64_t width, Seen& seen) const {
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
              put(block, from + k * kBlock, min64(kBlock, group_channels_ - k * kBlock), x_end_, seen);
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
          for (int i = 0; i < kBlock; ++i) sum += int8_t(uint8_t(codes[(b * width + r) * kBlock + i]) ^ uint8_t(V::Signed::kZero));
        sums[g * width + r] = float(sum);
      }
    }
  }

  const Conv& a_;
  const Weight& w_;
  const Window v_;
  const int64_t depth_, patch_;  // bytes of a row, and of one before it is cut
  const int8_t* x_ = nullptr;
  const int8_t* x_end_ = nullptr;
  int64_t group_channels_ = 0;
  bool by_row_ = false;     // rows of floats become codes where they are gathered
  bool pointwise_ = false;  // one value of x for each output, and no zeros around it
  bool in_turn_ = false;    // and one pixel after the other
  bool sums_ = false, even_ = false;  // groups of scales are whole blocks
  bool patches_ = false;    // the values under the kernel are put together before they are cut into blocks
};

}  // namespace
}  // namespace qcompile
