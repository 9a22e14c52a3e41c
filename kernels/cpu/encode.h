// Float weights to codes, scales and zero points, bit for bit what qparams.py (clip "max") and numerics.py give in plain torch:
// the same arithmetic on the same floats in the same order. Nothing here may be contracted, reordered or estimated.
#pragma once

#include <cmath>

#include "bit_writer.h"
#include "half.h"
#include "kernels.h"
#include "lanes.h"

namespace qcompile {
namespace {

// The floats that a weight's scales are rounded to, and the codes that it may have.
struct Grid {
  Zero kind;
  DType scale_dtype;
  float bottom, top;  // codes: of symmetric ones what they are without their offset
  float smallest;     // scale that the dtype may hold (runs.py)

  explicit Grid(const Encode& a) : kind(a.kind), scale_dtype(a.scale_dtype) {
    const bool middle = kind == Zero::kMiddle;
    bottom = middle ? -float(1 << (a.bits - 1)) : 0.0f;
    top = middle ? float((1 << (a.bits - 1)) - 1) : float((1 << a.bits) - 1);
    smallest = scale_dtype == DType::kFloat16 ? 0x1p-24f : 0x1p-126f;
  }
  float rounded(float f) const {
    return scale_dtype == DType::kFloat32   ? f
           : scale_dtype == DType::kFloat16 ? from_float16(to_float16(f))
                                            : from_bfloat16(to_bfloat16(f));
  }
  float stored(float scale) const { return scale == 0.0f ? 1.0f : rounded(scale < smallest ? smallest : scale); }
};

// How the values of a run become codes: a code is round(x / scale) + zero, of a shift round((x - zero) / scale).
struct Steps {
  float scale, zero;
};

// One run: values that share a scale.
template <class V>
struct Run {
  using F = typename V::F;
  const Grid& grid;
  const char* x;
  DType dtype;
  int64_t count;

  // 16 values from `k` on; where there are fewer, `valid` says how many, and the rest are 0.
  F values(int64_t k, int& valid) const {
    valid = count - k < kTile ? int(count - k) : kTile;
    return load_some<V>(x + k * int64_t(element_size(dtype)), dtype, valid);
  }

  // The smallest and the largest value; false where one is not finite. With `zero`, 0 counts as a value, too.
  bool range(bool zero, float& low, float& high) const {
    const float first = zero ? 0.0f : load_scalar(x, dtype, 0);
    F least = V::set1(first), most = least, wrong = V::set1(0.0f);
    const F none = V::set1(0.0f);
    for (int64_t k = 0; k < count; k += kTile) {
      int valid;
      F v = values(k, valid);
      if (valid < kTile && !zero) v = rest(v, valid, first);
      least = V::min(least, v);
      most = V::max(most, v);
      wrong = V::add(wrong, V::mul(v, none));  // NaN from NaN and infinity on
    }
    low = -V::largest(V::sub(none, least));
    high = V::largest(most);
    return V::folded(wrong) == 0.0f;
  }

  // Calls f(k, valid, codes, errors) for each 16 values; a code still lacks the offset of symmetric ones.
  template <Zero kKind, class Fn>
  void each(const Steps& s, Fn f) const {
    const F scale = V::set1(s.scale), zero = V::set1(s.zero), bottom = V::set1(grid.bottom), top = V::set1(grid.top);
    for (int64_t k = 0; k < count; k += kTile) {
      int valid;
      const F v = values(k, valid);
      F code = V::round(V::div(kKind == Zero::kShift ? V::sub(v, zero) : v, scale));
      if (kKind == Zero::kCode) code = V::add(code, zero);
      code = V::min(V::max(code, bottom), top);
      F value = V::mul(kKind == Zero::kCode ? V::sub(code, zero) : code, scale);
      if (kKind == Zero::kShift) value = V::add(value, zero);
      f(k, valid, v, code, valid < kTile ? rest(V::sub(value, v), valid, 0.0f) : V::sub(value, v));
    }
  }

  // The sum of the squared errors in the order of runs.py: halves of the run are added until one value is left.
  float squared_error(const Steps& s, float* scratch, int64_t size) const {
    int64_t end = 0;
    each<Zero::kCode>(s, [&](int64_t k, int, F, F, F error) {
      V::store(scratch + k, V::mul(error, error));
      end = k + kTile;
    });
    for (; end < size; end += kTile) V::store(scratch + end, V::set1(0.0f));
    int64_t n = size;
    while (n > kTile) {
      const int64_t half = (n + 1) / 2;
      int64_t i = half;
      for (; i + kTile <= n; i += kTile) V::store(scratch + i - half, V::add(V::load(scratch + i - half), V::load(scratch + i)));
      for (; i < n; ++i) scratch[i - half] += scratch[i];
      n = half;
    }
    if (n == kTile) return V::folded(V::load(scratch));
    for (; n > 1; n = (n + 1) / 2)
      for (int64_t i = (n + 1) / 2; i < n; ++i) scratch[i - (n + 1) / 2] += scratch[i];
    return scratch[0];
  }

