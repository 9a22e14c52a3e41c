// ARMv8.2 with the dot product (SDOT): 16 lanes are four 128-bit registers.
#include <arm_neon.h>

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

struct Neon {
  static constexpr int kRows = 4;
  static constexpr int kFloatRows = 6;  // of float activations
  static constexpr bool kUnpackFirst = true;  // shifts and masks cost more than the loads of bytes
  static constexpr int kReadyTiles = 0;
  static constexpr bool has_ready(int) { return false; }
  static constexpr bool kReadyUnsigned = false;
  static constexpr int kManyRows = 4;
  static constexpr int64_t kRowBlockBytes = 256 << 10;  // activations of a row block stay in the L2 cache
  static constexpr int kPrefetch = 2048;
  static constexpr int64_t kThreadWork = 400000;  // multiply-adds of several rows that are worth waking a thread for
  static constexpr int kTileRows = 6, kTileVectors = 1;  // of an attention of many queries
  static constexpr int kColumns = 4;  // of a depthwise convolution's row
  static constexpr bool kQuads = false;
  static constexpr bool kRoundsFour = false;
  struct F {
    float32x4_t v[4];
  };
  struct Cell {
    uint8x16_t v[4];
  };

  template <class Fn>
  static F each(Fn f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  template <class Fn>
  static Cell cells(Fn f) {
    return {{f(0), f(1), f(2), f(3)}};
  }

  static F set1(float v) { return each([&](int) { return vdupq_n_f32(v); }); }
  static F load(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
  static void store(float* p, const F& x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
  }
  static F add(const F& x, const F& y) { return each([&](int i) { return vaddq_f32(x.v[i], y.v[i]); }); }
  static F sub(const F& x, const F& y) { return each([&](int i) { return vsubq_f32(x.v[i], y.v[i]); }); }
  static F mul(const F& x, const F& y) { return each([&](int i) { return vmulq_f32(x.v[i], y.v[i]); }); }
  static F div(const F& x, const F& y) { return each([&](int i) { return vdivq_f32(x.v[i], y.v[i]); }); }
  // the second operand when one is NaN, as activations.h wants it
  static F min(const F& x, const F& y) { return select_less(x, y, x, y); }
  static F max(const F& x, const F& y) { return select_less(y, x, x, y); }
  static F fma(const F& x, const F& y, const F& z) { return each([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); }); }
  static F fnma(const F& x, const F& y, const F& z) { return each([&](int i) { return vfmsq_f32(z.v[i], x.v[i], y.v[i]); }); }
  static F abs(const F& x) { return each([&](int i) { return vabsq_f32(x.v[i]); }); }
  static F round(const F& x) { return each([&](int i) { return vrndnq_f32(x.v[i]); }); }
  static F times_exp2(const F& x, const F& n) { return mul(x, exp2_integer(n)); }
  static F reciprocal(const F& x) { return div(set1(1.0f), x); }
  static F exp2_integer(const F& n) {
    return each([&](int i) {
      return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23));
    });
  }
  static F select_less(const F& x, const F& y, const F& yes, const F& no) {
    return each([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), yes.v[i], no.v[i]); });
  }

  static F load16(const char* p, DType t) {
    if (t == DType::kFloat32) return load(reinterpret_cast<const float*>(p));
    const auto* q = reinterpret_cast<const uint16_t*>(p);
    return each([&](int i) {
      const uint16x4_t h = vld1_u16(q + 4 * i);
      return t == DType::kFloat16 ? vcvt_f32_f16(vreinterpret_f16_u16(h)) : vreinterpretq_f32_u32(vshll_n_u16(h, 16));
    });
  }
  static void store16(char* p, DType t, const F& x) {
    if (t == DType::kFloat32) return store(reinterpret_cast<float*>(p), x);
    auto* q = reinterpret_cast<uint16_t*>(p);
    for (int i = 0; i < 4; ++i)
      vst1_u16(q + 4 * i, t == DType::kFloat16 ? vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])) : bfloat16(x.v[i]));
  }
  // The first `count` (below 16) of 16 values, the rest 0; and the same for a store.
  static F load_first(const char* p, DType t, int count) {
    float values[kTile] = {};
    for (int i = 0; i < count; ++i) values[i] = load_scalar(p, t, i);
    return load(values);
  }
  static void store_first(char* p, DType t, const F& x, int count) {
    float values[kTile];
    store(values, x);
    for (int i = 0; i < count; ++i) store_scalar(p, t, i, values[i]);
  }
  static F load_u8(const uint8_t* p) {
    const uint8x16_t v = vld1q_u8(p);
    const uint16x8_t lo = vmovl_u8(vget_low_u8(v)), hi = vmovl_u8(vget_high_u8(v));
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(lo))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(lo))),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(hi))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(hi)))}};
  }

  // 16 int8 as floats, and floats within +-127 rounded to int8; NaN becomes -128.
  static F load_i8(const int8_t* p) {
    const int8x16_t v = vld1q_s8(p);
    const int16x8_t lo = vmovl_s8(vget_low_s8(v)), hi = vmovl_s8(vget_high_s8(v));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(lo))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(hi)))}};
  }
  static void store_i8(int8_t* p, const F& x) {
    int16x4_t words[4];
    for (int i = 0; i < 4; ++i)
      words[i] = vmovn_s32(vbslq_s32(vceqq_f32(x.v[i], x.v[i]), vcvtnq_s32_f32(x.v[i]), vdupq_n_s32(-128)));
    vst1q_s8(p, vcombine_s8(vmovn_s16(vcombine_s16(words[0], words[1])), vmovn_s16(vcombine_s16(words[2], words[3]))));
  }

  // Four times 16 floats, of whole numbers of 32 bits once rounded, as codes that saturate; those within bounds; 16 of them.
  static Cell round_codes(const F& a, const F& b, const F& c, const F& d) {
    const auto codes = [](const F& x) {
      int16x4_t words[4];
      for (int i = 0; i < 4; ++i) words[i] = vqmovn_s32(vcvtnq_s32_f32(x.v[i]));
      const int16x8_t lo = vcombine_s16(words[0], words[1]), hi = vcombine_s16(words[2], words[3]);
      return vreinterpretq_u8_s8(vcombine_s8(vqmovn_s16(lo), vqmovn_s16(hi)));
    };
    return {{codes(a), codes(b), codes(c), codes(d)}};
  }
  static Cell bound_codes(const Cell& c, const Cell& low, const Cell& high) {
    Cell r;
    for (int i = 0; i < 4; ++i) {
      const int8x16_t top = vminq_s8(vreinterpretq_s8_u8(high.v[i]), vreinterpretq_s8_u8(c.v[i]));
      r.v[i] = vreinterpretq_u8_s8(vmaxq_s8(vreinterpretq_s8_u8(low.v[i]), top));
    }
    return r;
  }
  template <int i>
  static void store_quarter(int8_t* p, const Cell& c) { vst1q_u8(reinterpret_cast<uint8_t*>(p), c.v[i]); }

  // For float8 (floats.h). p[0] and p[1] in turns.
  static F set2(const float* p) {
    const float32x2_t both = vld1_f32(p);
    return each([&](int) { return vcombine_f32(both, both); });
  }
  // Bytes 0 and 2, or 1 and 3, of each lane as the high half of 16 bits, with four bits of exponent shifted down under the sign.
  template <bool kOdd, bool kFourBits>
  static Cell halves(const Cell& c) {
    return cells([&](int i) {
      uint16x8_t v = vreinterpretq_u16_u8(c.v[i]);
      if constexpr (!kOdd) v = vshlq_n_u16(v, 8);
      if constexpr (kFourBits)
        v = vandq_u16(vreinterpretq_u16_s16(vshrq_n_s16(vreinterpretq_s16_u16(v), 1)), vdupq_n_u16(0xbf80));
      else if constexpr (kOdd)
        v = vandq_u16(v, vdupq_n_u16(0xff00));
      return vreinterpretq_u8_u16(v);
    });
  }
  // 32 float16, of 8 rows and 8 rows.
  static void widen_halves(const Cell& h, F& lo, F& hi) {
    auto half = [&](int i) {
      const float16x8_t v = vreinterpretq_f16_u8(h.v[i / 2]);
      return vcvt_f32_f16(i % 2 == 0 ? vget_low_f16(v) : vget_high_f16(v));
    };
    lo = each([&](int i) { return half(i); });
    hi = each([&](int i) { return half(4 + i); });
  }
  // Of 16 rows with two values each, the first and the second.
  static void unzip(const F& lo, const F& hi, F& first, F& second) {
    first = {{vuzp1q_f32(lo.v[0], lo.v[1]), vuzp1q_f32(lo.v[2], lo.v[3]), vuzp1q_f32(hi.v[0], hi.v[1]),
              vuzp1q_f32(hi.v[2], hi.v[3])}};
    second = {{vuzp2q_f32(lo.v[0], lo.v[1]), vuzp2q_f32(lo.v[2], lo.v[3]), vuzp2q_f32(hi.v[0], hi.v[1]),
               vuzp2q_f32(hi.v[2], hi.v[3])}};
  }
  static Cell fill_bytes(uint8_t v) { return cells([&](int) { return vdupq_n_u8(v); }); }
  static Cell add_bytes(const Cell& c, const Cell& d) { return cells([&](int i) { return vaddq_u8(c.v[i], d.v[i]); }); }
  static Cell max_bytes(const Cell& c, const Cell& d) { return cells([&](int i) { return vmaxq_u8(c.v[i], d.v[i]); }); }
  using Bytes = uint8x16_t;  // the largest bytes so far, whatever the row
  static Bytes no_bytes() { return vdupq_n_u8(0); }
  static Bytes max_bytes(Bytes m, const Cell& c) {
    return vmaxq_u8(m, vmaxq_u8(vmaxq_u8(c.v[0], c.v[1]), vmaxq_u8(c.v[2], c.v[3])));
  }
  static bool has_byte(Bytes m, uint8_t v) { return vmaxvq_u8(vceqq_u8(m, vdupq_n_u8(v))) != 0; }
  // NaN where a byte of a lane is v, else 0.
  static F nan_where(const Cell& c, uint8_t v) {
    return each([&](int i) {
      const uint32x4_t found = vreinterpretq_u32_u8(vceqq_u8(c.v[i], vdupq_n_u8(v)));
      return vreinterpretq_f32_u32(vtstq_u32(found, found));
    });
  }

  // The sum of each of 16 rows of 16.
  static F row_sums(const float* p) {
    return each([&](int i) {
      float32x4_t row[4];
      for (int r = 0; r < 4; ++r) {
        const float* q = p + (4 * i + r) * kTile;
        row[r] = vaddq_f32(vaddq_f32(vld1q_f32(q), vld1q_f32(q + 4)), vaddq_f32(vld1q_f32(q + 8), vld1q_f32(q + 12)));
      }
      return vpaddq_f32(vpaddq_f32(row[0], row[1]), vpaddq_f32(row[2], row[3]));
    });
  }

  static float largest(const F& x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
  }
  // The sum of 16 lanes, by adding halves.
  static float folded(const F& x) {
    const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  // 16 rows of 16 become columns.
  static void transpose(const F* row, float* out, int64_t stride) {
    for (int i = 0; i < kTile; i += 4)
      for (int j = 0; j < 4; ++j) {  // a square of 4
        const float32x4_t a = row[i].v[j], b = row[i + 1].v[j], c = row[i + 2].v[j], d = row[i + 3].v[j];
        const float64x2_t even[2] = {wide(vtrn1q_f32(a, b)), wide(vtrn1q_f32(c, d))};
        const float64x2_t odd[2] = {wide(vtrn2q_f32(a, b)), wide(vtrn2q_f32(c, d))};
        float* to = out + 4 * j * stride + i;
        vst1q_f32(to, vreinterpretq_f32_f64(vtrn1q_f64(even[0], even[1])));
        vst1q_f32(to + stride, vreinterpretq_f32_f64(vtrn1q_f64(odd[0], odd[1])));
        vst1q_f32(to + 2 * stride, vreinterpretq_f32_f64(vtrn2q_f64(even[0], even[1])));
        vst1q_f32(to + 3 * stride, vreinterpretq_f32_f64(vtrn2q_f64(odd[0], odd[1])));
      }
  }

  static Cell load_cell(const uint8_t* p) { return cells([&](int i) { return vld1q_u8(p + 16 * i); }); }
  static void store_cell(uint8_t* p, const Cell& c) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, c.v[i]);
  }
  // kBits bits of each byte, from bit kFrom on, to bit kTo.
  template <int kBits, int kFrom, int kTo>
  static Cell extract(const Cell& c) {
    if constexpr (kBits == 8) return c;
    return cells([&](int i) {
      uint8x16_t v = c.v[i];
      if constexpr (kFrom > kTo) v = vshrq_n_u8(v, kFrom - kTo);
      if constexpr (kFrom < kTo) v = vshlq_n_u8(v, kTo - kFrom);
      return vandq_u8(v, vdupq_n_u8(((1 << kBits) - 1) << kTo));
    });
  }
  static Cell merge(const Cell& c, const Cell& d) { return cells([&](int i) { return vorrq_u8(c.v[i], d.v[i]); }); }
  // The 4 columns of a cell as floats.
  static void widen(const Cell& c, F* u) {
    const uint32x4_t mask = vdupq_n_u32(0xff);
    auto lanes = [&](int i) { return vreinterpretq_u32_u8(c.v[i]); };
    u[0] = each([&](int i) { return vcvtq_f32_u32(vandq_u32(lanes(i), mask)); });
    u[1] = each([&](int i) { return vcvtq_f32_u32(vandq_u32(vshrq_n_u32(lanes(i), 8), mask)); });
    u[2] = each([&](int i) { return vcvtq_f32_u32(vandq_u32(vshrq_n_u32(lanes(i), 16), mask)); });
    u[3] = each([&](int i) { return vcvtq_f32_u32(vshrq_n_u32(lanes(i), 24)); });
  }

  static uint32_t largest_magnitude(const F& lo, const F& hi) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t m = vdupq_n_u32(0);
    for (int i = 0; i < 4; ++i) {
      m = vmaxq_u32(m, vandq_u32(vreinterpretq_u32_f32(lo.v[i]), magnitude));
      m = vmaxq_u32(m, vandq_u32(vreinterpretq_u32_f32(hi.v[i]), magnitude));
    }
    return vmaxvq_u32(m);
  }
  // 32 values times `factor`, rounded, to int8; returns their sum. The products are within +-127.
  static int32_t quantize(const F& lo, const F& hi, float factor, int8_t* out) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < 4; ++i) {
      const F& from = i < 2 ? lo : hi;
      const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(from.v[i % 2 * 2], factor));
      const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(from.v[i % 2 * 2 + 1], factor));
      vst1_s8(out + 8 * i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
      sum = vaddq_s32(sum, vaddq_s32(a, b));
    }
    return vaddvq_s32(sum);
  }

  // SDOT multiplies signed bytes: narrow codes are that as they are, 8 bits are read as w = u - 128.
  static constexpr int dot_kind(int bits) { return bits < 8 ? 6 : 8; }
  template <int kDot>
  struct Dot {
    static constexpr float kBias = kDot < 8 ? 0.0f : 128.0f;
    static constexpr bool kWide = true;  // a sum goes on from block to block
    struct Acc {
      int32x4_t v[4];
    };
    struct Prepared {
      int8x16_t v[4];
    };
    static Acc zero() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
    static Prepared prepare(const Cell& c) {
      Prepared p;
      for (int i = 0; i < 4; ++i)
        p.v[i] = vreinterpretq_s8_u8(kDot < 8 ? c.v[i] : veorq_u8(c.v[i], vdupq_n_u8(0x80)));
      return p;
    }
    static void step(Acc& acc, const Prepared& p, const int8_t* x) {
      int32_t four;
      std::memcpy(&four, x, 4);
      const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
      for (int i = 0; i < 4; ++i) acc.v[i] = vdotq_s32(acc.v[i], p.v[i], all);
    }
    static F finish(const Acc& acc) { return each([&](int i) { return vcvtq_f32_s32(acc.v[i]); }); }
  };

  // Signed weights (codes.h): what Dot<6> takes.
  static constexpr int kSignedTiles = 1;
  struct Signed {
    static constexpr int8_t kZero = 0;  // what stands for an activation of 0
    using Acc = Dot<6>::Acc;
    using Prepared = Dot<6>::Prepared;
    static Acc zero() { return Dot<6>::zero(); }
    static Prepared prepare(const Cell& w) { return Dot<6>::prepare(w); }
    static const int8_t* spread(const int8_t* x) { return x; }
    static void step(Acc& acc, const Prepared& w, const int8_t* x) { Dot<6>::step(acc, w, x); }
    static F finish(const Acc& acc) { return Dot<6>::finish(acc); }
  };
  using Positive = Signed;  // of activations none of which is negative

 private:
  static float64x2_t wide(float32x4_t x) { return vreinterpretq_f64_f32(x); }
  static uint16x4_t bfloat16(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t r = vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), r, vdup_n_u16(0x7fc0));
  }
};

}  // namespace

const Kernels kNeon = {"neon", linear<Neon>, decode<Neon>, encode<Neon>, attention<Neon>,
                       conv<Neon>, conv_codes<Neon>, depthwise<Neon>, chain<Neon>, norm<Neon>};

}  // namespace qcompile
