// A norm of one row, in float32.
#pragma once

#include <cmath>

#include "half.h"
#include "kernels.h"
#include "lanes.h"

namespace qcompile {
namespace {

template <class V, class Fn>
float sum_of(const char* row, DType t, int64_t cols, Fn f) {
  using F = typename V::F;
  F sums = V::set1(0.0f);
  const int64_t size = int64_t(element_size(t)), whole = cols / kTile * kTile;
  for (int64_t k = 0; k < whole; k += kTile) sums = V::add(sums, f(V::load16(row + k * size, t)));
  alignas(64) float lanes[kTile], last[kTile];
  V::store(lanes, sums);
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  if (whole == cols) return sum;
  V::store(last, f(load_some<V>(row + whole * size, t, int(cols - whole))));
  for (int64_t k = whole; k < cols; ++k) sum += last[k - whole];
  return sum;
}

// (x - mean) / sqrt(variance + eps) * weight + bias, or without `centered` x / sqrt(mean(x^2) + eps) * weight + bias.
template <class V>
void normalize_row(const Norm& norm, const char* row, DType t, int64_t cols, char* out, DType out_type) {
  using F = typename V::F;
  const float mean = norm.centered ? sum_of<V>(row, t, cols, [](F x) { return x; }) / float(cols) : 0.0f;
  const F middle = V::set1(mean);
  const float squares = sum_of<V>(row, t, cols, [&](F x) {
    const F d = V::sub(x, middle);
    return V::mul(d, d);
  });
  const F factor = V::set1(1.0f / std::sqrt(squares / float(cols) + norm.eps));
  for (int64_t k = 0; k < cols; k += kTile) {
    const int count = cols - k < kTile ? int(cols - k) : kTile;
    const auto read = [&](const char* p, DType type) { return load_some<V>(p + k * int64_t(element_size(type)), type, count); };
    F y = V::mul(V::mul(V::sub(read(row, t), middle), factor), read(norm.weight, norm.dtype));
    if (norm.bias != nullptr) y = V::add(y, read(norm.bias, norm.dtype));
    store_some<V>(out + k * int64_t(element_size(out_type)), out_type, y, count);
  }
}

template <class V>
void norm(const NormRows& a) {
  constexpr int64_t kGrain = 1 << 15;  // values that are worth a thread
  const auto rows = [](int64_t begin, int64_t end, void* context) {
    const NormRows& a = *static_cast<const NormRows*>(context);
    const int64_t bytes = a.cols * int64_t(element_size(a.dtype));
    for (int64_t m = begin; m < end; ++m)
      normalize_row<V>(a.norm, a.x + m * bytes, a.dtype, a.cols, a.out + m * bytes, a.dtype);
  };
  a.parallel(a.rows, kGrain / a.cols + 1, rows, const_cast<NormRows*>(&a));
}

}  // namespace
}  // namespace qcompile
