// Floats become int8 codes of one scale, an image whose channels lie together whatever it was.
#pragma once

#include "conv_args.h"
#include "lanes.h"
#include "finish.h"

namespace qcompile {
namespace {

// `count` floats that lie together.
template <class V>
inline void encode(const char* from, DType t, float factor, int64_t count, int8_t* to) {
  const typename V::F f = V::set1(factor), top = V::set1(127.0f), bottom = V::set1(-127.0f);
  const int64_t size = int64_t(element_size(t));
  for (int64_t i = 0; i < count; i += kTile) {
    const int some = int(count - i < kTile ? count - i : kTile);
    const typename V::F x = V::mul(load_some<V>(from + i * size, t, some), f);
    store_codes<V>(to + i, V::max(bottom, V::min(top, x)), some);  // in this order NaN stays NaN
  }
}

// The strides of such an image.
inline Window together(Window v) {
  v.x_channel = 1;
  v.x_at[1] = v.channels;
  v.x_at[0] = v.size[1] * v.channels;
  v.x_batch = v.size[0] * v.x_at[0];
  return v;
}

template <class V>
class EncodeImage {
 public:
  EncodeImage(const Image& a, int8_t* out) : a_(a), v_(a.window), out_(out), factor_(1.0f / a.x_scale) {}

  void run() {
    const int64_t row = v_.size[1] * v_.channels;
    a_.parallel(v_.batch * v_.size[0], 1 + 32768 / (row + 1), [](int64_t begin, int64_t end, void* self) {
      for (int64_t i = begin; i < end; ++i) static_cast<EncodeImage*>(self)->row(i);
    }, this);
  }

 private:
  static constexpr int kColumns = 64;

  void row(int64_t i) const {
    const int64_t size = int64_t(element_size(a_.dtype));
    const char* from = a_.x + (i / v_.size[0] * v_.x_batch + i % v_.size[0] * v_.x_at[0]) * size;
    int8_t* to = out_ + i * v_.size[1] * v_.channels;
    if (v_.x_channel == 1 && v_.x_at[1] == v_.channels)
      return encode<V>(from, a_.dtype, factor_, v_.size[1] * v_.channels, to);
    if (v_.x_channel == 1) {
      for (int64_t c = 0; c < v_.size[1]; ++c)
        encode<V>(from + c * v_.x_at[1] * size, a_.dtype, factor_, v_.channels, to + c * v_.channels);
      return;
    }
    for (int64_t column = 0; column < v_.size[1]; column += kColumns) {
      const int64_t count = v_.size[1] - column < kColumns ? v_.size[1] - column : kColumns;
      const char* at = from + column * v_.x_at[1] * size;
      v_.channels <= 4 ? few(at, count, to + column * v_.channels) : many(at, count, to + column * v_.channels);
    }
  }

  // A channel of some columns.
  void plane(const char* from, int64_t count, int8_t* codes) const {
    if (v_.x_at[1] == 1) return encode<V>(from, a_.dtype, factor_, count, codes);
    alignas(64) float values[kColumns];
    for (int64_t k = 0; k < count; ++k) values[k] = load_scalar(from, a_.dtype, k * v_.x_at[1]);
    encode<V>(reinterpret_cast<const char*>(values), DType::kFloat32, factor_, count, codes);
  }

  void many(const char* from, int64_t count, int8_t* to) const {
    int8_t codes[kColumns];
    for (int64_t c = 0; c < v_.channels; ++c) {
      plane(from + c * v_.x_channel * int64_t(element_size(a_.dtype)), count, codes);
      for (int64_t k = 0; k < count; ++k) to[k * v_.channels + c] = codes[k];
    }
  }

  // All channels of a column in one word.
  void few(const char* from, int64_t count, int8_t* to) const {
    int8_t codes[4][kColumns] = {};
    for (int64_t c = 0; c < v_.channels; ++c)
      plane(from + c * v_.x_channel * int64_t(element_size(a_.dtype)), count, codes[c]);
    uint32_t words[kColumns];
    for (int k = 0; k < kColumns; ++k)
      words[k] = uint32_t(uint8_t(codes[0][k])) | uint32_t(uint8_t(codes[1][k])) << 8 |
                 uint32_t(uint8_t(codes[2][k])) << 16 | uint32_t(uint8_t(codes[3][k])) << 24;
    const int64_t channels = v_.channels;
    for (int64_t k = 0; k + 1 < count; ++k, to += channels) std::memcpy(to, words + k, 4);  // the next one follows
    std::memcpy(to, words + count - 1, size_t(channels));
  }

  const Image& a_;
  const Window& v_;
  int8_t* out_;
  const float factor_;
};

}  // namespace
}  // namespace qcompile
