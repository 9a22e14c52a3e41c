// Loads and stores of the first few of 16 lanes. V is an instruction set (isa_*.cpp).
#pragma once

#include "half.h"
#include "kernels.h"

namespace qcompile {
namespace {

// `count` (1 to 16) values, the rest 0.
template <class V>
inline typename V::F load_some(const char* p, DType t, int count) {
  return count == kTile ? V::load16(p, t) : V::load_first(p, t, count);
}

template <class V>
inline void store_some(char* p, DType t, typename V::F value, int count) {
  count == kTile ? V::store16(p, t, value) : V::store_first(p, t, value, count);
}

}  // namespace
}  // namespace qcompile
