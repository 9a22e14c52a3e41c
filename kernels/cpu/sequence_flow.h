// What flows between the steps of one call of a sequence, and the memory that it lies in.
#pragma once

#include "op_small.h"
#include "sequence_text.h"

namespace qcompile {
namespace {

// Blocks that a thread keeps between the steps of a sequence, and from call to call: their pages are there, and often warm.
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
      return found;
    }
    void* p = std::aligned_alloc(256, n);
    if (p == nullptr) throw std::bad_alloc();
    return {static_cast<char*>(p), n};
  }
  void give(Block b) {
    free_.push_back(b);
    held_ += b.size;
  }
  // After a sequence: what is unusually much goes back to the system.
  void settle() {
    if (held_ > (size_t(32) << 20)) release();
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
  }
  std::vector<Block> free_;
  size_t held_ = 0;
};

// What flows between the steps of one call: memory for results, and what each value is by now.
class Flow : public Lender {
 public:
  using T = Ref;
  struct Value {
    Ref ref;
    std::optional<Tensor> tensor;  // where torch knows it, or an operator asked for one
    std::optional<Pool::Block> block;
  };

  explicit Flow(size_t count) : values(count), pool_(Pool::mine()) {}
  Flow(const Flow&) = delete;
  ~Flow() {
    for (Value& v : values) drop(v);
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
  const Ref& ref(size_t i) const { return values[i].ref; }
  const Tensor& tensor(size_t i) {
    Value& v = values[i];
    if (!v.tensor)
      v.tensor = tensor_of(v.ref);
    return *v.tensor;
  }
  void set(size_t i, const Ref& ref) {
    values[i].ref = ref;
    keep(values[i]);
  }
  void set(size_t i, const Tensor& t) {
    values[i].tensor = t;
    values[i].ref = Ref(t);
    if (!made_.empty()) keep(values[i]);
  }
  // Memory for a value, as `nowhere` lies.
  char* give(size_t i, const Ref& nowhere, size_t size) {
    values[i].block = pool_.take(size);
    values[i].ref = nowhere.at(values[i].block->data);
    return values[i].block->data;
  }
  char* data(size_t i) const { return static_cast<char*>(values[i].ref.mutable_data_ptr()); }
  // What the step made and did not give goes back.
  void end_step() {
    for (const Pool::Block& b : made_) pool_.give(b);
    made_.clear();
    allocated_.clear();
  }
  void drop(Value& v) {
    v.tensor.reset();
    if (v.block) pool_.give(*v.block);
    v.block.reset();
  }

  std::vector<Value> values;
  bool outside = false;  // what the step gives is a result: torch allocates it, unless it is sooner copied

 private:
  static constexpr size_t kWorth = size_t(64) << 10;

  static Tensor tensor_of(const Ref& t) { return wrap(t.mutable_data_ptr(), t.sizes(), t.strides(), t.scalar_type()); }
  void* take(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
    made_.push_back(pool_.take(size_t(Kind{dtype, shape, strides}.elements()) * bytes_of(dtype)));
    return made_.back().data;
  }
  static Tensor wrap(void* data, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle h = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        data, int64_t(shape.size()), shape.data(), strides.data(), 0, type, aoti_torch_device_type_cpu(), 0, &h));
    return Tensor(h);
  }
  void keep(Value& v) {
    for (const Tensor& t : allocated_)
      if (t.const_data_ptr() == v.ref.const_data_ptr()) v.tensor = t;
    for (size_t i = 0; i < made_.size(); ++i)
      if (made_[i].data == v.ref.const_data_ptr()) {
        v.block = made_[i];
        made_.erase(made_.begin() + std::ptrdiff_t(i));
        return;
      }
  }

  Pool& pool_;
  std::vector<Pool::Block> made_;
  std::vector<Tensor> allocated_;
};

}  // namespace
}  // namespace qcompile
