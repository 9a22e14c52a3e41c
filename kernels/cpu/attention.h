// Attention of few queries over many keys: keys and values are read once for all queries of a head's group, the softmax
// is online in float32, and keys that no query may see are not read.
//
// A query row is one query of one head; the rows of a group (the heads that share keys) are cut into row blocks. Keys are
// cut into blocks of 64; a split takes every n-th block, so that splits stay equal when only the first keys are visible.
#pragma once

#include <algorithm>
#include <cmath>

#include "activations.h"
#include "attention_many.h"

namespace qcompile {
namespace {

template <class V, DType kType>
class AttentionRun {
  using F = typename V::F;
  static constexpr int kSide = V::kRows / 2;  // registers hold a square of sums: rows times keys, rows times values
  static constexpr int64_t kSize = kType == DType::kFloat32 ? 4 : 2;

 public:
  explicit AttentionRun(const Attention& a) : a_(a), plan_(a) {
    visible_ = reinterpret_cast<VisibleKeys*>(a.scratch);
    partial_ = reinterpret_cast<float*>(a.scratch + plan_.partial);
  }

  void run() {
    if (plan_.units == 0) return;
    if (a_.mask != nullptr) MaskScan(a_, plan_).run(visible_);
    const int64_t work = 1 + visible_keys() * plan_.row_block * (plan_.width + plan_.value_width) / plan_.splits;
    a_.parallel(plan_.units * plan_.splits, 1 + kThreadWork / work, [](int64_t begin, int64_t end, void* self) {
      for (int64_t i = begin; i < end; ++i) static_cast<AttentionRun*>(self)->attend(i);
    }, this);
    if (plan_.splits == 1) return;
    const int64_t merging = plan_.splits * plan_.row_block * plan_.value_width;
    a_.parallel(plan_.units, 1 + kThreadWork / merging, [](int64_t begin, int64_t end, void* self) {
      for (int64_t i = begin; i < end; ++i) static_cast<AttentionRun*>(self)->merge(i);
    }, this);
  }

 private:
  // The state of a row block: queries, scores and sums. 16 rows of 256, or fewer wider ones.
  struct Rows {
    alignas(64) float q[kRowFloats], out[kRowFloats];
    alignas(64) float scores[kQueryRows * kKeyBlock];
    alignas(64) float products[kSide * kTile * kTile];  // a key's products with a query, before they are added up
    alignas(64) float totals[kQueryRows * kTile];  // of each row, by lanes
    alignas(64) float largest[kQueryRows], total[kQueryRows], shrink[kQueryRows];
  };

  // Rows that are needed soon.
  struct Ahead {
    const char* row;
    int64_t stride, bytes;
    void fetch(int i) const {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + i * stride + at);
    }
  };

  // Keys that a query row sees, for the share of work: those of the first mask stand for all.
  int64_t visible_keys() const {
    if (a_.mask == nullptr) return a_.keys;
    int64_t keys = 0;
    for (int64_t i = 0; i < plan_.blocks; ++i) keys += visible_[i].end - visible_[i].begin;
    return keys;
  }

  struct Place {
    int64_t batch, kv_head, row;
    int rows;
  };
  Place place(int64_t unit) const {
    const int64_t row = unit % plan_.row_blocks * plan_.row_block, pair = unit / plan_.row_blocks;
    return {pair / a_.kv_heads, pair % a_.kv_heads, row, int(min64(plan_.row_block, plan_.rows - row))};
  }
  // Offset of a query row in q, the mask or the result.
  int64_t offset(const Place& p, int r, const int64_t* stride) const {
    const int64_t row = p.row + r, head = p.kv_head * (a_.heads / a_.kv_heads) + row / a_.queries;
    return p.batch * stride[0] + head * stride[1] + row % a_.queries * stride[2];
  }

  // 16 values from `column` on, those past `columns` 0.
  static F load_some(const char* row, int64_t column, int64_t columns) {
    if (column + kTile <= columns) return V::load16(row + column * kSize, kType);
    alignas(64) float values[kTile] = {};
    for (int64_t i = column; i < columns; ++i) values[i - column] = load_scalar(row, kType, i);
    return V::load(values);
  }