  static F rest(F v, int valid, float with) {
    alignas(64) float lanes[kTile];
    V::store(lanes, v);
    for (int i = valid; i < kTile; ++i) lanes[i] = with;
    return V::load(lanes);
  }
};

// The zero point of a range, rounded to nearest, up, or down with the step that then covers it: where the error is least.
template <class V>
Steps affine_steps(const Run<V>& run, float low, float high, float* scratch, int64_t size) {
  const Grid& grid = run.grid;
  const float top = grid.top, step = (high - low) / top;
  const auto bounded = [&](float zero) { return zero < 0.0f ? 0.0f : zero > top ? top : zero; };
  Steps best{grid.stored(step), 0.0f};
  best.zero = bounded(std::nearbyint(-low / best.scale));
  float least = run.squared_error(best, scratch, size);
  const float exact = -low / (step < 0x1p-126f ? 0x1p-126f : step);
  for (const float rounded : {std::floor(exact), std::ceil(exact)}) {
    const float zero = bounded(rounded), over = top - zero;
    const float above = zero < top ? high / (over < 1.0f ? 1.0f : over) : 0.0f;
    const float below = zero > 0.0f ? -low / (zero < 1.0f ? 1.0f : zero) : 0.0f;
    if (!((zero < top || high == 0.0f) && (zero > 0.0f || low == 0.0f))) continue;  // a side would be given up
    const Steps other{grid.stored(above > below ? above : below), zero};
    const float error = run.squared_error(other, scratch, size);
    if (error < least) best = other, least = error;
  }
  return best;
}

// One row; `scratch` holds the squared errors of a run. False where a scale or zero point of it is not finite.
template <class V, Zero kKind, int kBits>
bool encode_row(const Encode& a, int64_t row, float* scratch) {
  using F = typename V::F;
  const Grid grid(a);
  const int64_t size = int64_t(element_size(a.dtype));
  // Codes are written by way of signed bytes: those of symmetric weights of 8 bits are such, others are kept unsigned.
  constexpr bool wide = kBits == 8 && kKind != Zero::kMiddle;
  const F offset = V::set1(wide ? -128.0f : kBits < 8 && kKind == Zero::kMiddle ? float(1 << (kBits - 1)) : 0.0f);
  BitWriter<kBits> out(a.data + row * a.row_bytes);
  F squares = V::set1(0.0f), errors = squares;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t from = g * a.group_size, left = a.cols - from, at = row * a.groups + g;
    const Run<V> run{grid, a.x + (row * a.cols + from) * size, a.dtype, left < a.group_size ? left : a.group_size};
    float low, high;
    if (!run.range(kKind != Zero::kShift, low, high)) return false;
    Steps s{};
    if (kKind == Zero::kMiddle) s.scale = grid.stored((-low > high ? -low : high) / grid.top);
    if (kKind == Zero::kShift) s.zero = grid.rounded(low), s.scale = grid.stored((high - s.zero) / grid.top);
    if (kKind == Zero::kCode) s = affine_steps<V>(run, low, high, scratch, a.group_size);
    if (!std::isfinite(s.scale) || !std::isfinite(s.zero)) return false;
    store_scalar(static_cast<char*>(a.scale), a.scale_dtype, at, s.scale);
    if (kKind == Zero::kShift) store_scalar(static_cast<char*>(a.zero), a.scale_dtype, at, s.zero);
    if (kKind == Zero::kCode) static_cast<uint8_t*>(a.zero)[at] = uint8_t(s.zero);
    run.template each<kKind>(s, [&](int64_t, int valid, F v, F code, F error) {
      alignas(64) uint8_t codes[kTile];
      V::store_i8(reinterpret_cast<int8_t*>(codes), V::add(code, offset));
      if (wide)
        for (uint8_t& c : codes) c ^= 0x80;
      out.put(codes, valid);
      squares = V::add(squares, V::mul(v, v));
      errors = V::add(errors, V::mul(error, error));
    });
  }
  out.finish();
  alignas(64) float lanes[2][kTile];
  V::store(lanes[0], errors);
  V::store(lanes[1], squares);
  for (int i = 0; i < 2; ++i) {
    double sum = 0.0;
    for (float lane : lanes[i]) sum += double(lane);
    a.squares[2 * row + i] = sum;
  }
  return true;
}

using EncodeRow = bool (*)(const Encode&, int64_t row, float* scratch);

template <class V, int kBits>
EncodeRow encoder(Zero kind) {
  if (kind == Zero::kMiddle) return encode_row<V, Zero::kMiddle, kBits>;
  return kind == Zero::kCode ? encode_row<V, Zero::kCode, kBits> : encode_row<V, Zero::kShift, kBits>;
}

template <class V>
EncodeRow encoder(const Encode& a) {
  switch (a.bits) {
    case 2: return encoder<V, 2>(a.kind);
    case 3: return encoder<V, 3>(a.kind);
    case 4: return encoder<V, 4>(a.kind);
    case 5: return encoder<V, 5>(a.kind);
    case 6: return encoder<V, 6>(a.kind);
    default: return encoder<V, 8>(a.kind);
  }
}

template <class V>
void encode(const Encode& a) {
  a.parallel(a.parts, 1, [](int64_t begin, int64_t end, void* context) {
    const Encode& a = *static_cast<const Encode*>(context);
    const EncodeRow one = encoder<V>(a);
    for (int64_t part = begin; part < end; ++part)
      for (int64_t row = a.rows * part / a.parts; row < a.rows * (part + 1) / a.parts; ++row)
        if (!one(a, row, a.scratch + part * a.part_scratch)) a.squares[2 * row] = a.squares[2 * row + 1] = NAN;
  }, const_cast<Encode*>(&a));
}

}  // namespace
}  // namespace qcompile
