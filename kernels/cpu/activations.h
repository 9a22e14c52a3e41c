// Activation functions on 16 floats. V is an instruction set (isa_*.cpp). NaN stays NaN everywhere: min and max return
// their second operand when one is NaN.
#pragma once

#include "kernels.h"

namespace qcompile {
namespace {

template <class V>
struct Act {
  using F = typename V::F;

  // e^x: x = n ln 2 + r, |r| <= ln 2 / 2, and a degree-6 Taylor polynomial in r (relative error below 2e-7).
  static F exp(F x) {
    x = V::max(V::set1(-87.0f), V::min(V::set1(88.8f), x));
    const F n = V::round(V::mul(x, V::set1(1.44269504f)));
    F r = V::fnma(n, V::set1(0.693359375f), x);
    r = V::fnma(n, V::set1(-2.12194440e-4f), r);
    F p = V::set1(1.0f / 720);
    p = V::fma(p, r, V::set1(1.0f / 120));
    p = V::fma(p, r, V::set1(1.0f / 24));
    p = V::fma(p, r, V::set1(1.0f / 6));
    p = V::fma(p, r, V::set1(0.5f));
    p = V::fma(p, r, V::set1(1.0f));
    p = V::fma(p, r, V::set1(1.0f));
    return V::times_exp2(p, n);
  }

  static F sigmoid(F x) {
    const F one = V::set1(1.0f);
    return V::div(one, V::add(one, exp(V::sub(V::set1(0.0f), x))));
  }

  // 1 - 2 / (e^2x + 1); near 0, where that cancels, the odd Taylor series.
  static F tanh(F x) {
    const F one = V::set1(1.0f), two = V::set1(2.0f), s = V::mul(x, x);
    const F wide = V::sub(one, V::div(two, V::add(one, exp(V::mul(two, x)))));
    F p = V::set1(-17.0f / 315);
    p = V::fma(p, s, V::set1(2.0f / 15));
    p = V::fma(p, s, V::set1(-1.0f / 3));
    p = V::fma(V::mul(p, s), x, x);
    return V::select_less(s, V::set1(0.02f), p, wide);
  }

  // x Phi(x). erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
  static F gelu(F x) {
    const F one = V::set1(1.0f), half = V::set1(0.5f);
    // beyond 8.66 erf is 1; and 1 - erf(z) is never so small that products with it are subnormal: those take a hundred cycles
    const F z = V::min(V::set1(8.66f), V::mul(V::abs(x), V::set1(0.70710678f)));
    const F t = V::reciprocal(V::fma(V::set1(0.3275911f), z, one));
    F p = V::set1(1.061405429f);
    p = V::fma(p, t, V::set1(-1.453152027f));
    p = V::fma(p, t, V::set1(1.421413741f));
    p = V::fma(p, t, V::set1(-0.284496736f));
    p = V::fma(p, t, V::set1(0.254829592f));
    const F tail = V::mul(V::mul(p, t), exp(V::fnma(z, z, V::set1(0.0f))));  // 1 - erf(z)
    // Phi(x) = 1 - tail / 2 for x >= 0, tail / 2 below
    const F below = V::mul(half, tail);
    return V::mul(x, V::select_less(x, V::set1(0.0f), below, V::sub(one, below)));
  }

  static F gelu_tanh(F x) {
    const F inner = V::mul(x, V::fma(V::mul(x, x), V::set1(0.044715f * 0.79788456f), V::set1(0.79788456f)));
    return V::mul(V::mul(V::set1(0.5f), x), V::add(V::set1(1.0f), tanh(inner)));
  }

  // relu6(x + 3) / 6
  static F hardsigmoid(F x) {
    const F y = V::max(V::set1(0.0f), V::add(x, V::set1(3.0f)));
    return V::mul(V::set1(1.0f / 6), V::min(V::set1(6.0f), y));
  }

  // Calls both, too long to be inlined.
  static __attribute__((noinline)) F apply(Activation a, F x) {
    with(a, [&](auto f) __attribute__((always_inline)) { x = f(x); });
    return x;
  }

  // Of `count` times 16 values, a bias added to each, to rows `stride` floats apart: one choice, and one loop without calls.
  static __attribute__((noinline)) void apply(Activation a, F bias, const float* values, int count, float* to,
                                              int64_t stride) {
    with(a, [&](auto f) __attribute__((always_inline)) {
      for (const float* end = values + count * kTile; values != end; values += kTile, to += stride)
        V::store(to, f(V::add(V::load(values), bias)));
    });
  }

 private:
  // Calls use(f) with the function that is meant.
  template <class Use>
  static __attribute__((always_inline)) void with(Activation a, Use use) {
    switch (a) {
      case Activation::kNone: return use([](F x) __attribute__((always_inline)) { return x; });
      case Activation::kRelu: return use([](F x) __attribute__((always_inline)) { return V::max(V::set1(0.0f), x); });
      case Activation::kGelu: return use([](F x) __attribute__((always_inline)) { return gelu(x); });
      case Activation::kGeluTanh: return use([](F x) __attribute__((always_inline)) { return gelu_tanh(x); });
      case Activation::kSilu: return use([](F x) __attribute__((always_inline)) { return V::mul(x, sigmoid(x)); });
      case Activation::kSigmoid: return use([](F x) __attribute__((always_inline)) { return sigmoid(x); });
      case Activation::kTanh: return use([](F x) __attribute__((always_inline)) { return tanh(x); });
      case Activation::kRelu6:
        return use([](F x) __attribute__((always_inline)) { return V::min(V::set1(6.0f), V::max(V::set1(0.0f), x)); });
      case Activation::kHardswish: return use([](F x) __attribute__((always_inline)) { return V::mul(x, hardsigmoid(x)); });
      case Activation::kHardsigmoid: return use([](F x) __attribute__((always_inline)) { return hardsigmoid(x); });
    }
  }
};

}  // namespace
}  // namespace qcompile
