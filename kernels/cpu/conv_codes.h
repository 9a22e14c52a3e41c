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
      : a_(a), w_(a.w), plan_(a), v_(plan_.image ? together(a.window) : a.window), finish_(a) {
    by_row_ = !a.x_codes && !plan_.image;
    x_ = reinterpret_cast<const int8_t*>(plan_.image ? a.scratch : a.x);
    x_end_ = x_ + (v_.batch - 1) * v_.x_batch + (v_.size[0] - 1) * v_.x_at[0] + (v_.size[1] - 1) * v_.x_at[1] + v_.channels;
    group_channels_ = v_.channels / a.groups;
    group_rows_ = v_.out_channels / a.groups;
    pointwise_ = v_.taps() == 1 && v_.before[0] == 0 && v_.before[1] == 0 &&
                 (v_.out_size[0] - 1) * v_.stride[0] < v_.size[0] && (v_.out_size[1] - 1) * v_.stride[1] < v_.size[1];
    patches_ = by_row_ || (!pointwise_ && a.order != Order::kChannels);
    grouped_ = w_.groups > 1 || w_.zero_kind != Zero::kMiddle;
    sums_ = w_.zero_kind != Zero::kMiddle;
    even_ = w_.groups == 1 || w_.group_size % kBlock == 0;
    const int64_t last = w_.cols - (w_.groups - 1) * w_.group_size;
    chunks_ = a.order == Order::kChannels ? 8 : chunks(w_.group_size);
    last_chunks_ = a.order == Order::kChannels ? 8 : chunks(last);
  }

  void run() {
    if (v_.positions() == 0) return;
    if (plan_.image) EncodeImage<V>(a_, reinterpret_cast<int8_t*>(a_.scratch)).run();
    a_.parallel(plan_.slots, 1, [](int64_t begin, int64_t end, void* self) {
      for (int64_t slot = begin; slot < end; ++slot) static_cast<ConvCodes*>(self)->compute(slot);
    }, this);
  }

 private:
  static_assert(V::kSignedTiles <= kMostTiles, "the plan has room for as many");
  static constexpr int kTogether = 32;  // rows that are finished together

  using Bytes = uint8_t __attribute__((vector_size(kBlock)));
  // as many bytes of ones, then of zeros
  alignas(64) static constexpr uint64_t kOnes[2 * kBlock / 8] = {~uint64_t(0), ~uint64_t(0), ~uint64_t(0), ~uint64_t(0)};

  struct Panels {
    int8_t* codes;  // [panel][block][row][32]
    float* sums;    // [panel][group][row], where there are zero points
    Slab slab;
    bool* nan;      // [panel]: whether there is one
    int8_t* patch;  // the rows of a panel before they are cut into blocks
  };

  static int chunks(int64_t columns) { return int((columns - (columns - 1) / kBlock * kBlock + 3) / 4); }

  Panels panels(int64_t slot) const {
    char* p = a_.scratch + plan_.slot + size_t(slot) * plan_.slot_bytes;
    return {reinterpret_cast<int8_t*>(p),
            reinterpret_cast<float*>(p + plan_.slot_sums),
            {reinterpret_cast<uint8_t*>(p + plan_.slot_slab), reinterpret_cast<float*>(p + plan_.slot_scale),
             reinterpret_cast<int32_t*>(p + plan_.slot_start), w_.blocks, w_.groups, w_.blocks_per_group, chunks_, last_chunks_},
            reinterpret_cast<bool*>(p + plan_.slot_nan),
            reinterpret_cast<int8_t*>(p + plan_.slot_patch)};
  }

  void compute(int64_t slot) {
    const Panels p = panels(slot);
    const int64_t begin = plan_.pieces * slot / plan_.slots, end = plan_.pieces * (slot + 1) / plan_.slots;
    int64_t held = -1;
    for (int64_t i = begin; i < end; ++i) {
      const ConvShares::Piece piece = plan_.piece(i);
      if (held != piece.block) gather(p, piece.group, piece.m0, piece.rows);
      held = piece.block;
      for (int64_t tile = piece.from; tile < piece.to;) {
        if (tile + V::kSignedTiles <= piece.to) {
          multiply<V::kSignedTiles>(p, piece.group, tile, piece.m0, piece.rows);
          tile += V::kSignedTiles;
        } else {
          multiply<1>(p, piece.group, tile++, piece.m0, piece.rows);
        }
      }
    }
  }

  void gather(const Panels& p, int64_t group, int64_t m0, int rows) const {
    Position at = position_of(m0);
    for (int64_t r0 = 0; r0 < rows; r0 += V::kRows) {
      const int64_t width = panel_width<V>(rows - r0), used = min64(width, rows - r0);
      int8_t* codes = p.codes + r0 * plan_.depth;
      Bytes nan{};
      for (int64_t r = 0; r < used; ++r, at = after(at))
        nan |= gather_row(p.patch + r * plan_.patch, codes + r * kBlock, group, at, width);
      for (int64_t r = 0; patches_ && r < used; ++r)
        nan |= cut(codes + r * kBlock, p.patch + r * plan_.patch, p.patch + (r + 1) * plan_.patch, width);
      p.nan[r0 / V::kRows] = any(nan);
      if (sums_) sum_up(codes, p.sums + r0 * w_.groups, width);
    }
  }

  static Bytes load(const void* from) {
    Bytes r;
    std::memcpy(&r, from, kBlock);
    return r;
  }
  static void store(int8_t* to, Bytes codes, Bytes& nan) {
    nan |= Bytes(codes == uint8_t(kNan));
    codes ^= uint8_t(V::Signed::kZero);
    std::memcpy(to, &codes, kBlock);
  }
  static bool any(const Bytes& nan) {
    uint64_t eights[kBlock / 8];
    std::memcpy(eights, &nan, kBlock);
    return (eights[0] | eights[1] | eights[2] | eights[3]) != 0;
  }

  // A block of 32 codes, of which `count` are the row's and the rest 0. `end`: of what may be read.
  static void put(int8_t* to, const int8_t* from, int64_t count, const int8_t* end, Bytes& nan) {
    if (count == kBlock) return store(to, load(from), nan);
    if (from + kBlock <= end) return store(to, load(from) & load(reinterpret_cast<const char*>(kOnes) + kBlock - count), nan);
    int8_t some[kBlock] = {};
    std::memcpy(some, from, size_t(count));
    store(to, load(some), nan);
  }

  // A row in the order of the weight's columns, cut into blocks of its groups of scales. Returns what is NaN.
  Bytes cut(int8_t* to, const int8_t* row, const int8_t* end, int64_t width) const {
    Bytes nan{};
    if (!even_) {
      for_each_block(w_, [&](int64_t, int64_t b, int64_t column, int valid) {
        put(to + b * width * kBlock, row + column, valid, end, nan);
      });
      return nan;
    }
    const int64_t step = width * kBlock;
    int64_t left = w_.cols;
    for (; left >= kBlock; left -= kBlock, row += kBlock, to += step) store(to, load(row), nan);
    if (left > 0) put(to, row, left, end, nan);
    return nan;
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
  Bytes gather_row(int8_t* patch, int8_t* to, int64_t group, Position at, int64_t width) const {
    const int64_t top = at.row * v_.stride[0] - v_.before[0], left = at.column * v_.stride[1] - v_.before[1];
    if (by_row_) return encode_row(patch, group, at.n, top, left);
    const int8_t* image = x_ + at.n * v_.x_batch + group * group_channels_;
    if (pointwise_) return cut(to, image + top * v_.x_at[0] + left * v_.x_at[1], x_end_, width);
    if (a_.order == Order::kChannels) return copy_taps(to, image, top, left, width);
    a_.order == Order::kPatch ? read_patch(patch, image, top, left) : read_rows(patch, image, top, left);
    return Bytes{};
  }

  // A pixel, of floats.
  Bytes encode_row(int8_t* patch, int64_t group, int64_t n, int64_t row, int64_t column) const {
    const int64_t at = n * v_.x_batch + row * v_.x_at[0] + column * v_.x_at[1] + group * group_channels_;
    if (inside(row, column))
      encode<V>(a_.x + at * int64_t(element_size(a_.dtype)), a_.dtype, 1.0f / a_.x_scale, group_channels_, patch);
    else
      std::memset(patch, 0, size_t(group_channels_));
    return Bytes{};
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
  Bytes copy_taps(int8_t* to, const int8_t* image, int64_t top, int64_t left, int64_t width) const {
    Bytes nan{};
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
              put(block, from + k * kBlock, min64(kBlock, group_channels_ - k * kBlock), x_end_, nan);
          }
        }
      }
      first += count;
    }
    return nan;
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

  template <int kTiles>
  void multiply(const Panels& p, int64_t group, int64_t group_tile, int64_t m0, int rows) const {
    const int64_t tile = group * plan_.group_tiles + group_tile;
    typename Finish<V>::Channels channels[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      fill_tile<V>(w_, tile + t, p.slab, t);
      F scale = V::set1(a_.x_scale);
      if (!grouped_) scale = V::mul(scale, V::load(p.slab.scale + t * kTile));
      const int64_t n0 = (group_tile + t) * kTile;
      const F most = V::set1(grouped_ ? std::numeric_limits<float>::infinity() : float(w_.cols) * 127.0f * 128.0f);
      channels[t] = finish_.channels(group * group_rows_ + n0, int(min64(kTile, group_rows_ - n0)), scale, most);
    }
    alignas(64) float totals[kTogether * kTiles * kTile];
    for (int first = 0; first < rows; first += kTogether) {
      const int count = rows - first < kTogether ? rows - first : kTogether;
      bool nan = false;
      for (int m = 0; m < count; m += V::kRows) {
        const int8_t* codes = p.codes + (first + m) * plan_.depth;
        float* to = totals + m * kTiles * kTile;
        grouped_ ? panel<kTiles, V::kRows, true>(p.slab, codes, count - m, to)
                 : panel<kTiles, V::kRows, false>(p.slab, codes, count - m, to);
        if (sums_) take_off<kTiles>(p.sums + (first + m) * w_.groups, tile, count - m, to);
        if (!p.nan[(first + m) / V::kRows]) continue;
        find_nan<kTiles>(codes, count - m, to);
        nan = true;
      }
      for (int t = 0; t < kTiles; ++t) finish_.store(channels[t], m0 + first, count, totals + t * kTile, kTiles * kTile, nan);
    }
  }

  // panel_width() as a template argument.
  template <int kTiles, int kRows, bool kGrouped>
  static void panel(const Slab& slab, const int8_t* codes, int rows, float* totals) {
    if constexpr (kRows > 1)
      if (rows <= kRows / 2) return panel<kTiles, kRows / 2, kGrouped>(slab, codes, rows, totals);
    times_codes<V, kRows, kTiles, kGrouped>(slab, codes, totals);
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
  const Window v_;
  const Finish<V> finish_;
  const int8_t* x_ = nullptr;
  const int8_t* x_end_ = nullptr;
  int64_t group_channels_ = 0, group_rows_ = 0;
  bool by_row_ = false;     // rows of floats become codes where they are gathered
  bool pointwise_ = false;  // one value of x for each output, and no zeros around it
  bool grouped_ = false, sums_ = false;
  bool even_ = false;     // groups of scales are whole blocks
  bool patches_ = false;  // the values under the kernel are put together before they are cut into blocks
  int chunks_ = 8, last_chunks_ = 8;
};

template <class V>
void conv_codes(const Conv& a) {
  ConvCodes<V>(a).run();
}

}  // namespace
}  // namespace qcompile
