// Depthwise convolution: each channel has a kernel of its own, and 16 channels are a vector. The rows of x under the kernel lie
// in a ring of floats in the L1 cache, with the zeros around them: each value is loaded, converted and rounded once.
#pragma once

#include "depthwise_quads.h"
#include "turns.h"

namespace qcompile {
namespace {

constexpr int64_t kMostDepthwiseTaps = 512;

template <class V>
class DepthwiseRun {
  using F = typename V::F;

 public:
  explicit DepthwiseRun(const Depthwise& a)
      : a_(a), v_(a.window), taps_(a.window.taps()), plan_(a), turns_(plan_.units, plan_.slots), finish_(a) {
    size_ = a.x_codes ? 1 : int64_t(element_size(a.dtype));
  }

  void run() {
    a_.parallel(plan_.slots, 1, [](int64_t begin, int64_t end, void* self) {
      for (int64_t slot = begin; slot < end; ++slot) static_cast<DepthwiseRun*>(self)->compute(slot);
    }, this);
  }

 private:
  static constexpr int kColumns = V::kColumns;  // output columns computed together

  // What a thread works on: a tile of channels, and the ring that it reads them into.
  struct Work {
    float* ring;           // [extent][width][16]
    const float* weights;  // [tap][16]
    typename Finish<V>::Channels channels;
    bool nan;              // whether the ring may hold one
    int64_t tile, n, first, last;  // output columns
    int64_t left, begin, end;      // column of x where the ring begins; those that are in the image, from there
  };

  void compute(int64_t slot) {
    alignas(64) float weights[kMostDepthwiseTaps * kTile];
    Work work{};
    work.ring = reinterpret_cast<float*>(a_.scratch + size_t(slot) * plan_.slot_bytes);
    work.weights = weights;
    for (int64_t unit = turns_.take(slot); unit >= 0; unit = turns_.take(slot)) {
      const int64_t group = unit % plan_.groups, place = unit / plan_.groups;
      const int64_t segment = place % plan_.segments, rest = place / plan_.segments;
      const int64_t row = rest % plan_.bands * plan_.band;
      work.n = rest / plan_.bands;
      work.first = segment * plan_.segment;
      work.last = min64(work.first + plan_.segment, v_.out_size[1]);
      work.left = work.first * v_.stride[1] - v_.before[1];
      work.begin = min64(plan_.width, work.left < 0 ? -work.left : 0);
      work.end = min64(plan_.width, v_.size[1] - work.left);
      work.end = work.end < work.begin ? work.begin : work.end;
      for (int64_t i = 0; i < DepthwisePlan::kTogether && group * DepthwisePlan::kTogether + i < plan_.tiles; ++i) {
        work.tile = group * DepthwisePlan::kTogether + i;
        work.nan = !a_.x_codes;
        const F most = V::mul(decode(work.tile, weights), V::set1(127.0f));
        const int count = int(min64(kTile, v_.channels - work.tile * kTile));
        work.channels = finish_.channels(work.tile * kTile, count, V::set1(a_.x_scale > 0.0f ? a_.x_scale : 1.0f), most);
        rows(work, row, min64(row + plan_.band, v_.out_size[0]));
      }
    }
  }

  // Weights as floats: [tap][16]. Returns the sum of their magnitudes.
  F decode(int64_t tile, float* weights) const {
    F sum = V::set1(0.0f);
    const int64_t bytes = int64_t(element_size(a_.scale_dtype));
    for (int64_t tap = 0; tap < taps_; ++tap, weights += kTile) {
      const int64_t at = (tile * a_.groups + tap / a_.group_size) * kTile;
      const F u = V::load_u8(a_.codes + (tile * taps_ + tap) * kTile);
      const F scale = V::load16(static_cast<const char*>(a_.scale) + at * bytes, a_.scale_dtype);
      F value;
      if (a_.zero_kind == Zero::kShift) {
        value = V::add(V::mul(u, scale), V::load16(static_cast<const char*>(a_.zero) + at * bytes, a_.scale_dtype));
      } else {
        F zero = V::set1(a_.middle);
        if (a_.zero_kind == Zero::kCode) zero = V::load_u8(static_cast<const uint8_t*>(a_.zero) + at);
        value = V::mul(V::sub(u, zero), scale);
      }
      V::store(weights, value);
      sum = V::add(sum, V::abs(value));
    }
    return sum;
  }

  void rows(Work& work, int64_t begin, int64_t end) const {
    int64_t next = begin * v_.stride[0] - v_.before[0];  // the row of x that is read next
    for (int64_t row = begin; row < end; ++row) {
      const int64_t top = row * v_.stride[0] - v_.before[0];
      next = next < top ? top : next;
      for (; next < top + plan_.extent; ++next) read_row(work, next, slot_of(work, next));
      const int64_t position = (work.n * v_.out_size[0] + row) * v_.out_size[1];
      if (v_.kernel[0] == 3 && v_.kernel[1] == 3 && v_.dilation[0] == 1 && v_.dilation[1] == 1)
        columns<3>(work, top, position);
      else if (v_.kernel[0] == 5 && v_.kernel[1] == 5 && v_.dilation[0] == 1 && v_.dilation[1] == 1)
        columns<5>(work, top, position);
      else
        columns<0>(work, top, position);
    }
  }

