// Depthwise convolution: each channel has a kernel of its own. Little is computed for what is read, so activations stay
// floats; 16 channels are a vector, and a few output columns share each weight.
#pragma once

#include "activations.h"
#include "conv_args.h"
#include "lanes.h"
#include "tile.h"

namespace qcompile {
namespace {

constexpr int kTapFloats = 8192;  // decoded weights of the channels that are computed together

template <class V, bool kFloat>
class DepthwiseRun {
  using F = typename V::F;

 public:
  explicit DepthwiseRun(const Depthwise& a) : a_(a), v_(a.window), taps_(a.window.taps()) {
    tiles_ = (v_.channels + kTile - 1) / kTile;
    // Two vectors are a pair of cache lines; the rows under the kernel, so narrow, stay in the L1 cache from row to row.
    chunk_ = min64(2, kTapFloats / (taps_ * kTile));
    chunks_ = (tiles_ + chunk_ - 1) / chunk_;
  }

  void run() {
    const int64_t row_work = v_.out_size[1] * chunk_ * kTile * taps_;
    a_.parallel(chunks_ * v_.batch * v_.out_size[0], 1 + 100000 / (row_work + 1), [](int64_t begin, int64_t end, void* self) {
      static_cast<DepthwiseRun*>(self)->compute(begin, end);
    }, this);
  }

 private:
  // constants of the float32 instance
  DType type() const { return kFloat ? DType::kFloat32 : a_.dtype; }
  int64_t size() const { return kFloat ? 4 : 2; }

  static constexpr int kColumns = 4;  // output columns computed together

  void compute(int64_t begin, int64_t end) {
    alignas(64) float weights[kTapFloats];
    int64_t held = -1;
    const int64_t rows = v_.batch * v_.out_size[0];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / rows, row = i % rows;
      if (chunk != held) decode(chunk, weights);
      held = chunk;
      out_row(chunk, row / v_.out_size[0], row % v_.out_size[0], weights);
    }
  }

  int64_t chunk_tiles(int64_t chunk) const { return min64(chunk_, tiles_ - chunk * chunk_); }

  // Weights as floats: [tile][tap][16].
  void decode(int64_t chunk, float* weights) const {
    const int64_t bytes = int64_t(element_size(a_.scale_dtype));
    for (int64_t t = 0; t < chunk_tiles(chunk); ++t) {
      const int64_t tile = chunk * chunk_ + t;
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
      }
    }
  }

  // Kernel positions [begin, end) that lie inside the image when the first lies at `from`.
  void inside(int axis, int64_t from, int64_t& begin, int64_t& end) const {
    const int64_t step = v_.dilation[axis];
    begin = from < 0 ? (-from + step - 1) / step : 0;
    end = v_.size[axis] - from;
    end = end <= 0 ? 0 : (end + step - 1) / step;
    end = min64(end, v_.kernel[axis]);
    begin = min64(begin, end);
  }

  void out_row(int64_t chunk, int64_t n, int64_t row, const float* weights) const {
    const int64_t top = row * v_.stride[0] - v_.before[0], last = (v_.kernel[1] - 1) * v_.dilation[1];
    int64_t i0, i1;
    inside(0, top, i0, i1);
    for (int64_t column = 0; column < v_.out_size[1];) {
      const int64_t left = column * v_.stride[1] - v_.before[1];
      const bool plain = left >= 0 && column + kColumns <= v_.out_size[1] &&
                         left + (kColumns - 1) * v_.stride[1] + last < v_.size[1];
      if (plain) {
        positions<kColumns>(chunk, n, row, column, top, left, i0, i1, 0, v_.kernel[1], weights);
        column += kColumns;
      } else {
        int64_t j0, j1;
        inside(1, left, j0, j1);
        positions<1>(chunk, n, row, column, top, left, i0, i1, j0, j1, weights);
        column += 1;
      }
    }
  }

  // kCount outputs from `column` on, all channels of a chunk; taps [i0, i1) x [j0, j1).
  template <int kCount>
  void positions(int64_t chunk, int64_t n, int64_t row, int64_t column, int64_t top, int64_t left, int64_t i0, int64_t i1,
                 int64_t j0, int64_t j1, const float* weights) const {
    const int64_t first = chunk * chunk_ * kTile;
    const int64_t step = v_.stride[1] * v_.x_at[1] * size(), tap_step = v_.dilation[1] * v_.x_at[1] * size();
    const int64_t at = ((n * v_.out_size[0] + row) * v_.out_size[1] + column) * v_.channels + first;
    const char* image = a_.x + (n * v_.x_batch + left * v_.x_at[1] + first) * size();
    for (int64_t t = 0; t < chunk_tiles(chunk); ++t) {
      const int64_t c = t * kTile;
      const int count = int(min64(kTile, v_.channels - first - c));
      F sum[kCount];
      F bias = V::set1(0.0f);
      if (a_.bias != nullptr)
        bias = load_some<V>(a_.bias + (first + c) * int64_t(element_size(a_.bias_dtype)), a_.bias_dtype, count);
      for (int k = 0; k < kCount; ++k) sum[k] = bias;
      for (int64_t i = i0; i < i1; ++i) {
        const char* x = image + ((top + i * v_.dilation[0]) * v_.x_at[0] + c) * size() + j0 * tap_step;
        const float* w = weights + (t * taps_ + i * v_.kernel[1] + j0) * kTile;
        if (count == kTile) {
          for (int64_t j = j0; j < j1; ++j, x += tap_step, w += kTile) {
            const F weight = V::load(w);
#pragma GCC unroll 8
            for (int k = 0; k < kCount; ++k) sum[k] = V::fma(V::load16(x + k * step, type()), weight, sum[k]);
          }
        } else {
          for (int64_t j = j0; j < j1; ++j, x += tap_step, w += kTile)
            for (int k = 0; k < kCount; ++k) sum[k] = V::fma(load_some<V>(x + k * step, type(), count), V::load(w), sum[k]);
        }
      }
      for (int k = 0; k < kCount; ++k) {
        const int64_t to = (at + k * v_.channels + c) * size();
        F y = Act<V>::apply(a_.activation, sum[k]);
        if (a_.add != nullptr) y = Act<V>::apply(a_.after, V::add(y, load_some<V>(a_.add + to, type(), count)));
        store_some<V>(a_.out + to, type(), y, count);
      }
    }
  }

  const Depthwise& a_;
  const Window& v_;
  const int64_t taps_;
  int64_t tiles_ = 0, chunk_ = 0, chunks_ = 0;
};

template <class V>
void depthwise(const Depthwise& a) {
  if (a.dtype == DType::kFloat32) return DepthwiseRun<V, true>(a).run();
  DepthwiseRun<V, false>(a).run();
}

}  // namespace
}  // namespace qcompile
