// What becomes of the sums of a convolution: scale, bias, activation, residual, activation, and floats or int8 codes.
#pragma once

#include <cmath>
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
    bool bounded;  // codes are written, that are whole numbers of 32 bits whatever the sums
    bool whole;    // that, of 16 channels
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
    low_ = V::fill_bytes(uint8_t(int(std::nearbyint(inner_.low))));
    high_ = V::fill_bytes(uint8_t(int(std::nearbyint(inner_.high))));
  }

  // `scale`: of the sums; `most`: what they are at most.
  Channels channels(int64_t first, int count, F scale, F most) const {
    F bias = V::set1(0.0f);
    if (a_.bias != nullptr) bias = load_some<V>(a_.bias + first * int64_t(element_size(a_.bias_dtype)), a_.bias_dtype, count);
    const F factor = V::set1(direct_ ? factor_ : 1.0f);
    Channels r = {V::mul(scale, factor), V::mul(bias, factor), first, count, direct_codes(), false};
    float bounds[kTile];
    V::store(bounds, V::fma(V::abs(r.scale), most, V::abs(r.bias)));
    for (float bound : bounds) r.bounded = r.bounded && bound < float(1 << 30);
    r.whole = r.bounded && count == kTile;
    return r;
  }

  // Whether codes are what sums become after nothing but a factor, a bias, and bounds.
  bool direct_codes() const { return direct_ && codes_; }

  // The sums of `rows` positions from `position` on, 16 floats each, `stride` floats apart. `nan`: some may be that.
  void store(const Channels& c, int64_t position, int64_t rows, const float* sums, int64_t stride, bool nan) const {
    if (c.whole && !nan) {
      const int64_t most = rows / 4 * 4;
      store_whole(c, position, most, sums, stride);
      position += most;
      rows -= most;
      sums += most * stride;
    }
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

  // The sums of kRows positions from `position` on and of tiles that follow one another, all whole, none NaN.
  template <int kRows, int kTiles>
  __attribute__((always_inline)) void write(const Channels* c, int64_t position, const F (&sums)[kRows][kTiles]) const {
    static_assert(kRows * kTiles % 4 == 0, "codes are made four vectors at a time");
    const int64_t channels = a_.window.out_channels;
    int8_t* out = reinterpret_cast<int8_t*>(a_.out) + position * channels + c[0].first;
    const auto low = low_, high = high_;
    const auto at = [&](int i) __attribute__((always_inline)) {
      return V::fma(sums[i / kTiles][i % kTiles], c[i % kTiles].scale, c[i % kTiles].bias);
    };
    const auto to = [&](int i) __attribute__((always_inline)) { return out + i / kTiles * channels + i % kTiles * kTile; };
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kTiles; i += 4) {
      const auto codes = V::bound_codes(V::round_codes(at(i), at(i + 1), at(i + 2), at(i + 3)), low, high);
      V::template store_quarter<0>(to(i), codes);
      V::template store_quarter<1>(to(i + 1), codes);
      V::template store_quarter<2>(to(i + 2), codes);
      V::template store_quarter<3>(to(i + 3), codes);
    }
  }

  // The sums of `rows` positions and up to 64 channels, that are bounded, in the order of V::interleave.
  void store_quads(const F* scale, const F* bias, int64_t first, int count, int64_t position, int rows, const int32_t* sums) const {
    const int64_t channels = a_.window.out_channels;
    int8_t* to = reinterpret_cast<int8_t*>(a_.out) + position * channels + first;
    const auto at = [&](int p) __attribute__((always_inline)) {
      return V::fma(V::to_float(V::load_int(sums + p * 16)), scale[p], bias[p]);
    };
    for (int r = 0; r < rows; ++r, sums += 64, to += channels) {
      const auto codes = V::bound_codes(V::join_codes(at(0), at(1), at(2), at(3)), low_, high_);
      count == 64 ? V::store_cell(reinterpret_cast<uint8_t*>(to), codes) : V::store_bytes(to, codes, count);
    }
  }

 private:
  // Four positions at a time; bounds are those of bytes, since rounding keeps order.
  void store_whole(const Channels& c, int64_t position, int64_t rows, const float* sums, int64_t stride) const {
    const int64_t channels = a_.window.out_channels;
    int8_t* to = reinterpret_cast<int8_t*>(a_.out) + position * channels + c.first;
    const F scale = c.scale, bias = c.bias;
    const auto low = low_, high = high_;
    const auto at = [&](int64_t i) __attribute__((always_inline)) { return V::fma(V::load(sums + i * stride), scale, bias); };
    for (int64_t r = 0; r < rows; r += 4, sums += 4 * stride, to += 4 * channels) {
      const auto codes = V::bound_codes(V::round_codes(at(0), at(1), at(2), at(3)), low, high);
      V::template store_quarter<0>(to, codes);
      V::template store_quarter<1>(to + channels, codes);
      V::template store_quarter<2>(to + 2 * channels, codes);
      V::template store_quarter<3>(to + 3 * channels, codes);
    }
  }

  void put(int8_t* codes, char* out, int count, F y) const {
    codes_ ? store_codes<V>(codes, y, count) : store_some<V>(out, a_.dtype, y, count);
  }

  const Image& a_;
  Bounds inner_, outer_;  // of what is before and after the sum with `add`
  bool codes_ = false, direct_ = false;
  float factor_ = 1.0f;  // to codes
  typename V::Cell low_, high_;  // of codes
};

}  // namespace
}  // namespace qcompile
