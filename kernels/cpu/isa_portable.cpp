// Standard C++ only: 16 lanes are arrays, which a compiler turns into whatever vectors the target has.
#include <cmath>

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

struct Portable {
  static constexpr int kRows = 2;
  static constexpr int kFloatRows = 2;  // of float activations
  static constexpr int dot_kind(int) { return 8; }  // one product for codes of any width
  static constexpr bool kUnpackFirst = true;  // shifts and masks cost more than the loads of bytes
  static constexpr int kReadyTiles = 0;
  static constexpr bool has_ready(int) { return false; }
  static constexpr bool kReadyUnsigned = false;
  static constexpr int kManyRows = 4;
  static constexpr int64_t kRowBlockBytes = 256 << 10;  // activations of a row block stay in the L2 cache
  static constexpr int kPrefetch = 1024;
  static constexpr int64_t kThreadWork = 100000;  // multiply-adds of several rows that are worth waking a thread for
  static constexpr int kTileRows = 2, kTileVectors = 1;  // of an attention of many queries
  static constexpr int kColumns = 4;  // of a depthwise convolution's row
  static constexpr bool kQuads = false;
  static constexpr bool kRoundsFour = false;
  struct F {
    float v[kTile];
  };
  struct Cell {
    uint8_t v[4 * kTile];
  };

  template <class Fn>
  static F each(Fn f) {
    F r;
    for (int i = 0; i < kTile; ++i) r.v[i] = f(i);
    return r;
  }

