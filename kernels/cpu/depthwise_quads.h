// Depthwise convolution from int8 codes to int8 codes by products of four bytes. 64 channels are a line of the cache; the bytes of
// four rows of x stand side by side, so that a product is four taps of a column of the kernel. A band of output rows is as many as
// read the same rows: the weights, not x, are moved by a row for each. What this cannot do is left to floats (depthwise.h).
#pragma once

#include "finish.h"
#include "turns.h"

namespace qcompile {
namespace {

template <class V>
class DepthwiseQuads {
  using F = typename V::F;
  using Int = typename V::Int;
  using Cell = typename V::Cell;

 public:
  static bool takes(const Depthwise& a) {
    const Window& v = a.window;
    const bool square = v.kernel[0] == v.kernel[1] && (v.kernel[0] == 3 || v.kernel[0] == 5);
    const bool dense = v.dilation[0] == 1 && v.dilation[1] == 1 && v.stride[0] == v.stride[1] && v.stride[0] <= 2;
    return square && dense && a.x_codes && Finish<V>(a).direct_codes() && a.zero_kind == Zero::kMiddle && a.groups == 1;
  }

  explicit DepthwiseQuads(const Depthwise& a) : a_(a), v_(a.window), finish_(a) {
    size_ = int(v_.kernel[0]);
    stride_ = v_.stride[0];
    quads_ = (size_ + 3) / 4;
    band_ = (4 * quads_ - size_) / stride_ + 1;
    bands_ = (v_.out_size[0] + band_ - 1) / band_;
    const int64_t most = (kRing / (quads_ * kLine) - size_) / stride_ + 1;
    segments_ = (v_.out_size[1] + most - 1) / most;
    segment_ = (v_.out_size[1] + segments_ - 1) / segments_;
    width_ = (segment_ - 1) * stride_ + size_;
    groups_ = (v_.channels + kChannels - 1) / kChannels;
    // Weights are made ready for each run of bands; threads whose runs are rows of their own read what they wrote before.
    const int64_t others = groups_ * v_.batch * segments_, runs = (4 * a.threads + others - 1) / others;
    run_ = (bands_ + runs - 1) / runs;
    runs_ = (bands_ + run_ - 1) / run_;
    units_ = v_.batch * runs_ * segments_ * groups_;
  }

  // False where floats have to do it: there is a NaN, or a sum beyond 32 bits.
  bool run() {
    struct Shared {
      DepthwiseQuads* run;
      Turns turns;
    };
    const int64_t slots = min64(units_, a_.threads);
    Shared shared = {this, Turns(units_, slots)};
    a_.parallel(slots, 1, [](int64_t begin, int64_t end, void* self) {
      auto* shared = static_cast<Shared*>(self);
      for (int64_t slot = begin; slot < end; ++slot) shared->run->compute(shared->turns, slot);
    }, &shared);
    return !refused_.load();
  }

 private:
  static constexpr int64_t kChannels = 64, kParts = 4;       // a part is 16 lanes, of channels 4p .. 4p+3 of each 16
  static constexpr int64_t kLine = kParts * 64;              // bytes of the quads of a column
  static constexpr int64_t kRing = 32 << 10;
  static constexpr int kMostSize = 5, kMostBand = 4, kMostQuads = 2, kMostColumns = 14;

  struct Work {
    alignas(64) uint8_t ring[kRing];                                               // [quad][column][part]
    alignas(64) int8_t weights[kMostBand * kParts * kMostQuads * kMostSize * 64];  // [row of a band][part][quad][tap]
    alignas(64) int32_t start[kParts * 16];
    alignas(64) int32_t sums[kMostColumns * kParts * 16];
    F scale[kParts], bias[kParts];
    int64_t group = -1;
    int count;  // channels
  };

  void compute(Turns& turns, int64_t slot) {
    Work w;
    for (int64_t unit = turns.take(slot); unit >= 0 && !refused_.load(std::memory_order_relaxed); unit = turns.take(slot)) {
      const int64_t group = unit % groups_, segment = unit / groups_ % segments_, rest = unit / groups_ / segments_;
      if (w.group != group && !prepare(w, group)) return refused_.store(true);
      const int64_t first_band = rest % runs_ * run_, last_band = min64(first_band + run_, bands_);
      for (int64_t band = first_band; band < last_band; ++band)
        if (!compute(w, rest / runs_, band * band_, segment * segment_)) return refused_.store(true);
    }
  }

