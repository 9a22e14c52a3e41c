// AVX2 + FMA + F16C: 16 lanes are two 256-bit registers. What isa_avx2.cpp and isa_avxvnni.cpp share.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace qcompile {
namespace {

struct Avx2 {
  static constexpr int kRows = 4;  // rows of activations in the register tile
  static constexpr int kFloatRows = 6;  // of float activations
  static constexpr int dot_kind(int bits) { return bits <= 4 ? 4 : bits <= 6 ? 6 : 8; }  // narrow codes have faster products
  static constexpr bool kUnpackFirst = true;  // shifts and masks cost more than the loads of bytes
  static constexpr int kReadyTiles = 1;  // that many rows meet at a time (many.h)
  static constexpr bool has_ready(int bits) { return bits == 8; }  // narrow codes have faster products
  static constexpr int kReadyBlocks = 20;  // 20 KiB: most of half an L1 cache
  static constexpr bool kReadyUnsigned = false;
  static constexpr int kManyRows = 4;
  static constexpr int64_t kRowBlockBytes = 256 << 10;  // activations of a row block stay in the L2 cache
  static constexpr int kPrefetch = 4096;  // bytes ahead
  static constexpr int64_t kThreadWork = 200000;  // multiply-adds of several rows that are worth waking a thread for
  static constexpr int kTileRows = 6, kTileVectors = 1;  // of an attention of many queries
  static constexpr int kColumns = 4;  // of a depthwise convolution's row
  static constexpr bool kQuads = false;
  static constexpr bool kRoundsFour = false;
  struct F {
    __m256 a, b;
  };
  struct Cell {
    __m256i a, b;
  };

