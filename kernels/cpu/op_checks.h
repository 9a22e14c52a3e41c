// What the registered operators share: torch's stable ABI, checks that say what was given, outputs, threads, scratch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pages.h"

namespace qcompile {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream s;
  s << "qcompile::" << op << ": ";
  (s << ... << args);
  throw std::runtime_error(s.str());
}

template <class T>  // a Tensor or a Ref (ref.h), here and below
std::string shape_of(const T& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ']';
  return s.str();
}

template <class T>
void check_shape(const char* op, const char* name, const T& t, const std::vector<int64_t>& shape) {
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
  if (same) return;
  std::ostringstream s;
  for (size_t i = 0; i < shape.size(); ++i) s << (i ? ", " : "") << shape[i];
  fail(op, name, " must be [", s.str(), "], got ", shape_of(t));
}

template <class T>
void check_memory(const char* op, const char* name, const T& t) {
  if (!t.is_cpu()) fail(op, name, " must be on the CPU like the other tensors");
  if (!t.is_contiguous()) fail(op, name, " must be contiguous");
}

std::optional<DType> float_type(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return std::nullopt;
  }
}

DType check_float(const char* op, const char* name, ScalarType t) {
  const auto r = float_type(t);
  if (!r) fail(op, name, " must be float32, float16 or bfloat16");
  return *r;
}

template <class T>
const char* bytes(const T& t) { return static_cast<const char*>(t.const_data_ptr()); }

// Where results lie while a sequence runs (sequence.h); else torch allocates them.
struct Lender {
  virtual Tensor lend(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) = 0;
};
Lender*& lender() {
  thread_local Lender* current = nullptr;
  return current;
}

Tensor make(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
  if (lender() != nullptr) return lender()->lend(shape, strides, dtype);
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle h = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &h));
  return Tensor(h);
}

std::vector<int64_t> dense_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  return strides;
}

Tensor make(const std::vector<int64_t>& shape, ScalarType dtype) { return make(shape, dense_strides(shape), dtype); }

// What an operator asks memory of: torch, or a sequence, which has the same members for Refs.
struct TorchMemory {
  using T = Tensor;
  Tensor make(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
    return qcompile::make(shape, strides, dtype);
  }
  Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
  // A copy of other strides.
  Tensor laid(const Tensor& t, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
    Tensor copy = qcompile::make(shape, strides, t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
  }
};

// An operator's function as torch calls it.
template <auto kFunction>
struct WithTorch;
template <class R, class... A, R (*kFunction)(TorchMemory&, A...)>
struct WithTorch<kFunction> {
  static R call(A... arguments) {
    TorchMemory memory;
    return kFunction(memory, std::forward<A>(arguments)...);
  }
};

void parallel(int64_t total, int64_t grain, Body body, void* context) {
  if (total <= grain) {  // not worth waking a thread, nor a call into torch
    if (total > 0) body(0, total, context);
    return;
  }
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

constexpr size_t kKeptScratch = size_t(16) << 20;

// A 64-byte aligned buffer a thread keeps between calls, given back when it was larger than kKeptScratch.
class Scratch {
 public:
  explicit Scratch(size_t n) {
    if (n > slot().size) {
      slot().memory.reset();
      slot().size = 0;
      slot().memory.reset(kept_memory(n));
      slot().size = n;
    }
  }
  ~Scratch() {
    if (slot().size > kKeptScratch) slot() = {};
  }
  char* data() const { return slot().memory.get(); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Slot {
    std::unique_ptr<char, Free> memory;
    size_t size = 0;
  };
  static Slot& slot() {
    thread_local Slot s;
    return s;
  }
};

template <class T>
Weight check_weight(const char* op, const T& codes, const T& scale, const std::optional<T>& zero,
                    int64_t bits, int64_t group_size, int64_t tiles, int64_t cols) {
  if (bits < 2 || bits == 7 || bits > 8) fail(op, "bits must be 2, 3, 4, 5, 6 or 8, got ", bits);
  if (group_size < 0) fail(op, "group_size must be positive, or 0 for one group a row, got ", group_size);
  if (cols < 0 || cols > std::numeric_limits<int32_t>::max()) fail(op, "the weight cannot have ", cols, " columns");
  Weight w{};
  w.bits = int(bits);
  w.tiles = tiles;
  w.cols = cols;
  w.group_size = group_size > 0 && group_size < cols ? group_size : cols;
  w.groups = cols > 0 ? (cols + w.group_size - 1) / w.group_size : 0;
  w.blocks_per_group = (w.group_size + kBlock - 1) / kBlock;
  if (w.groups > 0) {
    const int64_t last = cols - (w.groups - 1) * w.group_size;
    w.blocks = (w.groups - 1) * w.blocks_per_group + (last + kBlock - 1) / kBlock;
  }
  switch (codes.scalar_type()) {
    case ScalarType::Byte: w.code = Code::kInteger; break;
    case ScalarType::Float8_e4m3fn: w.code = Code::kE4m3fn; break;
    case ScalarType::Float8_e4m3fnuz: w.code = Code::kE4m3fnuz; break;
    case ScalarType::Float8_e5m2: w.code = Code::kE5m2; break;
    default: fail(op, "codes must be uint8, float8_e4m3fn, float8_e4m3fnuz or float8_e5m2");
  }
  if (w.code != Code::kInteger && bits != 8) fail(op, "bits must be 8 for float8 codes, got ", bits);
  if (w.code != Code::kInteger && zero) fail(op, "zero must be None for float8 codes");
  check_shape(op, "codes", codes, {tiles, w.blocks, 64 * bits});
  check_memory(op, "codes", codes);
  w.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  w.scale_dtype = check_float(op, "scale", scale.scalar_type());
  check_shape(op, "scale", scale, {tiles, w.groups, kTile});
  check_memory(op, "scale", scale);
  w.scale = scale.const_data_ptr();
  w.zero_kind = Zero::kMiddle;
  if (zero) {
    const bool codes_unit = zero->scalar_type() == ScalarType::Byte;
    if (!codes_unit && zero->scalar_type() != scale.scalar_type())
      fail(op, "zero must be uint8 (code units) or have the dtype of scale (a shift)");
    check_shape(op, "zero", *zero, {tiles, w.groups, kTile});
    check_memory(op, "zero", *zero);
    w.zero = zero->const_data_ptr();
    w.zero_kind = codes_unit ? Zero::kCode : Zero::kShift;
  }
  return w;
}

}  // namespace
}  // namespace qcompile
