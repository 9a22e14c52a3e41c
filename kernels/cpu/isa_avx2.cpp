// AVX2 + FMA + F16C.
#include "attention.h"
#include "avx2.h"
#include "chain.h"
#include "conv.h"
#include "conv_codes.h"
#include "decode.h"
#include "depthwise.h"
#include "encode.h"
#include "linear.h"

namespace qcompile {

void avx2_decode(const Decode& a) { decode<Avx2>(a); }
void avx2_encode(const Encode& a) { encode<Avx2>(a); }
void avx2_attention(const Attention& a) { attention<Avx2>(a); }
void avx2_depthwise(const Depthwise& a) { depthwise<Avx2>(a); }

const Kernels kAvx2 = {"avx2", linear<Avx2>, avx2_decode, avx2_encode, avx2_attention,
                       conv<Avx2>, conv_codes<Avx2>, avx2_depthwise, chain<Avx2>, norm<Avx2>};

}  // namespace qcompile