  float* slot_of(const Work& work, int64_t row) const {
    return work.ring + (row + v_.before[0]) % plan_.extent * plan_.width * kTile;
  }

  void read_row(Work& work, int64_t row, float* to) const {
    const size_t column = size_t(kTile) * 4;
    if (row < 0 || row >= v_.size[0]) {
      std::memset(to, 0, size_t(plan_.width) * column);
      return;
    }
    std::memset(to, 0, size_t(work.begin) * column);
    std::memset(to + work.end * kTile, 0, size_t(plan_.width - work.end) * column);
    const char* from = a_.x + (work.n * v_.x_batch + row * v_.x_at[0] + (work.left + work.begin) * v_.x_at[1] +
                               work.tile * kTile) * size_;
    const int64_t step = v_.x_at[1] * size_, count = work.end - work.begin;
    to += work.begin * kTile;
    const int channels = work.channels.count;
    if (a_.x_codes && channels == kTile && read_codes(reinterpret_cast<const int8_t*>(from), step, count, to)) return;
    work.nan = true;
    if (a_.x_codes)
      each(to, from, step, count, [&](const char* p) { return load_codes<V>(reinterpret_cast<const int8_t*>(p), channels); });
    else if (a_.x_scale > 0.0f)
      each(to, from, step, count, [&](const char* p) { return rounded(load_some<V>(p, a_.dtype, channels)); });
    else
      each(to, from, step, count, [&](const char* p) { return load_some<V>(p, a_.dtype, channels); });
  }

  // False where one of them is NaN.
  static bool read_codes(const int8_t* from, int64_t step, int64_t count, float* to) {
    F lowest = V::set1(0.0f);
    for (int64_t i = 0; i < count; ++i, from += step, to += kTile) {
      const F x = V::load_i8(from);
      lowest = V::min(lowest, x);
      V::store(to, x);
    }
    return V::largest(V::sub(V::set1(0.0f), lowest)) < -float(kNan);
  }

  template <class Load>
  static void each(float* to, const char* from, int64_t step, int64_t count, Load load) {
    for (int64_t i = 0; i < count; ++i, from += step, to += kTile) V::store(to, load(from));
  }

  F rounded(F x) const {
    const F steps = V::min(V::set1(127.0f), V::mul(x, V::set1(1.0f / a_.x_scale)));
    return V::round(V::max(V::set1(-127.0f), steps));
  }

  // The outputs of a row. kSize: of a square kernel without gaps, or 0.
  template <int kSize>
  void columns(const Work& work, int64_t top, int64_t position) const {
    alignas(64) float sums[DepthwisePlan::kSegment * kTile];
    const int64_t count = work.last - work.first;
    int64_t column = 0;
    for (; column + kColumns <= count; column += kColumns) some<kSize, kColumns>(work, top, column, sums);
    if (column < count && count > kColumns) {  // some of them once more
      some<kSize, kColumns>(work, top, count - kColumns, sums);
      column = count;
    }
    for (; column < count; ++column) some<kSize, 1>(work, top, column, sums);
    finish_.store(work.channels, position + work.first, count, sums, kTile, work.nan);
  }

  template <int kSize, int kCount>
  void some(const Work& work, int64_t top, int64_t column, float* sums) const {
    const int64_t step = v_.stride[1] * kTile, rows = kSize > 0 ? kSize : v_.kernel[0];
    const float* w = work.weights;
    F sum[kCount];
    for (int k = 0; k < kCount; ++k) sum[k] = V::set1(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const float* x = slot_of(work, top + i * (kSize > 0 ? 1 : v_.dilation[0])) + column * step;
      const auto tap = [&](const float* at) __attribute__((always_inline)) {
        const F weight = V::load(w);
#pragma GCC unroll 8
        for (int k = 0; k < kCount; ++k) sum[k] = V::fma(V::load(at + k * step), weight, sum[k]);
        w += kTile;
      };
      if constexpr (kSize > 0) {
#pragma GCC unroll 8
        for (int j = 0; j < kSize; ++j) tap(x + j * kTile);
      } else {
        for (int64_t j = 0; j < v_.kernel[1]; ++j) tap(x + j * v_.dilation[1] * kTile);
      }
    }
    for (int k = 0; k < kCount; ++k) V::store(sums + (column + k) * kTile, sum[k]);
  }

  const Depthwise& a_;
  const Window& v_;
  const int64_t taps_;
  const DepthwisePlan plan_;
  Turns turns_;
  const Finish<V> finish_;
  int64_t size_ = 0;  // of an element of x, in bytes
};

template <class V>
void depthwise(const Depthwise& a) {
  if constexpr (V::kQuads)
    if (DepthwiseQuads<V>::takes(a) && DepthwiseQuads<V>(a).run()) return;
  DepthwiseRun<V>(a).run();
}

}  // namespace
}  // namespace qcompile
