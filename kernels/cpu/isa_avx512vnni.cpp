// AVX-512 (F, BW, VL, DQ) with VNNI: 16 lanes are one 512-bit register.
#include <immintrin.h>

#include "attention.h"
#include "chain.h"
#include "conv.h"
#include "conv_codes.h"
#include "decode.h"
#include "depthwise.h"
#include "encode.h"
#include "linear.h"

namespace qcompile {
namespace {

struct Avx512Vnni {
  static constexpr int kRows = 8;
  static constexpr int kFloatRows = 12;  // of float activations
  static constexpr int dot_kind(int) { return 8; }  // one product for codes of any width
  static constexpr bool kUnpackFirst = false;  // loads are what limits the product
  static constexpr int kReadyTiles = 2;  // that many rows meet at a time (many.h)
  static constexpr bool has_ready(int) { return true; }
  static constexpr int kReadyBlocks = 16;  // of all tiles at a time: with x and totals, no more than an L1 cache holds
  static constexpr bool kReadyUnsigned = true;  // codes are ready as they are
  static constexpr int kManyRows = 6;
  static constexpr int64_t kRowBlockBytes = 512 << 10;
  static constexpr int kPrefetch = 8192;
  static constexpr int64_t kThreadWork = 400000;  // multiply-adds of several rows that are worth waking a thread for
  static constexpr int kTileRows = 6, kTileVectors = 4;  // of an attention of many queries
  static constexpr int kColumns = 7;  // of a depthwise convolution's row
  using F = __m512;
  using Cell = __m512i;

  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F x, F y) { return _mm512_add_ps(x, y); }
  static F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static F div(F x, F y) { return _mm512_div_ps(x, y); }
  static F min(F x, F y) { return _mm512_min_ps(x, y); }
  static F max(F x, F y) { return _mm512_max_ps(x, y); }
  static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static F fnma(F x, F y, F z) { return _mm512_fnmadd_ps(x, y, z); }
  static F abs(F x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F times_exp2(F x, F n) { return _mm512_scalef_ps(x, n); }
  // Of what is neither 0 nor infinite; off by a unit in the last place or two. A division keeps others waiting.
  static F reciprocal(F x) {
    const F r = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(1.0f)), r);
  }
  static F select_less(F x, F y, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), no, yes);
  }

  static F load16(const char* p, DType t) {
    if (t == DType::kFloat32) return _mm512_loadu_ps(p);
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (t == DType::kFloat16) return _mm512_cvtph_ps(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static void store16(char* p, DType t, F v) {
    if (t == DType::kFloat32) return _mm512_storeu_ps(p, v);
    const __m256i r = t == DType::kFloat16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : bfloat16(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), r);
  }
  // The first `count` (below 16) of 16 values, the rest 0; and the same for a store.
  static F load_first(const char* p, DType t, int count) {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if (t == DType::kFloat32) return _mm512_maskz_loadu_ps(mask, p);
    const __m256i v = _mm256_maskz_loadu_epi16(mask, p);
    if (t == DType::kFloat16) return _mm512_cvtph_ps(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static void store_first(char* p, DType t, F v, int count) {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if (t == DType::kFloat32) return _mm512_mask_storeu_ps(p, mask, v);
    const __m256i r = t == DType::kFloat16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : bfloat16(v);
    _mm256_mask_storeu_epi16(p, mask, r);
  }
  static F load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  // 16 int8 as floats, and floats within +-127 rounded to int8; NaN becomes -128.
  static F load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_i8(int8_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  // Four times 16 floats, of whole numbers of 32 bits once rounded, as codes that saturate; those within bounds; 16 of them.
  static Cell round_codes(F a, F b, F c, F d) {
    const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packs work in quarters
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
  }
  static Cell bound_codes(Cell c, Cell low, Cell high) { return _mm512_max_epi8(low, _mm512_min_epi8(high, c)); }
  template <int i>
  static void store_quarter(int8_t* p, Cell c) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_extracti32x4_epi32(c, i));
  }

  // For float8 (floats.h). p[0] and p[1] in turns.
  static F set2(const float* p) {
    double both;
    std::memcpy(&both, p, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  }
  // Bytes 0 and 2, or 1 and 3, of each lane as the high half of 16 bits, with four bits of exponent shifted down under the sign.
  template <bool kOdd, bool kFourBits>
  static Cell halves(Cell v) {
    if constexpr (!kOdd) v = _mm512_slli_epi16(v, 8);
    if constexpr (kFourBits) return _mm512_and_si512(_mm512_srai_epi16(v, 1), _mm512_set1_epi16(short(0xbf80)));
    return kOdd ? _mm512_and_si512(v, _mm512_set1_epi16(short(0xff00))) : v;
  }
  // 32 float16, of 8 rows and 8 rows.
  static void widen_halves(Cell h, F& lo, F& hi) {
    lo = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
    hi = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
  }
  // Of 16 rows with two values each, the first and the second.
  static void unzip(F lo, F hi, F& first, F& second) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    first = _mm512_permutex2var_ps(lo, even, hi);
    second = _mm512_permutex2var_ps(lo, _mm512_add_epi32(even, _mm512_set1_epi32(1)), hi);
  }
  static Cell fill_bytes(uint8_t v) { return _mm512_set1_epi8(char(v)); }
  static Cell add_bytes(Cell c, Cell d) { return _mm512_add_epi8(c, d); }
  static Cell max_bytes(Cell c, Cell d) { return _mm512_max_epu8(c, d); }
  using Bytes = Cell;
  static Bytes no_bytes() { return _mm512_setzero_si512(); }
  static bool has_byte(Bytes m, uint8_t v) { return _mm512_cmpeq_epi8_mask(m, fill_bytes(v)) != 0; }
  // NaN where a byte of a lane is v, else 0.
  static F nan_where(Cell c, uint8_t v) {
    const __m512i found = _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(c, fill_bytes(v)));
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(found, found), _mm512_set1_ps(bits_to_float(0x7fc00000u)));
  }

  // The sum of each of 16 rows of 16.
  static F row_sums(const float* p) {
    __m512 fours[4];  // the sums of 4 rows, each quarter over its own lanes
    for (int i = 0; i < 4; ++i) {
      __m512 pairs[2];
      for (int j = 0; j < 2; ++j, p += 2 * kTile) {
        const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + kTile);
        pairs[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
      }
      const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
      fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    auto halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 a = halves(fours[0], fours[1]), b = halves(fours[2], fours[3]);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }

  static float largest(F x) { return _mm512_reduce_max_ps(x); }
  // The sum of 16 lanes, by adding halves.
  static float folded(F x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_shuffle_ps(r, r, 1)));
  }
  // 16 rows of 16 become columns.
  static void transpose(const F* row, float* out, int64_t stride) {
    __m512 pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + j + 2]);
        fours[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        fours[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    for (int i = 0; i < 4; ++i) {  // a quarter of fours[4 * j + i] is column i, 4 + i, 8 + i or 12 + i of 4 rows
      const __m512 a = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0x88);
      const __m512 b = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0xdd);
      _mm512_storeu_ps(out + i * stride, _mm512_shuffle_f32x4(a, c, 0x88));
      _mm512_storeu_ps(out + (4 + i) * stride, _mm512_shuffle_f32x4(b, d, 0x88));
      _mm512_storeu_ps(out + (8 + i) * stride, _mm512_shuffle_f32x4(a, c, 0xdd));
      _mm512_storeu_ps(out + (12 + i) * stride, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
  }

  static Cell load_cell(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_cell(uint8_t* p, Cell c) { _mm512_storeu_si512(p, c); }
  // kBits bits of each byte, from bit kFrom on, to bit kTo.
  template <int kBits, int kFrom, int kTo>
  static Cell extract(Cell c) {
    if constexpr (kBits == 8) return c;
    if constexpr (kFrom > kTo) c = _mm512_srli_epi16(c, kFrom - kTo);
    if constexpr (kFrom < kTo) c = _mm512_slli_epi16(c, kTo - kFrom);
    return _mm512_and_si512(c, _mm512_set1_epi8(((1 << kBits) - 1) << kTo));
  }
  static Cell merge(Cell c, Cell d) { return _mm512_or_si512(c, d); }
  static void widen(Cell c, F* u) {
    const __m512i mask = _mm512_set1_epi32(0xff);
    u[0] = _mm512_cvtepi32_ps(_mm512_and_si512(c, mask));
    u[1] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(c, 8), mask));
    u[2] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(c, 16), mask));
    u[3] = _mm512_cvtepi32_ps(_mm512_srli_epi32(c, 24));
  }

  static uint32_t largest_magnitude(F lo, F hi) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    return uint32_t(_mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(lo), magnitude),
                                                             _mm512_and_si512(_mm512_castps_si512(hi), magnitude))));
  }
  static int32_t quantize(F lo, F hi, float factor, int8_t* out) {
    const __m512 f = _mm512_set1_ps(factor);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(lo, f)), b = _mm512_cvtps_epi32(_mm512_mul_ps(hi, f));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
  }
  // Four blocks of 32 values at once, their codes `step` bytes apart, their scales `scale_step` floats; and the sum of each
  // one's codes. False, and nothing is written, where a block is not finite, or tiny.
  static constexpr bool kRoundsFour = true;
  static bool quantize_four(const float* x, int8_t* codes, int64_t step, float* scale, int64_t scale_step, int32_t* sums) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512 v[8];
    __m512i most[4];
    for (int i = 0; i < 8; ++i) v[i] = _mm512_loadu_ps(x + kTile * i);
    for (int i = 0; i < 4; ++i)
      most[i] = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(v[2 * i]), magnitude),
                                 _mm512_and_si512(_mm512_castps_si512(v[2 * i + 1]), magnitude));
    const auto fold = [](__m512i a, __m512i b) {
      return _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const __m512i a = fold(most[0], most[1]), b = fold(most[2], most[3]);
    __m512i all = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));  // lanes are blocks
    all = _mm512_max_epi32(all, _mm512_shuffle_i32x4(all, all, 0x4e));
    all = _mm512_max_epi32(all, _mm512_shuffle_i32x4(all, all, 0xb1));
    const __m128i bits = _mm512_castsi512_si128(all);
    const __m128 largest = _mm_castsi128_ps(bits);
    if (_mm_cmp_epi32_mask(bits, _mm_set1_epi32(0x7f800000), _MM_CMPINT_NLT) != 0 ||
        _mm_cmp_ps_mask(largest, _mm_set1_ps(1e-36f), _CMP_LT_OQ) != 0)
      return false;
    alignas(16) float scales[4];
    _mm_store_ps(scales, _mm_div_ps(largest, _mm_set1_ps(127.0f)));
    const __m512 factors = _mm512_castps128_ps512(_mm_div_ps(_mm_set1_ps(127.0f), largest));
    for (int i = 0; i < 4; ++i) scale[i * scale_step] = scales[i];
    __m512i fours[2];
    for (int i = 0; i < 4; i += 2) {
      const __m512 f = _mm512_permutexvar_ps(_mm512_set1_epi32(i), factors);
      const __m512 g = _mm512_permutexvar_ps(_mm512_set1_epi32(i + 1), factors);
      const __m512* w = v + 2 * i;
      const Cell two =
          round_codes(_mm512_mul_ps(w[0], f), _mm512_mul_ps(w[1], f), _mm512_mul_ps(w[2], g), _mm512_mul_ps(w[3], g));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i * step), _mm512_castsi512_si256(two));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + (i + 1) * step), _mm512_extracti64x4_epi64(two, 1));
      fours[i / 2] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), two);
    }
    // of each quarter the sums of the first and of the second two; then of each half, which a block has
    __m512i sum = _mm512_add_epi32(_mm512_unpacklo_epi32(fours[0], fours[1]), _mm512_unpackhi_epi32(fours[0], fours[1]));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_i32x4(sum, sum, 0xb1));
    _mm_store_si128(reinterpret_cast<__m128i*>(sums),
                    _mm_unpacklo_epi32(_mm512_castsi512_si128(sum), _mm512_extracti32x4_epi32(sum, 2)));
    return true;
  }

  // For many.h.
  using Int = __m512i;
  static Int no_int() { return _mm512_setzero_si512(); }
  static Int load_int(const int32_t* p) { return _mm512_load_si512(p); }
  static void store_int(int32_t* p, Int v) { _mm512_store_si512(p, v); }
  static Int fill_int(uint32_t v) { return _mm512_set1_epi32(int32_t(v)); }
  static Int negative(Int v) { return _mm512_sub_epi32(_mm512_setzero_si512(), v); }
  static F to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static Cell sub_bytes(Cell c, Cell d) { return _mm512_sub_epi8(c, d); }
  static Cell broadcast4(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }
  using Ready = Cell;
  static Ready load_ready(const uint8_t* p) { return load_cell(p); }
  static Int add_product(Int sum, Cell x, Ready u) { return _mm512_dpbusd_epi32(sum, u, x); }
  static Int dot(Int sum, Cell u, Cell s) { return _mm512_dpbusd_epi32(sum, u, s); }

  // For depthwise_quads.h. The bytes of four rows of 64 side by side: of each 16, lanes of 4, in four parts.
  static constexpr bool kQuads = true;
  static void interleave(Cell a, Cell b, Cell c, Cell d, Cell* quads) {
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i more_ab = _mm512_unpackhi_epi8(a, b), more_cd = _mm512_unpackhi_epi8(c, d);
    quads[0] = _mm512_unpacklo_epi16(ab, cd);
    quads[1] = _mm512_unpackhi_epi16(ab, cd);
    quads[2] = _mm512_unpacklo_epi16(more_ab, more_cd);
    quads[3] = _mm512_unpackhi_epi16(more_ab, more_cd);
  }
  // Each lane moved up by a byte, the last of another's before it.
  static Cell shift_in(Cell c, Cell before) { return _mm512_or_si512(_mm512_slli_epi32(c, 8), _mm512_srli_epi32(before, 24)); }
  static F load_fours(const float* p) {
    const __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    const __m512 w = _mm512_insertf32x4(_mm512_insertf32x4(v, _mm_loadu_ps(p + 16), 1), _mm_loadu_ps(p + 32), 2);
    return _mm512_insertf32x4(w, _mm_loadu_ps(p + 48), 3);
  }
  // Four parts as codes of 64 that saturate.
  static Cell join_codes(F a, F b, F c, F d) {
    const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    return _mm512_packs_epi16(ab, _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d)));
  }
  static Cell min_signed(Cell c, Cell d) { return _mm512_min_epi8(c, d); }
  static Cell load_bytes(const int8_t* p, int count) { return _mm512_maskz_loadu_epi8((uint64_t(1) << count) - 1, p); }
  static void store_bytes(int8_t* p, Cell c, int count) { _mm512_mask_storeu_epi8(p, (uint64_t(1) << count) - 1, c); }

  // u8 x s8 summed by fours into 32 bits, without saturation, for every code width.
  template <int kDot>
  struct Dot {
    static constexpr float kBias = 0.0f;
    static constexpr bool kWide = true;  // a sum goes on from block to block
    using Acc = __m512i;
    static Acc zero() { return _mm512_setzero_si512(); }
    static Cell prepare(Cell c) { return c; }
    static void step(Acc& acc, const Cell& c, const int8_t* x) {
      int32_t four;
      std::memcpy(&four, x, 4);
      acc = _mm512_dpbusd_epi32(acc, c, _mm512_set1_epi32(four));
    }
    static F finish(const Acc& acc) { return _mm512_cvtepi32_ps(acc); }
  };

  // Signed weights (codes.h): activations are unsigned, 128 more than they are, which what sums begin with takes off again.
  static constexpr int kSignedTiles = 3;
  struct Signed {
    static constexpr int8_t kZero = -128;  // the byte 128
    using Acc = __m512i;
    using Prepared = Cell;
    static Acc zero() { return _mm512_setzero_si512(); }
    static Prepared prepare(Cell w) { return w; }
    static __m512i spread(const int8_t* x) {
      int32_t four;
      std::memcpy(&four, x, 4);
      return _mm512_set1_epi32(four);
    }
    static void step(Acc& acc, Cell w, __m512i x) { acc = _mm512_dpbusd_epi32(acc, x, w); }
    static F finish(Acc acc) { return _mm512_cvtepi32_ps(acc); }
    static Acc load(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void store_negative(int32_t* p, const Acc* four) {
      const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(four[0], four[1]), _mm512_add_epi32(four[2], four[3]));
      _mm512_storeu_si512(p, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
  };
  using Positive = Signed;  // of activations none of which is negative

 private:
  static __m256i bfloat16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, r, _mm512_set1_epi32(0x7fc0)));
  }
};

}  // namespace

const Kernels kAvx512Vnni = {"avx512vnni", linear<Avx512Vnni>, decode<Avx512Vnni>, encode<Avx512Vnni>, attention<Avx512Vnni>,
                             conv<Avx512Vnni>, conv_codes<Avx512Vnni>, depthwise<Avx512Vnni>, chain<Avx512Vnni>, norm<Avx512Vnni>};

}  // namespace qcompile
