// Rows of a tiled weight as floats: the embedding lookup, and the whole matrix.
#pragma once

#include "half.h"
#include "tile.h"

namespace qcompile {
namespace {

template <class V>
void decode_row(const Weight& w, int64_t row, DType t, char* out) {
  using F = typename V::F;
  const int64_t tile = row / kTile, lane = row % kTile, size = int64_t(element_size(t));
  const char* scales = static_cast<const char*>(w.scale);
  for_each_block(w, [&](int64_t g, int64_t b, int64_t column, int valid) {
    const uint8_t* cells = w.codes + (tile * w.blocks + b) * 64 * w.bits + lane * 4;
    alignas(64) uint8_t codes[kBlock];
    for (int chunk = 0; chunk < 8; ++chunk) {
      uint32_t value = 0;
      for (int to = 0; to < w.bits;) {
        const Piece p = piece(w.bits, chunk, to);
        uint32_t four;
        std::memcpy(&four, cells + 64 * p.cell, 4);
        value |= ((four >> p.from) & (0x01010101u * ((1u << p.width) - 1))) << to;
        to += p.width;
      }
      std::memcpy(codes + 4 * chunk, &value, 4);
    }
    const int64_t at = (tile * w.groups + g) * kTile + lane;
    const F scale = V::set1(load_scalar(scales, w.scale_dtype, at));
    float z = float(1 << (w.bits - 1));
    if (w.zero_kind == Zero::kCode) z = float(static_cast<const uint8_t*>(w.zero)[at]);
    if (w.zero_kind == Zero::kShift) z = load_scalar(static_cast<const char*>(w.zero), w.scale_dtype, at);
    const F zero = V::set1(z);
    F value[2];
    alignas(64) uint16_t halves[kBlock];
    if (w.code != Code::kInteger)
      for (int i = 0; i < kBlock; ++i) halves[i] = float8_half(w.code, codes[i]);
    for (int i = 0; i < 2; ++i) {
      if (w.code != Code::kInteger) {
        const F u = V::load16(reinterpret_cast<const char*>(halves + 16 * i), DType::kFloat16);
        value[i] = V::mul(V::mul(u, V::set1(float8_factor(w.code))), scale);
        continue;
      }
      const F u = V::load_u8(codes + 16 * i);
      value[i] = w.zero_kind == Zero::kShift ? V::add(V::mul(u, scale), zero) : V::mul(V::sub(u, zero), scale);
    }
    char* to = out + column * size;
    if (valid == kBlock) {
      V::store16(to, t, value[0]);
      V::store16(to + 16 * size, t, value[1]);
      return;
    }
    alignas(64) float values[kBlock];
    V::store(values, value[0]);
    V::store(values + 16, value[1]);
    for (int i = 0; i < valid; ++i) store_scalar(to, t, i, values[i]);
  });
}

template <class V>
void decode(const Decode& a) {
  a.parallel(a.count, 1 + 32768 / (a.w.cols + 1), [](int64_t begin, int64_t end, void* context) {
    const Decode& d = *static_cast<const Decode*>(context);
    for (int64_t i = begin; i < end; ++i) {
      int64_t row = i;
      if (d.indices != nullptr)
        row = d.wide_indices ? static_cast<const int64_t*>(d.indices)[i] : static_cast<const int32_t*>(d.indices)[i];
      decode_row<V>(d.w, row, d.dtype, d.out + i * d.w.cols * int64_t(element_size(d.dtype)));
    }
  }, const_cast<Decode*>(&a));
}

}  // namespace
}  // namespace qcompile