  // A segment of a band of image n; false where one of its values is NaN.
  bool compute(Work& w, int64_t n, int64_t row, int64_t first) const {
    const int rows = int(min64(band_, v_.out_size[0] - row));
    if (!read(w, n, row, rows, first)) return false;
    const int64_t count = min64(segment_, v_.out_size[1] - first);
    for (int i = 0; i < rows; ++i) {
      const int64_t position = (n * v_.out_size[0] + row + i) * v_.out_size[1] + first;
      if (size_ == 3)
        stride_ == 1 ? columns<3, 1>(w, i, position, count) : columns<3, 2>(w, i, position, count);
      else
        stride_ == 1 ? columns<5, 1>(w, i, position, count) : columns<5, 2>(w, i, position, count);
    }
    return true;
  }

  // The weights of 64 channels, for each row of a band moved down to where it begins.
  bool prepare(Work& w, int64_t group) const {
    const int taps = size_ * size_;
    w.group = group;
    w.count = int(min64(kChannels, v_.channels - group * kChannels));
    alignas(64) uint8_t codes[(kMostSize * kMostSize + 1) * kChannels];
    std::memset(codes, int(a_.middle), sizeof codes);
    alignas(64) float scale[kChannels] = {}, bias[kChannels] = {};
    const F most = V::set1(float(taps * 127 * 128));
    bool bounded = true;
    for (int64_t c = 0; c < w.count; c += kTile) {
      const int64_t tile = (group * kChannels + c) / kTile;
      for (int tap = 0; tap < taps; ++tap) std::memcpy(codes + tap * kChannels + c, a_.codes + (tile * taps + tap) * kTile, kTile);
      const char* at = static_cast<const char*>(a_.scale) + tile * kTile * int64_t(element_size(a_.scale_dtype));
      const F own = V::mul(V::set1(a_.x_scale), V::load16(at, a_.scale_dtype));
      const auto some = finish_.channels(tile * kTile, int(min64(kTile, w.count - c)), own, most);
      bounded = bounded && some.bounded;
      V::store(scale + c, some.scale);
      V::store(bias + c, some.bias);
    }
    Int sum[kParts];
    for (Int& s : sum) s = V::no_int();
    const Cell middle = V::fill_bytes(uint8_t(a_.middle));
    const auto tap_at = [&](int row, int column) {
      return V::sub_bytes(V::load_cell(codes + (row < size_ ? row * size_ + column : taps) * kChannels), middle);
    };
    for (int j = 0; j < size_; ++j) {
      Cell quads[kMostQuads][kParts];
      for (int q = 0; q < quads_; ++q) {
        V::interleave(tap_at(4 * q, j), tap_at(4 * q + 1, j), tap_at(4 * q + 2, j), tap_at(4 * q + 3, j), quads[q]);
        for (int p = 0; p < kParts; ++p) sum[p] = V::dot(sum[p], V::fill_bytes(128), quads[q][p]);
      }
      for (int i = 0; i < band_; ++i)
        for (int p = 0; p < kParts; ++p) {
          for (int q = 0; q < quads_; ++q)
            V::store_cell(reinterpret_cast<uint8_t*>(w.weights) + (((i * kParts + p) * quads_ + q) * size_ + j) * 64, quads[q][p]);
          for (int k = 0; k < stride_; ++k)  // one row further down
            for (int q = quads_ - 1; q >= 0; --q)
              quads[q][p] = q > 0 ? V::shift_in(quads[q][p], quads[q - 1][p]) : V::shift_in(quads[0][p], V::fill_bytes(0));
        }
    }
    for (int p = 0; p < kParts; ++p) {
      V::store_int(w.start + p * 16, V::negative(sum[p]));
      w.scale[p] = V::load_fours(scale + 4 * p);
      w.bias[p] = V::load_fours(bias + 4 * p);
    }
    return bounded;
  }

