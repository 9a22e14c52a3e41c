// What becomes of the sums of a convolution: scale, bias, activation, residual, activation, and floats or int8 codes.
#pragma once

#include <limits>

#include "activations.h"
#include "conv_args.h"
#include "lanes.h"

namespace qcompile {
namespace {

// `count` (1 to 16) codes as floats, the rest anything.
template <class V>
inline typename V::F load_codes(const int8_t* p, int count) {
  if (count == kTile) return V::load_i8(p);
  int8_t some[kTile] = {};
  std::memcpy(some, p, size_t(count));
  return V::load_i8(some);
}

// The first `count` of 16 values within +-127, rounded to codes. NaN becomes -128, which is no code otherwise.
template <class V>
inline void store_codes(int8_t* p, typename V::F value, int count) {
  if (count == kTile) return V::store_i8(p, value);
  int8_t some[kTile];
  V::store_i8(some, value);
  std::memcpy(p, some, size_t(count));
}

template <class V>
class Finish {
  using F = typename V::F;

 public:
  // 16 channels: `count` of them from `first` on.
  struct Channels {
    F scale, bias;
    int64_t first;
    int count;
  };

  explicit Finish(const Image& a) : a_(a) {
    float low = -std::numeric_limits<float>::infinity(), high = -low;
    if (a.activation == Activation::kRelu || a.activation == Activation::kRelu6) low = 0.0f;
    if (a.activation == Activation::kRelu6) high = 6.0f;
    clamps_ = a.add == nullptr && (a.activation == Activation::kNone || low == 0.0f);
    factor_ = a.out_scale > 0.0f ? 1.0f / a.out_scale : 1.0f;
    if (a.out_scale > 0.0f) {
      low = low * factor_ > -127.0f ? low * factor_ : -127.0f;
      high = high * factor_ < 127.0f ? high * factor_ : 127.0f;
    }
    low_ = V::set1(clamps_ ? low : -127.0f);
    high_ = V::set1(clamps_ ? high : 127.0f);
  }

  // `scale`: of the sums.
  Channels channels(int64_t first, int count, F scale) const {
    F bias = V::set1(0.0f);
    if (a_.bias != nullptr) bias = load_some<V>(a_.bias + first * int64_t(element_size(a_.bias_dtype)), a_.bias_dtype, count);
    const F factor = V::set1(clamps_ ? factor_ : 1.0f);
    return {V::mul(scale, factor), V::mul(bias, factor), first, count};
  }

  void store(const Channels& c, int64_t position, F sum) const {
    const int64_t at = position * a_.window.out_channels + c.first;
    F y = V::fma(sum, c.scale, c.bias);
    if (!clamps_) {
      y = Act<V>::apply(a_.activation, y);
      if (a_.add != nullptr) {
        const char* add = a_.add + at * int64_t(element_size(a_.dtype));
        y = Act<V>::apply(a_.after, V::add(y, load_some<V>(add, a_.dtype, c.count)));
      }
      if (a_.out_scale > 0.0f) y = V::mul(y, V::set1(factor_));
    }
    if (clamps_ || a_.out_scale > 0.0f) y = V::max(low_, V::min(high_, y));  // in this order NaN stays NaN
    if (a_.out_scale > 0.0f)
      store_codes<V>(reinterpret_cast<int8_t*>(a_.out) + at, y, c.count);
    else
      store_some<V>(a_.out + at * int64_t(element_size(a_.dtype)), a_.dtype, y, c.count);
  }

 private:
  const Image& a_;
  bool clamps_;   // nothing but scale, bias and bounds, all in units of the result
  float factor_;  // to codes
  F low_, high_;
};

}  // namespace
}  // namespace qcompile