  static F set1(float v) { return each([&](int) { return v; }); }
  static F load(const float* p) { return each([&](int i) { return p[i]; }); }
  static void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
  static F add(const F& x, const F& y) { return each([&](int i) { return x.v[i] + y.v[i]; }); }
  static F sub(const F& x, const F& y) { return each([&](int i) { return x.v[i] - y.v[i]; }); }
  static F mul(const F& x, const F& y) { return each([&](int i) { return x.v[i] * y.v[i]; }); }
  static F div(const F& x, const F& y) { return each([&](int i) { return x.v[i] / y.v[i]; }); }
  static F min(const F& x, const F& y) { return each([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; }); }
  static F max(const F& x, const F& y) { return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
  static F fma(const F& x, const F& y, const F& z) { return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; }); }
  static F fnma(const F& x, const F& y, const F& z) { return each([&](int i) { return z.v[i] - x.v[i] * y.v[i]; }); }
  static F abs(const F& x) { return each([&](int i) { return std::fabs(x.v[i]); }); }
  static F round(const F& x) { return each([&](int i) { return std::nearbyint(x.v[i]); }); }
  static F times_exp2(const F& x, const F& n) { return mul(x, exp2_integer(n)); }
  static F reciprocal(const F& x) { return div(set1(1.0f), x); }
  static F exp2_integer(const F& n) {
    return each([&](int i) { return n.v[i] == n.v[i] ? bits_to_float(uint32_t(int32_t(n.v[i]) + 127) << 23) : n.v[i]; });
  }
  static F select_less(const F& x, const F& y, const F& yes, const F& no) {
    return each([&](int i) { return x.v[i] < y.v[i] ? yes.v[i] : no.v[i]; });
  }

  static F load16(const char* p, DType t) { return each([&](int i) { return load_scalar(p, t, i); }); }
  static void store16(char* p, DType t, const F& x) {
    for (int i = 0; i < kTile; ++i) store_scalar(p, t, i, x.v[i]);
  }
  // The first `count` (below 16) of 16 values, the rest 0; and the same for a store.
  static F load_first(const char* p, DType t, int count) {
    return each([&](int i) { return i < count ? load_scalar(p, t, i) : 0.0f; });
  }
  static void store_first(char* p, DType t, const F& x, int count) {
    for (int i = 0; i < count; ++i) store_scalar(p, t, i, x.v[i]);
  }
  static F load_u8(const uint8_t* p) { return each([&](int i) { return float(p[i]); }); }

  // 16 int8 as floats, and floats within +-127 rounded to int8; NaN becomes -128.
  static F load_i8(const int8_t* p) { return each([&](int i) { return float(p[i]); }); }
  static void store_i8(int8_t* p, const F& x) {
    for (int i = 0; i < kTile; ++i) p[i] = x.v[i] == x.v[i] ? int8_t(std::nearbyint(x.v[i])) : int8_t(-128);
  }

  // Four times 16 floats, of whole numbers of 32 bits once rounded, as codes that saturate; those within bounds; 16 of them.
  static Cell round_codes(const F& a, const F& b, const F& c, const F& d) {
    const F* all[] = {&a, &b, &c, &d};
    Cell r;
    for (int i = 0; i < 4 * kTile; ++i) {
      const float x = std::nearbyint(all[i / kTile]->v[i % kTile]);
      r.v[i] = uint8_t(int8_t(x < -128.0f ? -128.0f : x > 127.0f ? 127.0f : x));
    }
    return r;
  }
  static Cell bound_codes(const Cell& c, const Cell& low, const Cell& high) {
    Cell r;
    for (int i = 0; i < 4 * kTile; ++i) {
      const int8_t x = int8_t(c.v[i]), bottom = int8_t(low.v[i]), top = int8_t(high.v[i]);
      r.v[i] = uint8_t(x < bottom ? bottom : x > top ? top : x);
    }
    return r;
  }
  template <int i>
  static void store_quarter(int8_t* p, const Cell& c) { std::memcpy(p, c.v + i * kTile, kTile); }

  // For float8 (floats.h). p[0] and p[1] in turns.
  static F set2(const float* p) { return each([&](int i) { return p[i % 2]; }); }
  // Bytes 0 and 2, or 1 and 3, of each lane as the high half of 16 bits, with four bits of exponent shifted down under the sign.
  template <bool kOdd, bool kFourBits>
  static Cell halves(const Cell& c) {
    Cell r;
    for (int i = 0; i < 2 * kTile; ++i) {
      const unsigned high = unsigned(c.v[2 * i + (kOdd ? 1 : 0)]) << 8;
      const uint16_t v = uint16_t(kFourBits ? (high & 0x8000u) | (high & 0x7f00u) >> 1 : high);
      std::memcpy(r.v + 2 * i, &v, 2);
    }
    return r;
  }
  // 32 float16, of 8 rows and 8 rows.
  static void widen_halves(const Cell& h, F& lo, F& hi) {
    uint16_t v[2 * kTile];
    std::memcpy(v, h.v, sizeof v);
    lo = each([&](int i) { return from_float16(v[i]); });
    hi = each([&](int i) { return from_float16(v[kTile + i]); });
  }
  // Of 16 rows with two values each, the first and the second.
  static void unzip(const F& lo, const F& hi, F& first, F& second) {
    first = each([&](int i) { return i < kTile / 2 ? lo.v[2 * i] : hi.v[2 * i - kTile]; });
    second = each([&](int i) { return i < kTile / 2 ? lo.v[2 * i + 1] : hi.v[2 * i + 1 - kTile]; });
  }
  static Cell fill_bytes(uint8_t v) {
    Cell r;
    std::memset(r.v, v, sizeof r.v);
    return r;
  }
  static Cell add_bytes(const Cell& c, const Cell& d) {
    Cell r;
    for (int i = 0; i < 4 * kTile; ++i) r.v[i] = uint8_t(c.v[i] + d.v[i]);
    return r;
  }
  static Cell max_bytes(const Cell& c, const Cell& d) {
    Cell r;
    for (int i = 0; i < 4 * kTile; ++i) r.v[i] = c.v[i] > d.v[i] ? c.v[i] : d.v[i];
    return r;
  }
  using Bytes = Cell;
  static Bytes no_bytes() { return fill_bytes(0); }
  static bool has_byte(const Bytes& m, uint8_t v) {
    bool found = false;
    for (int i = 0; i < 4 * kTile; ++i) found |= m.v[i] == v;
    return found;
  }
  // NaN where a byte of a lane is v, else 0.
  static F nan_where(const Cell& c, uint8_t v) {
    return each([&](int i) {
      bool found = false;
      for (int k = 0; k < 4; ++k) found |= c.v[4 * i + k] == v;
      return found ? bits_to_float(0x7fc00000u) : 0.0f;
    });
  }

  // The sum of each of 16 rows of 16.
  static F row_sums(const float* p) {
    return each([&](int i) {
      float sum = 0.0f;
      for (int j = 0; j < kTile; ++j) sum += p[i * kTile + j];
      return sum;
    });
  }

  static float largest(const F& x) {
    float r = x.v[0];
    for (int i = 1; i < kTile; ++i) r = x.v[i] > r ? x.v[i] : r;
    return r;
  }
  // The sum of 16 lanes, by adding halves.
  static float folded(F x) {
    for (int half = kTile / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) x.v[i] += x.v[half + i];
    return x.v[0];
  }
  // 16 rows of 16 become columns.
  static void transpose(const F* row, float* out, int64_t stride) {
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < kTile; ++j) out[j * stride + i] = row[i].v[j];
  }

  static Cell load_cell(const uint8_t* p) {
    Cell c;
    std::memcpy(c.v, p, sizeof c.v);
    return c;
  }
  static void store_cell(uint8_t* p, const Cell& c) { std::memcpy(p, c.v, sizeof c.v); }
  // kBits bits of each byte, from bit kFrom on, to bit kTo.
  template <int kBits, int kFrom, int kTo>
  static Cell extract(const Cell& c) {
    Cell r;
    for (int i = 0; i < 4 * kTile; ++i) r.v[i] = uint8_t((c.v[i] >> kFrom & ((1 << kBits) - 1)) << kTo);
    return r;
  }
  static Cell merge(const Cell& c, const Cell& d) {
    Cell r;
    for (int i = 0; i < 4 * kTile; ++i) r.v[i] = c.v[i] | d.v[i];
    return r;
  }
  static void widen(const Cell& c, F* u) {
    for (int k = 0; k < 4; ++k) u[k] = each([&](int i) { return float(c.v[4 * i + k]); });
  }

  static uint32_t largest_magnitude(const F& lo, const F& hi) {
    uint32_t r = 0;
    for (int i = 0; i < kTile; ++i) {
      const uint32_t a = float_to_bits(lo.v[i]) & 0x7fffffffu, b = float_to_bits(hi.v[i]) & 0x7fffffffu;
      const uint32_t m = a > b ? a : b;
      r = m > r ? m : r;
    }
    return r;
  }
  static int32_t quantize(const F& lo, const F& hi, float factor, int8_t* out) {
    int32_t sum = 0;
    for (int i = 0; i < kTile; ++i) {
      out[i] = int8_t(std::nearbyint(lo.v[i] * factor));
      out[i + kTile] = int8_t(std::nearbyint(hi.v[i] * factor));
      sum += out[i] + out[i + kTile];
    }
    return sum;
  }

  template <int kDot>
  struct Dot {
    static constexpr float kBias = 0.0f;
    static constexpr bool kWide = true;  // a sum goes on from block to block
    struct Acc {
      int32_t v[kTile];
    };
    static Acc zero() { return {}; }
    static const Cell& prepare(const Cell& c) { return c; }
    static void step(Acc& acc, const Cell& c, const int8_t* x) {
      for (int i = 0; i < kTile; ++i)
        for (int k = 0; k < 4; ++k) acc.v[i] += int32_t(c.v[4 * i + k]) * x[k];
    }
    static F finish(const Acc& acc) { return each([&](int i) { return float(acc.v[i]); }); }
  };

  // Signed weights (codes.h).
  static constexpr int kSignedTiles = 1;
  struct Signed {
    static constexpr int8_t kZero = 0;  // what stands for an activation of 0
    using Acc = Dot<8>::Acc;
    using Prepared = Cell;
    static Acc zero() { return {}; }
    static const Cell& prepare(const Cell& w) { return w; }
    static const int8_t* spread(const int8_t* x) { return x; }
    static void step(Acc& acc, const Cell& w, const int8_t* x) {
      for (int i = 0; i < kTile; ++i)
        for (int k = 0; k < 4; ++k) acc.v[i] += int32_t(int8_t(w.v[4 * i + k])) * x[k];
    }
    static F finish(const Acc& acc) { return Dot<8>::finish(acc); }
  };
  using Positive = Signed;  // of activations none of which is negative
};

}  // namespace

const Kernels kPortable = {"portable", linear<Portable>, decode<Portable>, encode<Portable>, attention<Portable>,
                           conv<Portable>, conv_codes<Portable>, depthwise<Portable>, chain<Portable>, norm<Portable>};

}  // namespace qcompile