  // The rows of x that a band reads, 128 more than they are, by fours; false where one of them is NaN.
  bool read(Work& w, int64_t n, int64_t row, int rows, int64_t first) const {
    static const int8_t zeros[kChannels] = {};
    const int64_t top = row * stride_ - v_.before[0], left = first * stride_ - v_.before[1], used = (rows - 1) * stride_ + size_;
    const int64_t begin = min64(width_, left < 0 ? -left : 0);
    int64_t end = min64(width_, v_.size[1] - left);
    end = end < begin ? begin : end;
    const char* image = a_.x + n * v_.x_batch + w.group * kChannels;
    const Cell flip = V::fill_bytes(128);
    Cell lowest = V::fill_bytes(0);
    for (int q = 0; q < quads_; ++q) {
      const int8_t* from[4];
      int64_t step[4];
      for (int t = 0; t < 4; ++t) {
        const int64_t y = top + 4 * q + t;
        const bool there = 4 * q + t < used && y >= 0 && y < v_.size[0];
        from[t] = there ? reinterpret_cast<const int8_t*>(image) + y * v_.x_at[0] + (left + begin) * v_.x_at[1] : zeros;
        step[t] = there ? v_.x_at[1] : 0;
      }
      uint8_t* to = w.ring + q * width_ * kLine;
      const auto outside = [&](int64_t count) {
        for (int64_t i = 0; i < count * kParts; ++i, to += 64) V::store_cell(to, flip);
      };
      const auto inside = [&](auto load) __attribute__((always_inline)) {
        for (int64_t c = begin; c < end; ++c, to += kLine) {
          Cell x[4], quads[kParts];
          for (int t = 0; t < 4; ++t) {
            const Cell codes = load(from[t]);
            lowest = V::min_signed(lowest, codes);
            x[t] = V::add_bytes(codes, flip);
            from[t] += step[t];
          }
          V::interleave(x[0], x[1], x[2], x[3], quads);
          for (int p = 0; p < kParts; ++p) V::store_cell(to + p * 64, quads[p]);
        }
      };
      outside(begin);
      if (w.count == kChannels)
        inside([](const int8_t* p) { return V::load_cell(reinterpret_cast<const uint8_t*>(p)); });
      else
        inside([&](const int8_t* p) { return V::load_bytes(p, w.count); });
      outside(width_ - end);
    }
    return !V::has_byte(lowest, uint8_t(kNan));
  }

  // A row of a band.
  template <int kSize, int kStride>
  void columns(Work& w, int i, int64_t position, int64_t count) const {
    int64_t column = 0;
    for (; column + kMostColumns <= count; column += kMostColumns) some<kSize, kStride, kMostColumns>(w, i, position, column);
    for (; column + 7 <= count; column += 7) some<kSize, kStride, 7>(w, i, position, column);
    if (column < count && count > 7) {  // some of them once more
      some<kSize, kStride, 7>(w, i, position, count - 7);
      column = count;
    }
    for (; column < count; ++column) some<kSize, kStride, 1>(w, i, position, column);
  }

  template <int kSize, int kStride, int kCount>
  __attribute__((noinline)) void some(Work& w, int i, int64_t position, int64_t column) const {
    constexpr int kQuads = (kSize + 3) / 4;
    for (int p = 0; p < kParts; ++p) {
      const int8_t* weights = w.weights + (i * kParts + p) * kQuads * kSize * 64;
      const uint8_t* x = w.ring + column * kStride * kLine + p * 64;
      const Int start = V::load_int(w.start + p * 16);
      Int sum[kCount];
      for (int k = 0; k < kCount; ++k) sum[k] = start;
#pragma GCC unroll 2
      for (int q = 0; q < kQuads; ++q, x += width_ * kLine) {
#pragma GCC unroll 8
        for (int j = 0; j < kSize; ++j, weights += 64) {
          const Cell weight = V::load_cell(reinterpret_cast<const uint8_t*>(weights));
#pragma GCC unroll 16
          for (int k = 0; k < kCount; ++k) sum[k] = V::dot(sum[k], V::load_cell(x + (k * kStride + j) * kLine), weight);
        }
      }
      for (int k = 0; k < kCount; ++k) V::store_int(w.sums + (k * kParts + p) * 16, sum[k]);
    }
    finish_.store_quads(w.scale, w.bias, w.group * kChannels, w.count, position + column, kCount, w.sums);
  }

  const Depthwise& a_;
  const Window& v_;
  const Finish<V> finish_;
  int size_;
  int64_t stride_, quads_, band_, bands_, run_, runs_, segment_, segments_, groups_, width_, units_;
  std::atomic<bool> refused_{false};
};

}  // namespace
}  // namespace qcompile
