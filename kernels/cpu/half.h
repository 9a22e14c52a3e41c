// float16 and bfloat16, one value at a time. Internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace qcompile {
namespace {

inline float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

inline float from_bfloat16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

inline uint16_t to_bfloat16(float f) {
  const uint32_t b = float_to_bits(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;       // NaN stays NaN
  return uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);  // round to nearest even
}

inline float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into place the exponent is 112 too small; the multiplication also normalizes subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

inline uint16_t to_float16(float f) {
  const uint32_t b = float_to_bits(f), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u)  // subnormal: adding 0.5 lines the bits up and rounds to nearest even
    return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13));
}

// A float8 as the float16 that it is but for float8_factor().
inline uint16_t float8_half(Code code, uint8_t byte) {
  const uint16_t sign = uint16_t((byte & 0x80u) << 8), magnitude = byte & 0x7fu;
  switch (code) {
    case Code::kE4m3fn: return magnitude == 0x7f ? uint16_t(0x7e00) : uint16_t(sign | magnitude << 7);
    case Code::kE4m3fnuz: return byte == 0x80 ? uint16_t(0x7e00) : uint16_t(sign | magnitude << 7);
    default: return uint16_t(byte << 8);
  }
}

// What a float8's exponent bias lacks to that of float16.
constexpr float float8_factor(Code code) {
  return code == Code::kE4m3fn ? 256.0f : code == Code::kE4m3fnuz ? 128.0f : 1.0f;
}

inline float load_scalar(const char* p, DType t, int64_t i) {
  if (t == DType::kFloat32) {
    float f;
    std::memcpy(&f, p + 4 * i, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return t == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
}

inline void store_scalar(char* p, DType t, int64_t i, float f) {
  if (t == DType::kFloat32) {
    std::memcpy(p + 4 * i, &f, 4);
    return;
  }
  const uint16_t h = t == DType::kFloat16 ? to_float16(f) : to_bfloat16(f);
  std::memcpy(p + 2 * i, &h, 2);
}

}  // namespace
}  // namespace qcompile
