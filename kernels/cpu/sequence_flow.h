// What flows between the steps of one call of a sequence, and the memory that it lies in.
#pragma once

#include <unordered_map>

#include "op_small.h"
#include "pages.h"
#include "sequence_text.h"

namespace qcompile {
namespace {

// Blocks that a thread keeps between the steps of a sequence, and from call to call: their pages are there, and often warm.
// What is unusually much is given back when some calls did without it.
class Pool {
 public:
  struct Block {
    char* data;
    size_t size;
  };
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() { release(); }

  Block take(size_t n) {
    n = (std::max(n, size_t(1)) + 255) / 256 * 256;
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i)
      if (free_[i].size >= n && free_[i].size <= 2 * n && (best == free_.size() || free_[i].size <= free_[best].size)) best = i;
    if (best < free_.size()) {
      const Block found = free_[best];
      free_.erase(free_.begin() + std::ptrdiff_t(best));
      held_ -= found.size;
      lend(found.size);
      return found;
    }
    const Block fresh = {kept_memory(n), n};
    lend(n);
    return fresh;
  }
  void give(Block b) {
    free_.push_back(b);
    held_ += b.size;
    lent_ -= b.size;
  }
  // After a sequence.
  void settle() {
    const bool used = most_ >= held_ / 2;
    most_ = lent_;
    idle_ = used || held_ <= kMuch ? 0 : idle_ + 1;
    if (idle_ >= kPatience || held_ > kTooMuch) release();
  }
  static Pool& mine() {
    thread_local Pool pool;
    return pool;
  }

 private:
  void release() {
    for (const Block& b : free_) std::free(b.data);
    free_.clear();
    held_ = 0;
    idle_ = 0;
  }
  void lend(size_t n) {
    lent_ += n;
    most_ = std::max(most_, lent_);
  }

  static constexpr size_t kMuch = size_t(32) << 20, kTooMuch = size_t(512) << 20;
  static constexpr int kPatience = 16;  // calls

  std::vector<Block> free_;
  size_t held_ = 0, lent_ = 0, most_ = 0;  // bytes: here, with steps, and with steps at the same time since the last sequence
  int idle_ = 0;                           // calls that needed less than half of what is here
};

// A place in the memory of a call: whose, of all that the call knows, and how many bytes from where that begins.
struct Where {
  size_t root = 0;
  int64_t offset = 0;
};
// A value as steps name it: all of it is known when the program is read, but for where the memory is.
struct Place : Where {
  bool whole = true;  // not a view
  Ref shape;          // lies nowhere
};

// What flows between the steps of one call: where each value that is not a view lies, and memory for results.
class Flow : public Lender {
 public:
  using T = Ref;

  explicit Flow(size_t roots) : memory_(roots), pool_(Pool::mine()) {}
  Flow(const Flow&) = delete;
  ~Flow() {
    for (size_t root = 0; root < memory_.size(); ++root) drop(root);
    end_step();
    pool_.settle();
  }

  Ref make(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
    if (outside && size_t(Kind{dtype, shape, strides}.elements()) * bytes_of(dtype) >= kWorth) {
      allocated_.push_back(qcompile::make(shape, strides, dtype));
      return Ref(allocated_.back());
    }
    return Ref(take(shape, strides, dtype), dtype, shape, strides);
  }
  Ref contiguous(const Ref& t) { return t.is_contiguous() ? t : dense(*this, t); }
  Ref laid(const Ref& t, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
    const Ref copy(take(shape, strides, t.scalar_type()), t.scalar_type(), shape, strides);
    Tensor to = tensor_of(copy);
    torch::stable::copy_(to, tensor_of(t));
    return copy;
  }
  Tensor lend(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) override {
    return wrap(take(shape, strides, dtype), shape, strides, dtype);
  }

  char* data(const Where& p) const { return memory_[p.root].data + p.offset; }
  Ref ref(const Place& p) const { return p.shape.at(data(p)); }
  Tensor tensor(const Place& p) const {
    const Tensor* known = memory_[p.root].tensor;
    return known != nullptr && p.whole ? *known : tensor_of(ref(p));
  }
  // The tensor of a value that torch allocated; null where it lies in this thread's memory.
  const Tensor* allocated(size_t root) const { return memory_[root].block.data == nullptr ? memory_[root].tensor : nullptr; }

  // An input, which outlives this.
  void enter(size_t root, const Tensor& t) {
    memory_[root].data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    memory_[root].tensor = &t;
  }
  void keep(size_t root, const Tensor& t) { enter(root, owned_[root] = t); }
  // What a step gave.
  void set(size_t root, const Ref& ref) {
    memory_[root].data = static_cast<char*>(ref.mutable_data_ptr());
    for (const Tensor& t : allocated_)
      if (t.const_data_ptr() == ref.const_data_ptr()) keep(root, t);
    claim(root);
  }
  void set(size_t root, const Tensor& t) {
    keep(root, t);
    claim(root);
  }
  // Memory for a value.
  char* give(size_t root, size_t size) {
    Memory& m = memory_[root];
    m.block = pool_.take(size);
    return m.data = m.block.data;
  }
  // The same for what may be a result that torch allocates.
  char* lay(size_t root, const Ref& lies, size_t size) {
    if (!outside || size < kWorth) return give(root, size);
    keep(root, qcompile::make(lies.sizes(), lies.strides(), lies.scalar_type()));
    return memory_[root].data;
  }
  // Memory for the step alone.
  char* borrow(size_t size) {
    made_.push_back(pool_.take(size));
    return made_.back().data;
  }
  // What the step made and did not give goes back.
  void end_step() {
    for (const Pool::Block& b : made_) pool_.give(b);
    made_.clear();
    allocated_.clear();
  }
  void drop(size_t root) {
    Memory& m = memory_[root];
    if (m.tensor != nullptr) owned_.erase(root);
    m.tensor = nullptr;
    if (m.block.data != nullptr) pool_.give(m.block);
    m.block.data = nullptr;
  }

  bool outside = false;  // what the step gives is a result: torch allocates it, unless it is sooner copied

 private:
  static constexpr size_t kWorth = size_t(64) << 10;

  struct Memory {
    char* data = nullptr;
    const Tensor* tensor = nullptr;  // where torch knows it
    Pool::Block block{nullptr, 0};
  };

  static Tensor tensor_of(const Ref& t) { return wrap(t.mutable_data_ptr(), t.sizes(), t.strides(), t.scalar_type()); }
  void* take(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
    return borrow(size_t(Kind{dtype, shape, strides}.elements()) * bytes_of(dtype));
  }
  static Tensor wrap(void* data, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle h = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        data, int64_t(shape.size()), shape.data(), strides.data(), 0, type, aoti_torch_device_type_cpu(), 0, &h));
    return Tensor(h);
  }
  // Of the memory that the step made, a value's own is no longer the step's.
  void claim(size_t root) {
    for (size_t i = 0; i < made_.size(); ++i)
      if (made_[i].data == memory_[root].data) {
        memory_[root].block = made_[i];
        made_.erase(made_.begin() + std::ptrdiff_t(i));
        return;
      }
  }

  std::vector<Memory> memory_;
  std::unordered_map<size_t, Tensor> owned_;  // tensors that are no inputs
  Pool& pool_;
  std::vector<Pool::Block> made_;
  std::vector<Tensor> allocated_;
};

}  // namespace
}  // namespace qcompile
