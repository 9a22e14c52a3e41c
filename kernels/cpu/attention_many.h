// Attention of many queries: two matrix products with an online softmax in float32 in between, block by block of keys.
//
// A block of 64 keys is made ready once for up to 192 query rows: keys transposed, so that scores are sums over lanes that
// are keys and never need to be added across, and both as float32. A tile of rows then goes all the way, scores, weights
// and values, while keys and values stay in the first cache. Blocks that no query of a tile sees are left out for that tile,
// and where the mask is an edge (causal, padding) it is not read again: RowScan has found where the edge lies.
#pragma once

#include <algorithm>
#include <atomic>

#include "attention_tile.h"

namespace qcompile {
namespace {

template <class V>
class ManyRun {
  using F = typename V::F;
  using Tile = AttentionTile<V>;
  static constexpr int kRows = Tile::kRows;

 public:
  explicit ManyRun(const Attention& a)
      : a_(a), plan_(a), size_(int64_t(element_size(a.dtype))), visible_(reinterpret_cast<VisibleKeys*>(a.scratch)) {}

  void run() {
    if (plan_.units == 0) return;
    if (a_.mask != nullptr) RowScan(a_, plan_).run(visible_);
    a_.parallel(plan_.workers, 1, [](int64_t begin, int64_t end, void* self) {
      for (int64_t i = begin; i < end; ++i) static_cast<ManyRun*>(self)->work(i);
    }, this);
  }

 private:
  // Of one query row: where its part of the mask and of what the mask shows begins.
  struct Row {
    const VisibleKeys* visible;
    const char* mask;
    int64_t query, head;
  };
  struct Worker {
    float *q, *out, *keys, *values, *totals, *largest;
    Row* rows;
    int64_t batch, kv_head, first;
    int count, tiles;
  };

  void work(int64_t index) {
    float* scratch = reinterpret_cast<float*>(a_.scratch + plan_.visible_bytes()) + size_t(index) * plan_.worker;
    Worker w;
    w.q = scratch + plan_.q;
    w.out = scratch + plan_.out;
    w.keys = scratch + plan_.keys;
    w.values = scratch + plan_.values;
    w.totals = scratch + plan_.totals;
    w.largest = scratch + plan_.largest;
    static_assert(sizeof(Row) <= 32, "8 floats a row");
    w.rows = reinterpret_cast<Row*>(scratch + plan_.rest);
    for (int64_t i; (i = next_.fetch_add(1)) < plan_.units;) attend(w, i);
  }

  void choose(Worker& w, int64_t unit) const {
    // the last rows first: with a causal mask they see the most keys, and what comes at the end should be short
    const int64_t pairs = a_.batch * a_.kv_heads, pair = unit % pairs;
    w.batch = pair / a_.kv_heads;
    w.kv_head = pair % a_.kv_heads;
    w.first = (plan_.row_blocks - 1 - unit / pairs) * plan_.row_block;
    w.count = int(min64(plan_.row_block, plan_.rows - w.first));
    w.tiles = (w.count + kRows - 1) / kRows;
  }

  // What is read next, a share for each tile: rows of a head lie apart, and no processor guesses where the next one is.
  struct Ahead {
    struct Rows {
      const char* from = nullptr;
      int64_t stride = 0, left = 0, bytes = 0;
    };
    Rows keys, values, queries;
    int64_t share = 0;  // rows of each

    void fetch() {
      asm volatile("");  // or a compiler finds that it does nothing
      for (Rows* rows : {&keys, &values, &queries}) {
        const int64_t count = min64(share, rows->left);
        for (int64_t i = 0; i < count; ++i, rows->from += rows->stride)
          for (int64_t at = 0; at < rows->bytes; at += 64) __builtin_prefetch(rows->from + at, 0, 2);
        rows->left -= count;
      }
    }
  };

  // The keys and values of a block, and with `queries` the rows that they meet first, in as many shares as there are tiles.
  Ahead ahead(const Worker& w, int64_t block, bool queries, int tiles) const {
    const int64_t first = block * kKeyBlock, count = min64(kKeyBlock, a_.keys - first);
    Ahead next;
    const auto at = [&](const char* p, const int64_t* stride) {
      return p + w.batch * stride[0] + w.kv_head * stride[1] + first * stride[2];
    };
    next.keys = {at(a_.k, a_.k_stride), a_.k_stride[2], count, a_.dim * size_};
    next.values = {at(a_.v, a_.v_stride), a_.v_stride[2], count, a_.value_dim * size_};
    if (queries)  // of the first of the heads that share keys: the others lie beside it
      next.queries = {a_.q + w.batch * a_.q_stride[0] + w.kv_head * plan_.share * a_.q_stride[1] +
                          w.first / plan_.share * a_.q_stride[2],
                      a_.q_stride[2], w.count / plan_.share, plan_.share * a_.dim * size_};
    next.share = (std::max(count, next.queries.left) + tiles - 1) / tiles;
    return next;
  }

