// What becomes of the sums of a convolution: scale, bias, activation, residual, activation, and floats or int8 codes.
#pragma once

#include <limits>

#include "activations.h"
#include "conv_args.h"
#include "lanes.h"

namespace qcompile {
namespace {

constexpr int8_t kNan = -128;  // what stands for it among codes

// `count` (1 to 16) codes as floats, the rest 0.
template <class V>
inline typename V::F load_codes(const int8_t* p, int count) {
  int8_t some[kTile] = {};
  if (count < kTile) {
    std::memcpy(some, p, size_t(count));
    p = some;
  }
  const typename V::F x = V::load_i8(p);
  return V::select_less(x, V::set1(kNan + 0.5f), V::set1(std::numeric_limits<float>::quiet_NaN()), x);
}

// The first `count` of 16 values within +-127, rounded to codes.
template <class V>
inline void store_codes(int8_t* p, typename V::F value, int count) {
  if (count == kTile) return V::store_i8(p, value);
  int8_t some[kTile];
  V::store_i8(some, value);
  std::memcpy(p, some, size_t(count));
}

// The bounds of an activation that is nothing else.
struct Bounds {
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  bool all = true;

  explicit Bounds(Activation a) {
    if (a == Activation::kRelu || a == Activation::kRelu6) low = 0.0f;
    if (a == Activation::kRelu6) high = 6.0f;
    all = a == Activation::kNone || low == 0.0f;
  }
};

template <class V>
class Finish {
  using F = typename V::F;

 public:
  // 16 channels: `count` of them from `first` on. Where nothing is added both are in units of the result.
  struct Channels {
    F scale, bias;
    int64_t first;
    int count;
  };

  explicit Finish(const Image& a) : a_(a), inner_(a.activation), outer_(a.after) {
    codes_ = a.out_scale > 0.0f;
    factor_ = codes_ ? 1.0f / a.out_scale : 1.0f;
    direct_ = inner_.all && a.add == nullptr;
    if (!direct_) return;
    inner_.low *= factor_;
    inner_.high *= factor_;
    if (codes_) {
      inner_.low = inner_.low > -127.0f ? inner_.low : -127.0f;
      inner_.high = inner_.high < 127.0f ? inner_.high : 127.0f;
    }
  }

  // `scale`: of the sums.
  Channels channels(int64_t first, int count, F scale) const {
    F bias = V::set1(0.0f);
    if (a_.bias != nullptr) bias = load_some<V>(a_.bias + first * int64_t(element_size(a_.bias_dtype)), a_.bias_dtype, count);
    const F factor = V::set1(direct_ ? factor_ : 1.0f);
    return {V::mul(scale, factor), V::mul(bias, factor), first, count};
  }

  // The sums of `rows` positions from `position` on, 16 floats each, `stride` floats apart.
  void store(const Channels& c, int64_t position, int64_t rows, const float* sums, int64_t stride) const {
    const F scale = c.scale, bias = c.bias, low = V::set1(inner_.low), high = V::set1(inner_.high);
    const auto bounded = [&](int64_t r) __attribute__((always_inline)) {
      return V::max(low, V::min(high, V::fma(V::load(sums + r * stride), scale, bias)));  // in this order NaN stays NaN
    };
    const int64_t channels = a_.window.out_channels, at = position * channels + c.first;
    int8_t* codes = reinterpret_cast<int8_t*>(a_.out) + at;
    if (direct_ && codes_ && c.count == kTile) {
      for (int64_t r = 0; r < rows; ++r, codes += channels) V::store_i8(codes, bounded(r));
      return;
    }
    const int64_t size = int64_t(element_size(a_.dtype));
    char* out = a_.out + at * size;
    if (direct_) {
      for (int64_t r = 0; r < rows; ++r) put(codes + r * channels, out + r * channels * size, c.count, bounded(r));
      return;
    }
    const F top = V::set1(127.0f), bottom = V::set1(-127.0f), factor = V::set1(factor_);
    const F outer_low = V::set1(outer_.low), outer_high = V::set1(outer_.high);
    const char* add = a_.add + at * size;
    for (int64_t r = 0; r < rows; ++r) {
      F y = inner_.all ? bounded(r) : Act<V>::apply(a_.activation, V::fma(V::load(sums + r * stride), scale, bias));
      if (a_.add != nullptr) {
        y = V::add(y, load_some<V>(add + r * channels * size, a_.dtype, c.count));
        y = outer_.all ? V::max(outer_low, V::min(outer_high, y)) : Act<V>::apply(a_.after, y);
      }
      if (codes_) y = V::max(bottom, V::min(top, V::mul(y, factor)));
      put(codes + r * channels, out + r * channels * size, c.count, y);
    }
  }

 private:
  void put(int8_t* codes, char* out, int count, F y) const {
    codes_ ? store_codes<V>(codes, y, count) : store_some<V>(out, a_.dtype, y, count);
  }

  const Image& a_;
  Bounds inner_, outer_;  // of what is before and after the sum with `add`
  bool codes_ = false, direct_ = false;
  float factor_ = 1.0f;  // to codes
};

}  // namespace
}  // namespace qcompile