  static F set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F fnma(F x, F y, F z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
  static F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static F round(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
  }
  static F times_exp2(F x, F n) { return mul(x, {exp2_half(n.a), exp2_half(n.b)}); }
  static F reciprocal(F x) { return div(set1(1.0f), x); }
  static F select_less(F x, F y, F yes, F no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
  }

  static F load16(const char* p, DType t) {
    if (t == DType::kFloat32) return load(reinterpret_cast<const float*>(p));
    const __m128i lo = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i hi = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
    if (t == DType::kFloat16) return {_mm256_cvtph_ps(lo), _mm256_cvtph_ps(hi)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(lo), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(hi), 16))};
  }
  static void store16(char* p, DType t, F v) {
    if (t == DType::kFloat32) return store(reinterpret_cast<float*>(p), v);
    const bool half = t == DType::kFloat16;
    const __m128i lo = half ? _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT) : bfloat16_half(v.a);
    const __m128i hi = half ? _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT) : bfloat16_half(v.b);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), lo);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), hi);
  }
  // The first `count` (below 16) of 16 values, the rest 0; and the same for a store.
  static F load_first(const char* p, DType t, int count) {
    if (t == DType::kFloat32) {
      const auto* q = reinterpret_cast<const float*>(p);
      return {_mm256_maskload_ps(q, first(count)), _mm256_maskload_ps(q + 8, first(count - 8))};
    }
    alignas(32) uint16_t values[kTile] = {};
    std::memcpy(values, p, size_t(count) * 2);
    return load16(reinterpret_cast<const char*>(values), t);
  }
  static void store_first(char* p, DType t, F v, int count) {
    if (t == DType::kFloat32) {
      auto* q = reinterpret_cast<float*>(p);
      _mm256_maskstore_ps(q, first(count), v.a);
      _mm256_maskstore_ps(q + 8, first(count - 8), v.b);
      return;
    }
    alignas(32) char values[2 * kTile];
    store16(values, t, v);
    std::memcpy(p, values, size_t(count) * 2);
  }
  static F load_u8(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)))};
  }

  // 16 int8 as floats, and floats within +-127 rounded to int8; NaN becomes -128.
  static F load_i8(const int8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
  }
  static void store_i8(int8_t* p, F v) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
    const __m128i lo = _mm256_castsi256_si128(words), hi = _mm256_extracti128_si256(words, 1);
    // packs work in 128-bit halves: each holds four of a, then four of b
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi32(_mm_packs_epi16(lo, hi), 0xd8));
  }

  // Four times 16 floats, of whole numbers of 32 bits once rounded, as codes that saturate; those within bounds; 16 of them.
  static Cell round_codes(F a, F b, F c, F d) { return {two_rounded(a, b), two_rounded(c, d)}; }
  static Cell bound_codes(Cell c, Cell low, Cell high) {
    return {_mm256_max_epi8(low.a, _mm256_min_epi8(high.a, c.a)), _mm256_max_epi8(low.b, _mm256_min_epi8(high.b, c.b))};
  }
  template <int i>
  static void store_quarter(int8_t* p, Cell c) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_extracti128_si256(i < 2 ? c.a : c.b, i % 2));
  }

  // For float8 (floats.h). p[0] and p[1] in turns.
  static F set2(const float* p) {
    double both;
    std::memcpy(&both, p, 8);
    const __m256 v = _mm256_castpd_ps(_mm256_set1_pd(both));
    return {v, v};
  }
  // Bytes 0 and 2, or 1 and 3, of each lane as the high half of 16 bits, with four bits of exponent shifted down under the sign.
  template <bool kOdd, bool kFourBits>
  static Cell halves(Cell c) { return {halves_of<kOdd, kFourBits>(c.a), halves_of<kOdd, kFourBits>(c.b)}; }
  // 32 float16, of 8 rows and 8 rows.
  static void widen_halves(Cell h, F& lo, F& hi) {
    lo = {_mm256_cvtph_ps(_mm256_castsi256_si128(h.a)), _mm256_cvtph_ps(_mm256_extracti128_si256(h.a, 1))};
    hi = {_mm256_cvtph_ps(_mm256_castsi256_si128(h.b)), _mm256_cvtph_ps(_mm256_extracti128_si256(h.b, 1))};
  }
  // Of 16 rows with two values each, the first and the second.
  static void unzip(F lo, F hi, F& first, F& second) {
    auto part = [](__m256 a, __m256 b, auto select) {
      const __m256 mixed = _mm256_shuffle_ps(a, b, decltype(select)::value);
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
    };
    const std::integral_constant<int, 0x88> even{};
    const std::integral_constant<int, 0xdd> odd{};
    first = {part(lo.a, lo.b, even), part(hi.a, hi.b, even)};
    second = {part(lo.a, lo.b, odd), part(hi.a, hi.b, odd)};
  }
  static Cell fill_bytes(uint8_t v) { return {_mm256_set1_epi8(char(v)), _mm256_set1_epi8(char(v))}; }
  static Cell add_bytes(Cell c, Cell d) { return {_mm256_add_epi8(c.a, d.a), _mm256_add_epi8(c.b, d.b)}; }
  static Cell max_bytes(Cell c, Cell d) { return {_mm256_max_epu8(c.a, d.a), _mm256_max_epu8(c.b, d.b)}; }
  using Bytes = __m256i;  // the largest bytes so far, whatever the row
  static Bytes no_bytes() { return _mm256_setzero_si256(); }
  static Bytes max_bytes(Bytes m, Cell c) { return _mm256_max_epu8(_mm256_max_epu8(m, c.a), c.b); }
  static bool has_byte(Bytes m, uint8_t v) { return _mm256_movemask_epi8(_mm256_cmpeq_epi8(m, _mm256_set1_epi8(char(v)))) != 0; }
  // NaN where a byte of a lane is v, else 0.
  static F nan_where(Cell c, uint8_t v) {
    const __m256i value = _mm256_set1_epi8(char(v)), none = _mm256_setzero_si256(), all = _mm256_set1_epi8(-1);
    auto lanes = [&](__m256i x) {
      return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_cmpeq_epi32(_mm256_cmpeq_epi8(x, value), none), all));
    };
    return {lanes(c.a), lanes(c.b)};
  }

  // The sum of each of 16 rows of 16.
  static F row_sums(const float* p) { return {eight_sums(p), eight_sums(p + 8 * kTile)}; }

  static float largest(F x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_shuffle_ps(r, r, 1)));
  }
  // The sum of 16 lanes, by adding halves.
  static float folded(F x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_shuffle_ps(r, r, 1)));
  }
  // 16 rows of 16 become columns.
  static void transpose(const F* row, float* out, int64_t stride) {
    for (int i = 0; i < 16; i += 8) {
      __m256 eight[8];
      for (int j = 0; j < 8; ++j) eight[j] = row[i + j].a;
      transpose_eight(eight, out + i, stride);
      for (int j = 0; j < 8; ++j) eight[j] = row[i + j].b;
      transpose_eight(eight, out + 8 * stride + i, stride);
    }
  }

  static Cell load_cell(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store_cell(uint8_t* p, Cell c) {
    auto* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, c.a);
    _mm256_storeu_si256(q + 1, c.b);
  }
  // kBits bits of each byte, from bit kFrom on, to bit kTo.
  template <int kBits, int kFrom, int kTo>
  static Cell extract(Cell c) {
    if constexpr (kBits == 8) return c;
    if constexpr (kFrom > kTo) c = {_mm256_srli_epi16(c.a, kFrom - kTo), _mm256_srli_epi16(c.b, kFrom - kTo)};
    if constexpr (kFrom < kTo) c = {_mm256_slli_epi16(c.a, kTo - kFrom), _mm256_slli_epi16(c.b, kTo - kFrom)};
    const __m256i mask = _mm256_set1_epi8(((1 << kBits) - 1) << kTo);
    return {_mm256_and_si256(c.a, mask), _mm256_and_si256(c.b, mask)};
  }
  static Cell merge(Cell c, Cell d) { return {_mm256_or_si256(c.a, d.a), _mm256_or_si256(c.b, d.b)}; }
  // The 4 columns of a cell as floats.
  static void widen(Cell c, F* u) {
    const __m256i mask = _mm256_set1_epi32(0xff);
    u[0] = {_mm256_cvtepi32_ps(_mm256_and_si256(c.a, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(c.b, mask))};
    u[1] = {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.a, 8), mask)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.b, 8), mask))};
    u[2] = {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.a, 16), mask)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.b, 16), mask))};
    u[3] = {_mm256_cvtepi32_ps(_mm256_srli_epi32(c.a, 24)), _mm256_cvtepi32_ps(_mm256_srli_epi32(c.b, 24))};
  }

  static uint32_t largest_magnitude(F lo, F hi) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    auto bits = [&](__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), magnitude); };
    const __m256i m = _mm256_max_epi32(_mm256_max_epi32(bits(lo.a), bits(lo.b)), _mm256_max_epi32(bits(hi.a), bits(hi.b)));
    __m128i r = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(r));
  }
  // 32 values times `factor`, rounded, to int8; returns their sum. The products are within +-127.
  static int32_t quantize(F lo, F hi, float factor, int8_t* out) {
    const __m256 f = _mm256_set1_ps(factor);
    auto round = [&](__m256 v) { return _mm256_cvtps_epi32(_mm256_mul_ps(v, f)); };
    const __m256i ab = _mm256_packs_epi32(round(lo.a), round(lo.b)), cd = _mm256_packs_epi32(round(hi.a), round(hi.b));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work in 128-bit halves
    const __m256i q = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), q);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m128i r = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0x4e));
    r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0xb1));
    return _mm_cvtsi128_si32(r);
  }

  static __m256i broadcast4(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }

  // For many.h.
  struct Int {
    __m256i a, b;
  };
  static Int no_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Int load_int(const int32_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store_int(int32_t* p, Int v) {
    auto* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, v.a);
    _mm256_storeu_si256(q + 1, v.b);
  }
  static Int negative(Int v) {
    return {_mm256_sub_epi32(_mm256_setzero_si256(), v.a), _mm256_sub_epi32(_mm256_setzero_si256(), v.b)};
  }
  static F to_float(Int v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static Cell sub_bytes(Cell c, Cell d) { return {_mm256_sub_epi8(c.a, d.a), _mm256_sub_epi8(c.b, d.b)}; }
  // Signed weights as |w| and, where w is negative, a mask.
  struct Ready {
    Cell magnitude, negative;
  };
  static Ready make_ready(Cell w) {
    const __m256i none = _mm256_setzero_si256();
    return {{_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)}, {_mm256_cmpgt_epi8(none, w.a), _mm256_cmpgt_epi8(none, w.b)}};
  }
  static void store_ready(uint8_t* p, const Ready& w) {
    store_cell(p, w.magnitude);
    store_cell(p + 64, w.negative);
  }
  static Ready load_ready(const uint8_t* p) { return {load_cell(p), load_cell(p + 64)}; }
  // |w| times x, or times -x - 1 where w is negative: pairs stay within 2 * 128 * 128 = 2^15, which only -2^15 reaches. Changing
  // all bits costs less than vpsignb, which takes turns with the multiplications.
  static Int add_product(Int sum, __m256i four, const Ready& w) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i a = _mm256_maddubs_epi16(w.magnitude.a, _mm256_xor_si256(four, w.negative.a));
    const __m256i b = _mm256_maddubs_epi16(w.magnitude.b, _mm256_xor_si256(four, w.negative.b));
    sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(a, ones));
    sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(b, ones));
    pin(sum.a, sum.b);
    return sum;
  }

  // Keeps the sums in registers, in program order: left alone, GCC starts all products first and spills them.
  static void pin(__m256i& a, __m256i& b) { asm volatile("" : "+x"(a), "+x"(b)); }

  // Codes below 16: a 16-bit lane gathers the 16 products of a block, at most 16 * 15 * 127 = 30480.
  template <int kDot, int kDummy = 0>
  struct Dot {
    static constexpr float kBias = 0.0f;
    static constexpr bool kWide = false;  // a sum holds one block
    struct Acc {
      __m256i a, b;
    };
    static Acc zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Cell prepare(Cell c) { return c; }
    static void step(Acc& acc, const Cell& c, const int8_t* x) {
      const __m256i four = broadcast4(x);
      acc.a = _mm256_add_epi16(acc.a, _mm256_maddubs_epi16(c.a, four));
      acc.b = _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(c.b, four));
      pin(acc.a, acc.b);
    }
    static void begin(Acc& acc, const Cell& c, const int8_t* x) {
      const __m256i four = broadcast4(x);
      acc = {_mm256_maddubs_epi16(c.a, four), _mm256_maddubs_epi16(c.b, four)};
      pin(acc.a, acc.b);
    }
    static F finish(const Acc& acc) {
      const __m256i ones = _mm256_set1_epi16(1);
      return {_mm256_cvtepi32_ps(_mm256_madd_epi16(acc.a, ones)), _mm256_cvtepi32_ps(_mm256_madd_epi16(acc.b, ones))};
    }
    // the sum of blocks, in 32 bits
    static void collect(Acc& sum, const Acc& acc) {
      const __m256i ones = _mm256_set1_epi16(1);
      sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(acc.a, ones));
      sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(acc.b, ones));
    }
    static F total(const Acc& sum) { return {_mm256_cvtepi32_ps(sum.a), _mm256_cvtepi32_ps(sum.b)}; }
  };

  // Codes below 64: a pair of products stays within 2 * 63 * 127 < 2^15.
  template <int kDummy>
  struct Dot<6, kDummy> {
    static constexpr float kBias = 0.0f;
    static constexpr bool kWide = true;  // a sum goes on from block to block
    struct Acc {
      __m256i a, b;
    };
    static Acc zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Cell prepare(Cell c) { return c; }
    static void step(Acc& acc, const Cell& c, const int8_t* x) {
      const __m256i four = broadcast4(x), ones = _mm256_set1_epi16(1);
      acc.a = _mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(c.a, four), ones));
      acc.b = _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(c.b, four), ones));
      pin(acc.a, acc.b);
    }
    static F finish(const Acc& acc) { return {_mm256_cvtepi32_ps(acc.a), _mm256_cvtepi32_ps(acc.b)}; }
  };

  // Any byte: read as w = u - 128, and |w| * (x with w's sign), whose pairs stay within 2 * 128 * 127 < 2^15.
  template <int kDummy>
  struct Dot<8, kDummy> {
    static constexpr float kBias = 128.0f;
    static constexpr bool kWide = true;  // a sum goes on from block to block
    struct Acc {
      __m256i a, b;
    };
    struct Prepared {
      Cell w, magnitude;
    };
    static Acc zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Prepared prepare(Cell c) {
      const __m256i top = _mm256_set1_epi8(char(0x80));
      const Cell w = {_mm256_xor_si256(c.a, top), _mm256_xor_si256(c.b, top)};
      return {w, {_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)}};
    }
    static void step(Acc& acc, const Prepared& p, const int8_t* x) {
      const __m256i four = broadcast4(x), ones = _mm256_set1_epi16(1);
      const __m256i a = _mm256_maddubs_epi16(p.magnitude.a, _mm256_sign_epi8(four, p.w.a));
      const __m256i b = _mm256_maddubs_epi16(p.magnitude.b, _mm256_sign_epi8(four, p.w.b));
      acc.a = _mm256_add_epi32(acc.a, _mm256_madd_epi16(a, ones));
      acc.b = _mm256_add_epi32(acc.b, _mm256_madd_epi16(b, ones));
      pin(acc.a, acc.b);
    }
    static F finish(const Acc& acc) { return {_mm256_cvtepi32_ps(acc.a), _mm256_cvtepi32_ps(acc.b)}; }
  };

  // Signed weights (codes.h), as Dot<8> does it.
  static constexpr int kSignedTiles = 1;
  struct Signed {
    static constexpr int8_t kZero = 0;  // what stands for an activation of 0
    using Acc = typename Dot<8>::Acc;
    using Prepared = typename Dot<8>::Prepared;
    static Acc zero() { return Dot<8>::zero(); }
    static Prepared prepare(Cell w) { return {w, {_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)}}; }
    static const int8_t* spread(const int8_t* x) { return x; }
    static void step(Acc& acc, const Prepared& w, const int8_t* x) { Dot<8>::step(acc, w, x); }
    static F finish(const Acc& acc) { return Dot<8>::finish(acc); }
  };
  // Activations none of which is negative: their products with any byte, two of them, stay within 2 * 127 * 128 < 2^15.
  struct Positive {
    static constexpr int8_t kZero = 0;
    using Acc = typename Dot<8>::Acc;
    using Prepared = Cell;
    static Acc zero() { return Dot<8>::zero(); }
    static Prepared prepare(Cell w) { return w; }
    static __m256i spread(const int8_t* x) { return broadcast4(x); }
    static void step(Acc& acc, const Cell& w, __m256i x) {
      const __m256i ones = _mm256_set1_epi16(1);
      acc.a = _mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w.a), ones));
      acc.b = _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w.b), ones));
      pin(acc.a, acc.b);
    }
    static F finish(const Acc& acc) { return Dot<8>::finish(acc); }
  };

 private:
  static __m256i two_rounded(F x, F y) {
    const __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(y.a), _mm256_cvtps_epi32(y.b));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work in 128-bit halves
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
  }
  template <bool kOdd, bool kFourBits>
  static __m256i halves_of(__m256i v) {
    if constexpr (!kOdd) v = _mm256_slli_epi16(v, 8);
    if constexpr (kFourBits) return _mm256_and_si256(_mm256_srai_epi16(v, 1), _mm256_set1_epi16(short(0xbf80)));
    return kOdd ? _mm256_and_si256(v, _mm256_set1_epi16(short(0xff00))) : v;
  }
  static __m256 eight_sums(const float* p) {
    __m256 fours[2];  // the sums of 4 rows, each half over its own lanes
    for (int i = 0; i < 2; ++i) {
      __m256 pairs[2];
      for (int j = 0; j < 2; ++j, p += 2 * kTile) {
        const __m256 a = _mm256_add_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
        const __m256 b = _mm256_add_ps(_mm256_loadu_ps(p + kTile), _mm256_loadu_ps(p + kTile + 8));
        pairs[j] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
      }
      const __m256d a = _mm256_castps_pd(pairs[0]), b = _mm256_castps_pd(pairs[1]);
      fours[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                         _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
  }
  static void transpose_eight(const __m256* row, float* out, int64_t stride) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        const __m256d a = _mm256_castps_pd(pairs[i + j]), b = _mm256_castps_pd(pairs[i + j + 2]);
        fours[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        fours[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
      }
    for (int i = 0; i < 4; ++i) {  // a half of fours[4 * j + i] is column i or 4 + i of 4 rows
      _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20));
      _mm256_storeu_ps(out + (4 + i) * stride, _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31));
    }
  }
  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256 exp2_half(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static __m128i bfloat16_half(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
};

}  // namespace
}  // namespace qcompile