  void attend(Worker& w, int64_t unit) {
    choose(w, unit);
    Worker after = w;  // most likely this thread's next unit
    if (unit + plan_.workers < plan_.units) choose(after, unit + plan_.workers);
    start(w);
    Tile t;
    t.dim = a_.dim;
    t.width = plan_.width;
    t.value_width = plan_.value_width;
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const float* values = nullptr;
      int64_t stride = 0;
      const bool last = block + 1 == plan_.blocks;
      Ahead next = last ? ahead(after, 0, true, w.tiles) : ahead(w, block + 1, false, w.tiles);
      for (int tile = 0; tile < w.tiles; ++tile) {
        const VisibleKeys seen = seen_by(w, tile, block);
        if (last || seen.begin != seen.end) next.fetch();
        if (seen.begin == seen.end) continue;
        if (values == nullptr) values = make_ready(w, block, stride);
        const int64_t row = int64_t(tile) * kRows;
        t.q = w.q + row * plan_.width;
        t.out = w.out + row * plan_.value_width;
        t.totals = w.totals + row * kTile;
        t.largest = w.largest + tile * kTile;
        t.score(w.keys, seen);
        if (!seen.plain) hide(t, w, tile, block, seen);
        t.weigh(seen);
        t.add_values(values, stride, seen);
      }
    }
    write(w);
  }

  // Queries, scaled; rows that fill the last tile are like the last row, with zeros for a query.
  void start(Worker& w) const {
    const int64_t padded = int64_t(w.tiles) * kRows;
    std::memset(w.out, 0, size_t(padded * plan_.value_width) * 4);
    std::memset(w.totals, 0, size_t(padded) * kTile * 4);
    for (int64_t i = 0; i < w.tiles * kTile; ++i) w.largest[i] = kNever;
    for (int64_t r = 0; r < padded; ++r) {
      float* q = w.q + r * plan_.width;
      if (r >= w.count) {
        w.rows[r] = w.rows[r - 1];
        std::memset(q, 0, size_t(plan_.width) * 4);
        continue;
      }
      const int64_t query = (w.first + r) / plan_.share, head = w.kv_head * plan_.share + (w.first + r) % plan_.share;
      Row& row = w.rows[r] = {nullptr, nullptr, query, head};
      if (a_.mask != nullptr) {
        row.visible = visible_ + plan_.mask_row(a_, w.batch, head, query) * plan_.blocks;
        row.mask = a_.mask + w.batch * a_.mask_stride[0] + head * a_.mask_stride[1] + query * a_.mask_stride[2];
      }
      const char* from = a_.q + w.batch * a_.q_stride[0] + head * a_.q_stride[1] + query * a_.q_stride[2];
      for (int64_t d = 0; d < a_.dim; d += kTile) V::store(q + d, V::mul(load_some(from, d, a_.dim), V::set1(a_.scale)));
    }
  }

  // 16 values from `column` on, those past `columns` 0.
  F load_some(const char* row, int64_t column, int64_t columns) const {
    if (column + kTile <= columns) return V::load16(row + column * size_, a_.dtype);
    alignas(64) float values[kTile] = {};
    for (int64_t i = column; i < columns; ++i) values[i - column] = load_scalar(row, a_.dtype, i);
    return V::load(values);
  }

  VisibleKeys seen_by(const Row& row, int64_t block, int count) const {
    if (row.visible != nullptr) return row.visible[block];
    if (!a_.causal) return {0, uint8_t(count), true};
    const int64_t end = row.query + 1 - block * kKeyBlock;
    return {0, uint8_t(end < 0 ? 0 : min64(end, count)), true};
  }

  // What any row of a tile sees of a block; plain: all see the same, and nothing is added.
  VisibleKeys seen_by(const Worker& w, int tile, int64_t block) const {
    const int count = int(min64(kKeyBlock, a_.keys - block * kKeyBlock));
    const Row* row = w.rows + tile * kRows;
    VisibleKeys all = seen_by(row[0], block, count);
    for (int r = 1; r < kRows; ++r) {
      const VisibleKeys one = seen_by(row[r], block, count);
      all.plain = all.plain && one.plain && one.begin == all.begin && one.end == all.end;
      if (one.begin == one.end) continue;
      if (all.begin == all.end) {
        all.begin = one.begin, all.end = one.end;
        continue;
      }
      all.begin = one.begin < all.begin ? one.begin : all.begin;
      all.end = one.end > all.end ? one.end : all.end;
    }
    all.plain = all.plain && all.begin % kTile == 0 && all.end % kTile == 0;
    return all;
  }

