// The operator hold: tensors that programs find by a number instead of being given them. kernels/ops/hold.py says why.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>

#include "op_checks.h"

namespace qcompile {
namespace {

using Held = std::shared_ptr<const std::vector<Tensor>>;

class Boxes {
 public:
  static Boxes& all() {
    static Boxes* const boxes = new Boxes;  // never destroyed: torch may be gone by then
    return *boxes;
  }
  void put(int64_t number, const std::vector<Tensor>& tensors) {
    Held before;  // freed after the lock
    const std::lock_guard<std::mutex> guard(lock_);
    const auto at = held_.find(number);
    if (at != held_.end()) before = at->second;
    if (tensors.empty())
      held_.erase(number);
    else
      held_[number] = std::make_shared<const std::vector<Tensor>>(tensors);
  }
  // Null where there is none.
  Held at(int64_t number) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto at = held_.find(number);
    return at == held_.end() ? nullptr : at->second;
  }

 private:
  std::mutex lock_;
  std::unordered_map<int64_t, Held> held_;
};

int64_t number_of(const Tensor& box) {
  if (!box.is_cpu() || box.scalar_type() != ScalarType::Long || box.numel() != 1)
    fail("hold", "a box is one int64 on the CPU, got ", shape_of(box));
  return *static_cast<const int64_t*>(box.const_data_ptr());
}

// Fills a box, or with no tensors empties it.
void hold(const Tensor& box, const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors)
    if (!t.is_cpu()) fail("hold", "a box holds tensors of the CPU");
  Boxes::all().put(number_of(box), tensors);
}

}  // namespace
}  // namespace qcompile
