// How the work of an attention is divided, and where its parts lie in the scratch, whatever the instruction set.
#pragma once

#include "kernels.h"

namespace qcompile {

constexpr int kKeyBlock = 64;     // keys that an attention takes at a time
constexpr int kQueryRows = 16;    // query rows that share what is read of them, at most
constexpr int kRowFloats = 4096;  // values of these rows, at most: the widest head there may be
constexpr int kMostSplits = 16;   // parts of the keys that threads may take for themselves

// The keys of a block that some query sees, [begin, end); plain: all see all of them, and nothing is added.
struct VisibleKeys {
  uint8_t begin, end;
  bool plain;
};

// How an attention of few queries is divided. A row is one query of one head; a unit is a row block of one group of heads.
struct AttentionPlan {
  int64_t rows;  // of a group of heads that share keys
  int64_t width, value_width, row_block, row_blocks, units, blocks, splits;
  int64_t masks, mask_groups, mask_heads, mask_queries;  // how many differ, and how many rows each has
  size_t partial, bytes;  // scratch: VisibleKeys [masks, blocks], then at `partial` a state for each unit and split

  explicit AttentionPlan(const Attention& a) {
    auto pad = [](int64_t n) { return n <= kTile ? int64_t(kTile) : (n + kTile - 1) / kTile * kTile; };
    rows = a.kv_heads > 0 ? a.heads / a.kv_heads * a.queries : 0;
    width = pad(a.dim);
    value_width = pad(a.value_dim);
    const int64_t fit = kRowFloats / (width > value_width ? width : value_width);
    const int64_t most = fit < kQueryRows ? fit : kQueryRows;
    row_blocks = (rows + most - 1) / most;
    row_block = row_blocks > 0 ? (rows + row_blocks - 1) / row_blocks : 0;
    units = a.batch * a.kv_heads * row_blocks;
    blocks = (a.keys + kKeyBlock - 1) / kKeyBlock;
    splits = choose_splits(a.threads);
    const bool masked = a.mask != nullptr;
    mask_groups = masked && a.mask_stride[1] != 0 ? a.kv_heads : 1;
    mask_heads = masked && a.mask_stride[1] != 0 && a.kv_heads > 0 ? a.heads / a.kv_heads : 1;
    mask_queries = masked && a.mask_stride[2] != 0 ? a.queries : 1;
    masks = !masked ? 0 : mask_groups * (a.mask_stride[0] != 0 ? a.batch : 1);
    partial = (size_t(masks * blocks) * sizeof(VisibleKeys) + 63) / 64 * 64;
    bytes = partial + (splits > 1 ? size_t(units * splits * state()) * 4 : 0);
  }

  // Floats that a unit leaves of one split: the largest score and the sum of weights of each row, and the values.
  int64_t state() const { return 2 * kQueryRows + row_block * value_width; }

  // Which of the masks a group of heads reads.
  int64_t mask_index(const Attention& a, int64_t batch, int64_t kv_head) const {
    return (a.mask_stride[0] != 0 ? batch * mask_groups : 0) + (mask_groups > 1 ? kv_head : 0);
  }

 private:
  // As few as share the work well: each further one must save a twentieth.
  int64_t choose_splits(int threads) const {
    int64_t best = 1;
    auto share = [&](int64_t n) { return double((units * n + threads - 1) / threads) / double(n); };
    for (int64_t n = 2; n <= blocks && n <= kMostSplits; ++n)
      if (share(n) < 0.95 * share(best)) best = n;
    return best;
  }
};

constexpr int64_t kFewQueries = 16;  // with more the other kernel is faster
constexpr int64_t kTaskRows = 192;   // query rows for which a block of keys is made ready, at most
constexpr int64_t kTileRows = 6;     // what the rows of every register tile divide

// How an attention of many queries is divided. The rows of a group are ordered by query: the heads that share keys lie
// beside each other. A unit is a row block of one group; workers take one after another.
struct ManyPlan {
  int64_t share;  // heads that share keys
  int64_t rows, width, value_width, row_block, row_blocks, units, blocks, workers;
  int64_t mask_heads, mask_queries, mask_rows;         // how many differ; a mask row belongs to one query of one head
  size_t q, out, keys, values, totals, largest, rest;  // of a worker's scratch, in floats
  size_t worker, bytes;  // floats of a worker; in all: VisibleKeys [mask_rows, blocks], then the workers

  explicit ManyPlan(const Attention& a) {
    auto pad = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
    auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
    share = a.kv_heads > 0 ? a.heads / a.kv_heads : 0;
    rows = share * a.queries;
    width = pad(a.dim, kTile);
    value_width = pad(a.value_dim, kTile);
    blocks = (a.keys + kKeyBlock - 1) / kKeyBlock;
    const int64_t pairs = a.batch * a.kv_heads, widest = a.dim > value_width ? a.dim : value_width;
    // four units a thread, so that none waits long for the last one, unless that makes them too small to be worth while
    int64_t block = least(least(kTaskRows, 32768 / widest), pad(rows * pairs / (4 * a.threads) + 1, kTileRows));
    block = block < 4 * kTileRows ? least(4 * kTileRows, pad(32768 / widest, kTileRows)) : block / kTileRows * kTileRows;
    row_blocks = (rows + block - 1) / block;
    row_block = row_blocks > 0 ? pad((rows + row_blocks - 1) / row_blocks, kTileRows) : 0;
    row_blocks = row_block > 0 ? (rows + row_block - 1) / row_block : 0;
    units = pairs * row_blocks;
    const bool masked = a.mask != nullptr;
    mask_heads = masked && a.mask_stride[1] != 0 ? a.heads : 1;
    mask_queries = masked && a.mask_stride[2] != 0 ? a.queries : 1;
    mask_rows = !masked ? 0 : mask_heads * mask_queries * (a.mask_stride[0] != 0 ? a.batch : 1);
    const int64_t work = units * row_block * a.keys * (a.dim + a.value_dim) / 400000;
    workers = least(least(a.threads, units), 1 + work);
    size_t end = 0;
    auto take = [&](int64_t floats) {
      const size_t from = end;
      end += size_t(pad(floats, kTile));
      return from;
    };
    q = take(row_block * width);
    out = take(row_block * value_width);
    keys = take(a.dim * kKeyBlock);
    values = take(kKeyBlock * value_width);
    totals = take(row_block * kTile);
    largest = take(row_block * kTile);
    rest = take(row_block * 8);
    worker = end;
    bytes = visible_bytes() + size_t(workers) * worker * 4;
  }

  size_t visible_bytes() const { return (size_t(mask_rows * blocks) * sizeof(VisibleKeys) + 63) / 64 * 64; }
  // The row of the mask that a query of a head reads.
  int64_t mask_row(const Attention& a, int64_t batch, int64_t head, int64_t query) const {
    const int64_t b = a.mask_stride[0] != 0 ? batch : 0, h = mask_heads > 1 ? head : 0, m = mask_queries > 1 ? query : 0;
    return (b * mask_heads + h) * mask_queries + m;
  }
};

inline bool many_queries(const Attention& a) { return a.causal || a.queries > kFewQueries; }
inline size_t attention_scratch(const Attention& a) { return many_queries(a) ? ManyPlan(a).bytes : AttentionPlan(a).bytes; }

}  // namespace qcompile
