// Tensors without owners: what a sequence computes with. A torch tensor costs a few hundred nanoseconds to make, which is more
// than most of a token's small steps.
#pragma once

#include "op_checks.h"

namespace qcompile {
namespace {

constexpr int64_t kMostAxes = 6;

size_t bytes_of(ScalarType t) {
  switch (t) {
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 1;  // bytes, bools and float8
  }
}

// Answers what a Tensor does, so that checks (op_checks.h) take either.
class Ref {
 public:
  Ref() = default;
  Ref(void* data, ScalarType dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides)
      : data_(static_cast<char*>(data)), dim_(int64_t(sizes.size())), dtype_(dtype) {
    if (dim_ > kMostAxes) fail("sequence", "at most ", kMostAxes, " axes, got ", dim_);
    std::copy(sizes.begin(), sizes.end(), size_);
    std::copy(strides.begin(), strides.end(), stride_);
  }

  explicit Ref(const Tensor& t)
      : data_(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), dim_(t.dim()), dtype_(t.scalar_type()) {
    if (dim_ > kMostAxes) fail("sequence", "at most ", kMostAxes, " axes, got ", dim_);
    const auto sizes = t.sizes(), strides = t.strides();
    for (int64_t i = 0; i < dim_; ++i) size_[i] = sizes[size_t(i)], stride_[i] = strides[size_t(i)];
  }

  // As this lies, in other memory.
  Ref at(void* data) const {
    Ref there = *this;
    there.data_ = static_cast<char*>(data);
    return there;
  }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return size_[i]; }
  int64_t stride(int64_t i) const { return stride_[i]; }
  std::vector<int64_t> sizes() const { return {size_, size_ + dim_}; }
  std::vector<int64_t> strides() const { return {stride_, stride_ + dim_}; }
  ScalarType scalar_type() const { return dtype_; }
  bool is_cpu() const { return true; }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }
  size_t element_size() const { return bytes_of(dtype_); }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim_; ++i) n *= size_[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim_; i-- > 0; expected *= size_[i])
      if (size_[i] != 1 && stride_[i] != expected) return numel() == 0;
    return true;
  }
  // The same memory seen otherwise; whoever made the numbers has checked them.
  Ref seen(int64_t offset, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) const {
    return Ref(data_ + offset * int64_t(element_size()), dtype_, sizes, strides);
  }

 private:
  char* data_ = nullptr;
  int64_t dim_ = 0;
  ScalarType dtype_ = ScalarType::Float;
  int64_t size_[kMostAxes] = {}, stride_[kMostAxes] = {};
};

}  // namespace
}  // namespace qcompile
