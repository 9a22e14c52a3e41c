// 16-bit floats in software, rounded to nearest even: g++ 12 has none in C++.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace shim {

inline uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 5.9604644775390625e-8f;  // 2^-24
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float_to_half(float v) {
    const uint32_t u = bits_of(v);
    const uint16_t sign = u >> 16 & 0x8000;
    const float a = fabsf(v);
    if (v != v) return sign | 0x7e00;
    if (a >= 65520.0f) return sign | 0x7c00;
    if (a < 6.103515625e-5f) return sign | (uint16_t)nearbyintf(a * 16777216.0f);  // subnormal: units of 2^-24
    const uint32_t rounded = (u & 0x7fffffffu) + 0xfffu + (u >> 13 & 1);
    return sign | (uint16_t)((rounded >> 13) - (112 << 10));
}

inline float bfloat_to_float(uint16_t b) { return float_of((uint32_t)b << 16); }

inline uint16_t float_to_bfloat(float v) {
    const uint32_t u = bits_of(v);
    if (v != v) return 0x7fc0;
    return (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}

}  // namespace shim
