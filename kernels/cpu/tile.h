// The inner loops: MR rows of activations times one tile of 16 weight rows, over blocks [b0, b1).
// V is an instruction set (isa_*.cpp); m0 is the first row of a panel of MR; totals are 16 floats a row.
#pragma once

#include <utility>

#include "kernels.h"
#include "quantize.h"

namespace qcompile {
namespace {

// Blocks whose products, at most 32 * 255 * 127 each, are summed in 32 bits.
constexpr int64_t kWholeBlocks = 2048;

// The rows of a register tile: kRows, or for the last few the smallest power of two that holds them.
template <class V>
inline int64_t panel_width(int64_t rows) {
  int64_t width = V::kRows;
  while (width / 2 >= rows) width /= 2;
  return width;
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V>
struct GroupScale {
  using F = typename V::F;
  F scale, offset;

  // offset: what to subtract for each unit of the activations' sum, codes being read as u - bias.
  static GroupScale load(const Weight& w, int64_t tile, int64_t g, float bias) {
    const int64_t at = (tile * w.groups + g) * kTile;
    const int64_t bytes = int64_t(element_size(w.scale_dtype));
    GroupScale r;
    r.scale = V::load16(static_cast<const char*>(w.scale) + at * bytes, w.scale_dtype);
    switch (w.zero_kind) {
      case Zero::kMiddle:
        r.offset = V::mul(r.scale, V::set1(float(1 << (w.bits - 1)) - bias));
        break;
      case Zero::kCode:
        r.offset = V::mul(r.scale, V::sub(V::load_u8(static_cast<const uint8_t*>(w.zero) + at), V::set1(bias)));
        break;
      case Zero::kShift: {
        const F shift = V::load16(static_cast<const char*>(w.zero) + at * bytes, w.scale_dtype);
        r.offset = V::fnma(r.scale, V::set1(bias), V::sub(V::set1(0.0f), shift));
        break;
      }
    }
    return r;
  }
};

// Some bits of a chunk of 4 columns: `width` of them, from bit `from` of each byte of a cell, which are the code's from `to` on.
struct Piece {
  int cell, from, to, width;
};

// The piece of a chunk that holds bit `to` of its codes and what follows. A byte holds as many whole codes as fit: chunk c
// lies in cell c % bits, at bit c / bits * bits. The chunks that are left are a stream through the bits that are left.
constexpr Piece piece(int bits, int chunk, int to) {
  const int whole = 8 / bits * bits, spare = 8 - whole;  // chunks, and also bits of a byte
  if (chunk < whole) return {chunk % bits, chunk / bits * bits, 0, bits};
  const int at = (chunk - whole) * bits + to, left = spare - at % spare;
  return {at / spare, whole + at % spare, to, left < bits - to ? left : bits - to};
}

// The chunks in an order that leaves a cell only when its whole codes have been taken.
constexpr int chunk_at(int bits, int i) {
  const int each = 8 / bits;
  return i < each * bits ? i / each + i % each * bits : i;
}

// The codes of 16 rows x 4 columns, a byte each.
template <class V, int kBits, int kChunk, int kTo = 0>
inline __attribute__((always_inline)) typename V::Cell load_chunk(const uint8_t* cells) {
  constexpr Piece p = piece(kBits, kChunk, kTo);
  const auto part = V::template extract<p.width, p.from, p.to>(V::load_cell(cells + 64 * p.cell));
  if constexpr (kTo + p.width == kBits)
    return part;
  else
    return V::merge(part, load_chunk<V, kBits, kChunk, kTo + p.width>(cells));
}

// For each chunk of 4 columns in a block, f(chunk, codes of 16 rows x 4 columns).
template <class V, int kBits, class Fn, int... i>
inline __attribute__((always_inline)) void for_each_chunk(const uint8_t* cells, Fn f, std::integer_sequence<int, i...>) {
  (f(chunk_at(kBits, i), load_chunk<V, kBits, chunk_at(kBits, i)>(cells)), ...);
}
template <class V, int kBits, class Fn>
inline __attribute__((always_inline)) void for_each_chunk(const uint8_t* cells, Fn f) {
  for_each_chunk<V, kBits>(cells, f, std::make_integer_sequence<int, 8>());
}

// Codes unpacked to a byte each, in cells as the 8-bit container has them. kFetch: unless the caller sees to what comes next.
template <class V, int kBits, bool kFetch = true>
void unpack_blocks(const uint8_t* cells, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, cells += 64 * kBits, out += 512) {
    // the blocks that are unpacked next time, while there is much to compute in between
    for (int j = 0; kFetch && j < kBits; ++j) __builtin_prefetch(cells + blocks * 64 * kBits + 64 * j);
    for_each_chunk<V, kBits>(cells, [&](int chunk, typename V::Cell c) { V::store_cell(out + 64 * chunk, c); });
  }
}

// A block times MR rows, added to sums; those that hold one block only are begun anew.
template <class V, int kBits, class Dot, int MR>
inline __attribute__((always_inline)) void times_block(const uint8_t* cells, const int8_t* x, int64_t ahead,
                                                       typename Dot::Acc* acc) {
  if (ahead != 0)
    for (int j = 0; j < kBits; ++j) __builtin_prefetch(cells + 64 * j + ahead);
  for_each_chunk<V, kBits>(cells, [&](int chunk, typename V::Cell c) __attribute__((always_inline)) {
    const auto prepared = Dot::prepare(c);
    for (int m = 0; m < MR; ++m) {
      const int8_t* four = x + m * kBlock + 4 * chunk;
      if constexpr (Dot::kWide)
        Dot::step(acc[m], prepared, four);
      else
        chunk == 0 ? Dot::begin(acc[m], prepared, four) : Dot::step(acc[m], prepared, four);
    }
  });
}

// As dot_quantized below, where a group is a block: no sums of groups are to be kept. Functions of their own, for their registers.
template <class V, int kBits, int kDot, int MR>
__attribute__((noinline)) void dot_blocks(const Weight& w, const Quantized& x, int64_t m0, int64_t tile, const uint8_t* cells,
                                          int64_t b0, int64_t b1, int64_t ahead, float* totals) {
  using F = typename V::F;
  using Dot = typename V::template Dot<kDot>;
  const int64_t at = m0 * w.blocks;
  F total[MR];
  for (int m = 0; m < MR; ++m) total[m] = V::load(totals + m * kTile);
  for (int64_t b = b0; b < b1; ++b, cells += 64 * kBits) {
    typename Dot::Acc acc[MR];
    if (Dot::kWide)
      for (int m = 0; m < MR; ++m) acc[m] = Dot::zero();
    times_block<V, kBits, Dot, MR>(cells, x.codes + (at + b * MR) * kBlock, ahead, acc);
    const GroupScale<V> s = GroupScale<V>::load(w, tile, b, Dot::kBias);
    for (int m = 0; m < MR; ++m) {
      total[m] = V::fma(V::mul(Dot::finish(acc[m]), V::set1(x.scale[at + b * MR + m])), s.scale, total[m]);
      total[m] = V::fnma(s.offset, V::set1(x.sums[at + b * MR + m]), total[m]);
    }
  }
  for (int m = 0; m < MR; ++m) V::store(totals + m * kTile, total[m]);
}

// int8 activations. kBits: how the cells are stored; kDot: which of the instruction set's products the codes take.
// kUniform: a row of activations has one scale, so that a group is summed in integers, in pieces that fit 32 bits.
// ahead: how many bytes further on to prefetch, 0 when the cells lie in a cache already.
template <class V, int kBits, int kDot, int MR, bool kUniform>
__attribute__((noinline)) void dot_quantized(const Weight& w, const Quantized& x, int64_t m0, int64_t tile,
                                             const uint8_t* cells, int64_t b0, int64_t b1, int64_t ahead, float* totals) {
  using F = typename V::F;
  using Dot = typename V::template Dot<kDot>;
  if constexpr (!kUniform)
    if (w.blocks_per_group == 1) return dot_blocks<V, kBits, kDot, MR>(w, x, m0, tile, cells, b0, b1, ahead, totals);
  const int8_t* codes = x.codes + m0 * w.blocks * kBlock;
  const float* scale = x.scale + m0 * w.blocks;
  const float* sums = x.sums + m0 * w.groups;
  F total[MR];
  for (int m = 0; m < MR; ++m) total[m] = V::load(totals + m * kTile);
  for (int64_t b = b0; b < b1;) {
    const int64_t g = b / w.blocks_per_group;
    const int64_t group_end = min64((g + 1) * w.blocks_per_group, w.blocks), end = min64(group_end, b1);
    F part[MR];
    for (int m = 0; m < MR; ++m) part[m] = V::set1(0.0f);
    const auto multiply = [&](typename Dot::Acc* acc) __attribute__((always_inline)) {
      times_block<V, kBits, Dot, MR>(cells, codes + b * MR * kBlock, ahead, acc);
      cells += 64 * kBits;
      ++b;
    };
    if constexpr (kUniform) {
      while (b < end) {
        const float* row_scale = scale + b * MR;
        const int64_t piece = min64(end, b + kWholeBlocks);
        typename Dot::Acc sum[MR];
        for (int m = 0; m < MR; ++m) sum[m] = Dot::zero();
        while (b < piece) {
          if constexpr (Dot::kWide) {
            multiply(sum);
          } else {
            typename Dot::Acc acc[MR];
            multiply(acc);
            for (int m = 0; m < MR; ++m) Dot::collect(sum[m], acc[m]);
          }
        }
        for (int m = 0; m < MR; ++m) {
          F total_of_piece;
          if constexpr (Dot::kWide)
            total_of_piece = Dot::finish(sum[m]);
          else
            total_of_piece = Dot::total(sum[m]);
          part[m] = V::fma(total_of_piece, V::set1(row_scale[m]), part[m]);
        }
      }
    } else {
      while (b < end) {
        const float* block_scale = scale + b * MR;
        typename Dot::Acc acc[MR];
        if (Dot::kWide)
          for (int m = 0; m < MR; ++m) acc[m] = Dot::zero();
        multiply(acc);
        for (int m = 0; m < MR; ++m) part[m] = V::fma(Dot::finish(acc[m]), V::set1(block_scale[m]), part[m]);
      }
    }
    const GroupScale<V> s = GroupScale<V>::load(w, tile, g, Dot::kBias);
    for (int m = 0; m < MR; ++m) {
      total[m] = V::fma(part[m], s.scale, total[m]);
      if (b == group_end) total[m] = V::fnma(s.offset, V::set1(sums[g * MR + m]), total[m]);
    }
  }
  for (int m = 0; m < MR; ++m) V::store(totals + m * kTile, total[m]);
}

}  // namespace
}  // namespace qcompile