  void attend(int64_t index) {
    const int64_t unit = index / plan_.splits, split = index % plan_.splits;
    const Place p = place(unit);
    Rows s;
    for (int r = 0; r < p.rows; ++r) {
      const char* q = a_.q + offset(p, r, a_.q_stride);
      for (int64_t d = 0; d < plan_.width; d += kTile)
        V::store(s.q + r * plan_.width + d, V::mul(load_some(q, d, a_.dim), V::set1(a_.scale)));
    }
    std::fill(s.largest, s.largest + kQueryRows, kNever);
    std::memset(s.totals, 0, size_t(p.rows) * kTile * 4);
    std::memset(s.out, 0, size_t(p.rows * plan_.value_width) * 4);
    const char* k = a_.k + p.batch * a_.k_stride[0] + p.kv_head * a_.k_stride[1];
    const char* v = a_.v + p.batch * a_.v_stride[0] + p.kv_head * a_.v_stride[1];
    const VisibleKeys* visible = nullptr;
    if (a_.mask != nullptr) visible = visible_ + plan_.mask_index(a_, p.batch, p.kv_head) * plan_.blocks;
    for (int64_t block = split; block < plan_.blocks; block += plan_.splits) {
      const int64_t first = block * kKeyBlock;
      VisibleKeys keys = {0, uint8_t(min64(kKeyBlock, a_.keys - first)), true};
      if (visible != nullptr) keys = visible[block];
      const int count = keys.end - keys.begin;
      if (count == 0) continue;
      const int64_t at = first + keys.begin, next = min64(block + plan_.splits, plan_.blocks - 1) * kKeyBlock;
      // while one is computed with, the other is on its way from memory
      const Ahead values = {v + at * a_.v_stride[2], a_.v_stride[2], a_.value_dim * kSize};
      const Ahead next_keys = {k + next * a_.k_stride[2], a_.k_stride[2], a_.dim * kSize};
      score(s, p.rows, k + at * a_.k_stride[2], count, values);
      if (!keys.plain) add_mask(s, p, at, count);
      weigh_rows<V>(p.rows, s.scores, 0, count, s.largest, s.totals, s.shrink);
      for (int r = 0; r < p.rows; r += kSide) add_values<kSide>(s, r, p.rows - r, values.row, count, next_keys);
    }
    for (int r = 0; r < p.rows; ++r) s.total[r] = sum_of(s.totals + r * kTile);
    if (plan_.splits == 1) return write(p, s.out, s.total);
    float* state = partial_ + index * plan_.state();
    std::memcpy(state, s.largest, sizeof s.largest);
    std::memcpy(state + kQueryRows, s.total, sizeof s.total);
    std::memcpy(state + 2 * kQueryRows, s.out, size_t(p.rows * plan_.value_width) * 4);
  }

  // scores = q k^T over `count` keys, and "never" up to the next multiple of 16.
  void score(Rows& s, int rows, const char* k, int count, const Ahead& values) const {
    for (int from = 0; from < count; from += kTile) {
      const int keys = count - from < kTile ? count - from : kTile;
      for (int r = 0; r < rows; r += kSide) score_rows<kSide>(s, r, rows - r, k + from * a_.k_stride[2], keys, from, values);
    }
    for (int r = 0; r < rows; ++r)
      for (int i = count; i % kTile != 0; ++i) s.scores[r * kKeyBlock + i] = kNever;
  }

  template <int kRows>
  void score_rows(Rows& s, int r0, int rows, const char* k, int keys, int from, const Ahead& values) const {
    if constexpr (kRows > 1)
      if (rows < kRows) return score_rows<kRows - 1>(s, r0, rows, k, keys, from, values);
    const float* q = s.q + r0 * plan_.width;
    const int64_t whole = a_.dim / kTile * kTile;
    for (int key = 0; key < kTile; key += kSide) {
      if (r0 == 0)
        for (int j = 0; j < kSide; ++j) values.fetch(from + key + j);
      const char* row[kSide];
      F sum[kRows][kSide];
      for (int j = 0; j < kSide; ++j) {
        row[j] = k + (key + j < keys ? key + j : keys - 1) * a_.k_stride[2];  // past the end: the last key once more
        for (int r = 0; r < kRows; ++r) sum[r][j] = V::set1(0.0f);
      }
      for (int64_t d = 0; d < whole; d += kTile) {
        F value[kSide];
        for (int j = 0; j < kSide; ++j) value[j] = V::load16(row[j] + d * kSize, kType);
        for (int r = 0; r < kRows; ++r) {
          const F query = V::load(q + r * plan_.width + d);
          for (int j = 0; j < kSide; ++j) sum[r][j] = V::fma(query, value[j], sum[r][j]);
        }
      }
      if (whole < a_.dim)
        for (int j = 0; j < kSide; ++j) {
          const F value = load_some(row[j], whole, a_.dim);
          for (int r = 0; r < kRows; ++r) sum[r][j] = V::fma(V::load(q + r * plan_.width + whole), value, sum[r][j]);
        }
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kSide; ++j) V::store(s.products + (r * kTile + key + j) * kTile, sum[r][j]);
    }
    for (int r = 0; r < kRows; ++r)
      V::store(s.scores + (r0 + r) * kKeyBlock + from, V::row_sums(s.products + r * kTile * kTile));
  }

  void add_mask(Rows& s, const Place& p, int64_t at, int count) const {
    for (int r = 0; r < p.rows; ++r) {
      const char* row = a_.mask + offset(p, r, a_.mask_stride) + at * a_.mask_stride[3];
      float* score = s.scores + r * kKeyBlock;
      for (int i = 0; i < count; ++i) score[i] += mask_value(a_, row + i * a_.mask_stride[3]);
    }
  }

