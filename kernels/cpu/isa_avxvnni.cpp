// AVX2 with AVX-VNNI (processors that have VNNI without AVX-512): the integer products; the rest is that of AVX2.
#include "avx2.h"
#include "chain.h"
#include "conv.h"
#include "conv_codes.h"
#include "linear.h"

namespace qcompile {
namespace {

struct AvxVnni : Avx2 {
  static constexpr int dot_kind(int) { return 8; }  // one product for codes of any width
  static constexpr int kReadyTiles = 0;
  static constexpr bool has_ready(int) { return false; }
  static constexpr int64_t kThreadWork = 400000;  // multiply-adds of several rows that are worth waking a thread for

  // u8 x s8 summed by fours into 32 bits, without saturation, for every code width.
  template <int kDot>
  struct Dot {
    static constexpr float kBias = 0.0f;
    static constexpr bool kWide = true;  // a sum goes on from block to block
    struct Acc {
      __m256i a, b;
    };
    static Acc zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Cell prepare(Cell c) { return c; }
    static void step(Acc& acc, const Cell& c, const int8_t* x) {
      const __m256i four = broadcast4(x);
      acc.a = _mm256_dpbusd_avx_epi32(acc.a, c.a, four);
      acc.b = _mm256_dpbusd_avx_epi32(acc.b, c.b, four);
    }
    static F finish(const Acc& acc) { return {_mm256_cvtepi32_ps(acc.a), _mm256_cvtepi32_ps(acc.b)}; }
  };

  // Signed weights (codes.h): activations are unsigned, 128 more than they are, which what sums begin with takes off again.
  struct Signed {
    static constexpr int8_t kZero = -128;  // the byte 128
    using Acc = Dot<8>::Acc;
    using Prepared = Cell;
    static Acc zero() { return Dot<8>::zero(); }
    static Prepared prepare(Cell w) { return w; }
    static __m256i spread(const int8_t* x) { return broadcast4(x); }
    static void step(Acc& acc, const Cell& w, __m256i x) {
      acc.a = _mm256_dpbusd_avx_epi32(acc.a, x, w.a);
      acc.b = _mm256_dpbusd_avx_epi32(acc.b, x, w.b);
    }
    static F finish(const Acc& acc) { return Dot<8>::finish(acc); }
    static Acc load(const int32_t* p) {
      const auto* q = reinterpret_cast<const __m256i*>(p);
      return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
    }
    static void store_negative(int32_t* p, const Acc* four) {
      auto* q = reinterpret_cast<__m256i*>(p);
      __m256i a = _mm256_setzero_si256(), b = a;
      for (int i = 0; i < 4; ++i) {
        a = _mm256_sub_epi32(a, four[i].a);
        b = _mm256_sub_epi32(b, four[i].b);
      }
      _mm256_storeu_si256(q, a);
      _mm256_storeu_si256(q + 1, b);
    }
  };
  using Positive = Signed;  // of activations none of which is negative
};

}  // namespace

const Kernels kAvxVnni = {"avxvnni", linear<AvxVnni>, avx2_decode, avx2_encode, avx2_attention,
                          conv<AvxVnni>, conv_codes<AvxVnni>, avx2_depthwise, chain<AvxVnni>, norm<AvxVnni>};

}  // namespace qcompile
