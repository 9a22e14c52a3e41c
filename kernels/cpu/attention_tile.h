// The softmax of both attentions, online, and what a tile of many query rows does with a block of keys: scores, weights,
// values. V is an instruction set (isa_*.cpp).
#pragma once

#include "activations.h"
#include "attention_mask.h"

namespace qcompile {
namespace {

// The sum of 16 lanes.
inline float sum_of(const float* lanes) {
  alignas(64) float x[kTile];
  std::memcpy(x, lanes, sizeof x);
  for (int half = kTile / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// e^x, and 0 below -87: the weight of a key whose score is -x less than the largest.
template <class V>
typename V::F key_weight(typename V::F x) {
  return V::select_less(x, V::set1(-87.0f), V::set1(0.0f), Act<V>::exp(x));
}

// Scores of up to 16 rows become weights e^(score - the largest so far), and `shrink` what earlier sums are to be multiplied
// by; those of keys [from, end), from a multiple of 16, and up to the next one "never". NaN stays NaN. totals: [rows, 16].
template <class V>
void weigh_rows(int rows, float* scores, int from, int end, float* largest, float* totals, float* shrink) {
  using F = typename V::F;
  alignas(64) float base_of[kTile];
  const F old = V::load(largest), zero = V::set1(0.0f);
  V::store(base_of, old);
  for (int r = 0; r < rows; ++r) {
    const float* score = scores + r * kKeyBlock;
    F most = V::load(score + from);
    for (int i = from + kTile; i < end; i += kTile) most = V::max(most, V::load(score + i));
    const float own = V::largest(most);
    base_of[r] = own > base_of[r] ? own : base_of[r];
  }
  const F now = V::load(base_of);
  V::store(largest, now);
  const F base = V::select_less(now, V::set1(std::numeric_limits<float>::lowest()), zero, now);  // 0: a row without keys
  V::store(base_of, base);
  V::store(shrink, key_weight<V>(V::sub(old, base)));
  for (int r = 0; r < rows; ++r) {
    const F least = V::set1(base_of[r]);
    F total = V::mul(V::load(totals + r * kTile), V::set1(shrink[r]));
    for (int i = from; i < end; i += kTile) {
      float* score = scores + r * kKeyBlock + i;
      const F x = key_weight<V>(V::sub(V::load(score), least));
      V::store(score, x);
      total = V::add(total, x);
    }
    V::store(totals + r * kTile, total);
  }
}

template <class Fn>
__attribute__((noinline)) void apart(const Fn& f) {
  f();
}

// The rows of a tile, and the registers' square of sums: rows times vectors of 16 keys, or of 16 values.
template <class V>
struct AttentionTile {
  using F = typename V::F;
  static constexpr int kRows = V::kTileRows, kVectors = V::kTileVectors;
  static_assert(kTileRows % kRows == 0, "row blocks are whole tiles");

  const float* q;  // [kRows, width], scaled
  float* out;      // [kRows, value_width]
  float* totals;   // [kRows, 16]: of each row, by lanes, what its weights add up to
  float* largest;  // [16]: of each row the largest score so far
  int64_t dim, width, value_width;
  alignas(64) float scores[kRows * kKeyBlock], shrink[kTile];

  // scores = q k^T over whole vectors of keys; keys: [dim, 64].
  void score(const float* keys, VisibleKeys seen) {
    own([&] {
      for (int at = first(seen); at < seen.end; at += kVectors * kTile)
        score_keys<kVectors>(keys + at, at, (seen.end - at + kTile - 1) / kTile);
    });
  }

  // Scores of a row's keys outside of [own.begin, own.end) become "never".
  void hide(int r, VisibleKeys own, VisibleKeys seen) {
    alignas(64) static constexpr float kLanes[kTile] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const F lanes = V::load(kLanes), never = V::set1(kNever), begin = V::set1(own.begin), end = V::set1(own.end);
    float* score = scores + r * kKeyBlock;
    for (int i = first(seen); i < seen.end; i += kTile) {
      const F key = V::add(lanes, V::set1(float(i)));
      const F x = V::select_less(key, end, V::load(score + i), never);
      V::store(score + i, V::select_less(key, begin, never, x));
    }
  }

  void weigh(VisibleKeys seen) {
    own([&] { weigh_rows<V>(kRows, scores, first(seen), seen.end, largest, totals, shrink); });
  }

  // out = out * shrink + weights times values; values: [64, stride].
  void add_values(const float* values, int64_t stride, VisibleKeys seen) {
    values += seen.begin * stride;
    own([&] {
      for (int64_t d = 0; d < value_width; d += kVectors * kTile)
        add_columns<kVectors>(out + d, values + d, stride, seen, int((value_width - d) / kTile));
    });
  }

 private:
  // With few registers a function of its own: amid all that a unit does its sums would not stay in them.
  template <class Fn>
  static void own(const Fn& f) {
    if constexpr (V::kTileVectors > 1)
      f();
    else
      apart(f);
  }

  static int first(VisibleKeys seen) { return seen.begin / kTile * kTile; }

  template <int kN>
  void score_keys(const float* keys, int at, int vectors) {
    if constexpr (kN > 1)
      if (vectors < kN) return score_keys<kN - 1>(keys, at, vectors);
    F sum[kRows][kN];
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kN; ++j) sum[r][j] = V::set1(0.0f);
    const float *query = q, *end = q + dim;
    for (; query != end; ++query, keys += kKeyBlock) {
      F key[kN];
      for (int j = 0; j < kN; ++j) key[j] = V::load(keys + j * kTile);
      for (int r = 0; r < kRows; ++r) {
        const F x = V::set1(query[r * width]);
        for (int j = 0; j < kN; ++j) sum[r][j] = V::fma(x, key[j], sum[r][j]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kN; ++j) V::store(scores + r * kKeyBlock + at + j * kTile, sum[r][j]);
  }

  template <int kN>
  void add_columns(float* to, const float* values, int64_t stride, VisibleKeys seen, int vectors) {
    if constexpr (kN > 1)
      if (vectors < kN) return add_columns<kN - 1>(to, values, stride, seen, vectors);
    F sum[kRows][kN];
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kN; ++j) sum[r][j] = V::mul(V::load(to + r * value_width + j * kTile), V::set1(shrink[r]));
    const float *weights = scores + seen.begin, *end = scores + seen.end;
    for (; weights != end; ++weights, values += stride) {
      F value[kN];
      for (int j = 0; j < kN; ++j) value[j] = V::load(values + j * kTile);
      for (int r = 0; r < kRows; ++r) {
        const F x = V::set1(weights[r * kKeyBlock]);
        for (int j = 0; j < kN; ++j) sum[r][j] = V::fma(x, value[j], sum[r][j]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kN; ++j) V::store(to + r * value_width + j * kTile, sum[r][j]);
  }
};

}  // namespace
}  // namespace qcompile
