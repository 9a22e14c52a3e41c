// Memory that is kept and used again, on large pages where the system has them. A row of a large matrix lies in pages of its
// own: with small ones a tile of columns, as linears write it, needs another translation for each row, which a processor keeps
// only few of.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qcompile {
namespace {

constexpr size_t kLargePage = size_t(2) << 20;

// At least `n` bytes, 256-byte aligned; std::free gives them back.
inline char* kept_memory(size_t n) {
  const size_t unit = n >= kLargePage ? kLargePage : 256;
  n = (n > 0 ? n + unit - 1 : unit) / unit * unit;
  void* p = std::aligned_alloc(unit, n);
  if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (unit == kLargePage) madvise(p, n, MADV_HUGEPAGE);  // where it is refused, pages stay small
#endif
  return static_cast<char*>(p);
}

}  // namespace
}  // namespace qcompile
