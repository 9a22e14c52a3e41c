// AVX2 with AVX-VNNI (processors that have VNNI without AVX-512): the integer products; the rest is that of AVX2.
#include "avx2.h"
#include "chain.h"
#include "conv.h"
#include "linear.h"

namespace qcompile {
namespace {

struct AvxVnni : Avx2 {
  static constexpr int dot_kind(int) { return 8; }  // one product for codes of any width

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
};

}  // namespace

const Kernels kAvxVnni = {"avxvnni", linear<AvxVnni>, avx2_decode, avx2_attention, conv<AvxVnni>, avx2_depthwise, chain<AvxVnni>};

}  // namespace qcompile
