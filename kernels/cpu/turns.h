// Units of work that threads share. Each begins with a run of its own, near what it wrote in the layer before, and goes on with
// what others have not come to: a thread that another program holds up keeps nobody waiting for more than a unit.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace qcompile {
namespace {

class Turns {
 public:
  Turns(int64_t units, int64_t slots) : units_(units), slots_(slots), next_(new Next[size_t(slots)]) {
    for (int64_t slot = 0; slot < slots; ++slot) next_[slot].unit.store(first(slot), std::memory_order_relaxed);
  }

  // What the thread of that slot does next; -1: nothing is left.
  int64_t take(int64_t slot) {
    for (int64_t i = 0; i < slots_; ++i) {
      const int64_t of = (slot + i) % slots_;
      std::atomic<int64_t>& next = next_[of].unit;
      const int64_t end = first(of + 1);
      if (next.load(std::memory_order_relaxed) >= end) continue;
      const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
      if (unit < end) return unit;
    }
    return -1;
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> unit;
  };

  int64_t first(int64_t slot) const { return units_ * slot / slots_; }

  const int64_t units_, slots_;
  const std::unique_ptr<Next[]> next_;
};

}  // namespace
}  // namespace qcompile