  // Transposes the keys of a block and returns its values, as float32 with whole vectors, and the stride of their rows.
  const float* make_ready(Worker& w, int64_t block, int64_t& stride) const {
    const int64_t first = block * kKeyBlock;
    const int count = int(min64(kKeyBlock, a_.keys - first));
    const char* k = a_.k + w.batch * a_.k_stride[0] + w.kv_head * a_.k_stride[1] + first * a_.k_stride[2];
    const char* v = a_.v + w.batch * a_.v_stride[0] + w.kv_head * a_.v_stride[1] + first * a_.v_stride[2];
    for (int64_t d = 0; d < a_.dim; d += kTile)
      for (int key = 0; key < count; key += kTile) {
        F rows[kTile];
        for (int i = 0; i < kTile; ++i)
          rows[i] = key + i < count ? load_some(k + (key + i) * a_.k_stride[2], d, a_.dim) : V::set1(0.0f);
        float* to = w.keys + d * kKeyBlock + key;
        if (d + kTile <= a_.dim) {
          V::transpose(rows, to, kKeyBlock);
          continue;
        }
        alignas(64) float columns[kTile * kTile];
        V::transpose(rows, columns, kTile);
        for (int64_t i = d; i < a_.dim; ++i) V::store(to + (i - d) * kKeyBlock, V::load(columns + (i - d) * kTile));
      }
    if (a_.dtype == DType::kFloat32 && a_.value_dim == plan_.value_width && a_.v_stride[2] == a_.value_dim * 4) {
      stride = a_.value_dim;
      return reinterpret_cast<const float*>(v);
    }
    stride = plan_.value_width;
    for (int key = 0; key < count; ++key)
      for (int64_t d = 0; d < a_.value_dim; d += kTile)
        V::store(w.values + key * stride + d, load_some(v + key * a_.v_stride[2], d, a_.value_dim));
    return w.values;
  }

  // Adds what the mask adds to a row; scores of keys that it does not see become "never".
  void hide(Tile& t, const Worker& w, int tile, int64_t block, VisibleKeys seen) const {
    const int count = int(min64(kKeyBlock, a_.keys - block * kKeyBlock));
    for (int r = 0; r < kRows; ++r) {
      const Row& row = w.rows[tile * kRows + r];
      const VisibleKeys own = seen_by(row, block, count);
      if (!own.plain) add_mask(t.scores + r * kKeyBlock, row.mask + block * kKeyBlock * a_.mask_stride[3], own);
      t.hide(r, own, seen);
    }
  }

  void add_mask(float* score, const char* mask, VisibleKeys own) const {
    const int64_t step = a_.mask_stride[3];
    const bool dense = step == (a_.mask_is_bool ? 1 : int64_t(element_size(a_.mask_dtype)));
    int i = own.begin;
    for (; dense && i + kTile <= own.end; i += kTile) {
      const F x = V::load(score + i);
      if (a_.mask_is_bool) {
        const F seen = V::load_u8(reinterpret_cast<const uint8_t*>(mask) + i);
        V::store(score + i, V::select_less(V::set1(0.0f), seen, x, V::set1(kNever)));
      } else {
        V::store(score + i, V::add(x, V::load16(mask + i * step, a_.mask_dtype)));
      }
    }
    for (; i < own.end; ++i) score[i] += mask_value(a_, mask + i * step);
  }

  // A row that sees no key is 0.
  void write(const Worker& w) const {
    for (int r = 0; r < w.count; ++r) {
      const Row& row = w.rows[r];
      char* to = a_.out + w.batch * a_.out_stride[0] + row.head * a_.out_stride[1] + row.query * a_.out_stride[2];
      const float total = V::folded(V::load(w.totals + r * kTile));
      const F factor = V::set1(total == 0.0f ? 1.0f : 1.0f / total);
      for (int64_t d = 0; d < a_.value_dim; d += kTile) {
        const F y = V::mul(V::load(w.out + r * plan_.value_width + d), factor);
        if (d + kTile <= a_.value_dim) {
          V::store16(to + d * size_, a_.dtype, y);
          continue;
        }
        alignas(64) float lanes[kTile];
        V::store(lanes, y);
        for (int64_t i = d; i < a_.value_dim; ++i) store_scalar(to, a_.dtype, i, lanes[i - d]);
      }
    }
  }

  const Attention& a_;
  const ManyPlan plan_;
  const int64_t size_;  // bytes of an element
  VisibleKeys* const visible_;
  std::atomic<int64_t> next_{0};
};

}  // namespace
}  // namespace qcompile