  template <int kRows>
  void add_values(Rows& s, int r0, int rows, const char* v, int count, const Ahead& next) const {
    if constexpr (kRows > 1)
      if (rows < kRows) return add_values<kRows - 1>(s, r0, rows, v, count, next);
    int64_t d = 0;
    for (; d + kSide * kTile <= a_.value_dim; d += kSide * kTile) add_columns<kRows, kSide, true>(s, r0, v, count, d, next);
    for (; d + kTile <= a_.value_dim; d += kTile) add_columns<kRows, 1, true>(s, r0, v, count, d, next);
    if (d < a_.value_dim) add_columns<kRows, 1, false>(s, r0, v, count, d, next);
  }

  // out = out * shrink + weights times values, for kRows rows and kParts * 16 columns.
  template <int kRows, int kParts, bool kWhole>
  void add_columns(Rows& s, int r0, const char* v, int count, int64_t d, const Ahead& next) const {
    float* out = s.out + r0 * plan_.value_width + d;
    F sum[kRows][kParts];
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kParts; ++j)
        sum[r][j] = V::mul(V::load(out + r * plan_.value_width + j * kTile), V::set1(s.shrink[r0 + r]));
    const float* weight = s.scores + r0 * kKeyBlock;
    for (int key = 0; key < count; ++key, v += a_.v_stride[2], ++weight) {
      if (r0 == 0 && d == 0) next.fetch(key);
      F value[kParts];
      for (int j = 0; j < kParts; ++j)
        value[j] = kWhole ? V::load16(v + (d + j * kTile) * kSize, kType) : load_some(v, d, a_.value_dim);
      for (int r = 0; r < kRows; ++r) {
        const F w = V::set1(weight[r * kKeyBlock]);
        for (int j = 0; j < kParts; ++j) sum[r][j] = V::fma(w, value[j], sum[r][j]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kParts; ++j) V::store(out + r * plan_.value_width + j * kTile, sum[r][j]);
  }

  // Each split's sums count by how its largest score compares with the largest of all.
  void merge(int64_t unit) {
    const Place p = place(unit);
    float* states = partial_ + unit * plan_.splits * plan_.state();
    float* total = states + kQueryRows;
    float* out = states + 2 * kQueryRows;
    for (int r = 0; r < p.rows; ++r) {
      float largest = kNever;
      for (int64_t i = 0; i < plan_.splits; ++i) {
        const float l = states[i * plan_.state() + r];
        largest = l > largest ? l : largest;
      }
      for (int64_t i = 0; i < plan_.splits; ++i) {
        const float* state = states + i * plan_.state();
        const float own = state[r], w = own == largest ? 1.0f : std::exp(own - largest);
        const float* from = state + 2 * kQueryRows + r * plan_.value_width;
        float* to = out + r * plan_.value_width;
        total[r] = state[kQueryRows + r] * w + (i > 0 ? total[r] : 0.0f);
        for (int64_t d = 0; d < plan_.value_width; d += kTile) {
          const F part = V::mul(V::load(from + d), V::set1(w));
          V::store(to + d, i > 0 ? V::add(V::load(to + d), part) : part);
        }
      }
    }
    write(p, out, total);
  }

  // A row that sees no key is 0.
  void write(const Place& p, const float* out, const float* total) const {
    for (int r = 0; r < p.rows; ++r) {
      char* to = a_.out + offset(p, r, a_.out_stride);
      const F divisor = V::set1(total[r] == 0.0f ? 1.0f : total[r]);
      for (int64_t d = 0; d < a_.value_dim; d += kTile) {
        const F y = V::div(V::load(out + r * plan_.value_width + d), divisor);
        if (d + kTile <= a_.value_dim) {
          V::store16(to + d * kSize, kType, y);
          continue;
        }
        alignas(64) float values[kTile];
        V::store(values, y);
        for (int64_t i = d; i < a_.value_dim; ++i) store_scalar(to, kType, i, values[i - d]);
      }
    }
  }

  static constexpr int64_t kThreadWork = 200000;  // multiply-adds that are worth waking a thread for: 8 us of reading

  const Attention& a_;
  const AttentionPlan plan_;
  VisibleKeys* visible_ = nullptr;
  float* partial_ = nullptr;
};

template <class V>
void attention(const Attention& a) {
  if (many_queries(a)) return ManyRun<V>(a).run();
  switch (a.dtype) {
    case DType::kFloat32: return AttentionRun<V, DType::kFloat32>(a).run();
    case DType::kFloat16: return AttentionRun<V, DType::kFloat16>(a).run();
    case DType::kBFloat16: return AttentionRun<V, DType::kBFloat16>(a).run();
  }
}

}  // namespace
}  // namespace qcompile
