// The operator linear_chain: checks, then the kernel. kernels/ops/linear_chain.py says what the numbers of a stage are.
#pragma once

#include "op_linear.h"

namespace qcompile {
namespace {

// Reads a chain's description front to back, and what it names.
template <class T>
class ChainReader {
 public:
  ChainReader(const std::vector<T>& constants, const std::vector<int64_t>& numbers)
      : constants_(constants), numbers_(numbers) {}

  bool done() const { return at_ == numbers_.size(); }
  int64_t number() {
    if (done()) fail("linear_chain", "the description of the stages ends too early");
    return numbers_[at_++];
  }
  std::optional<T> constant() {
    const int64_t i = number();
    if (i == -1) return std::nullopt;
    if (i < 0 || i >= int64_t(constants_.size())) fail("linear_chain", "there is no constant ", i);
    return constants_[size_t(i)];
  }

 private:
  const std::vector<T>& constants_;
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;
};

// The norm of a stage that reads `cols` columns.
template <class T>
Norm read_norm(const char* op, ChainReader<T>& read, int64_t cols, double eps) {
  const char* what = "weight and bias of a norm";
  Norm norm{};
  for (const char** to : {&norm.weight, &norm.bias}) {
    const std::optional<T> held = read.constant();
    if (!held) continue;
    if (to == &norm.bias && norm.weight == nullptr) fail(op, "a norm with a bias must have a weight");
    check_shape(op, what, *held, {cols});
    check_memory(op, what, *held);
    const DType type = check_float(op, what, held->scalar_type());
    if (to == &norm.bias && type != norm.dtype) fail(op, what, " must have one dtype");
    norm.dtype = type;
    *to = bytes(*held);
  }
  norm.centered = read.number() != 0;
  norm.eps = float(eps);
  if (!(eps >= 0.0)) fail(op, "eps must not be negative, got ", eps);
  return norm;
}

template <class Memory, class T = typename Memory::T>
std::vector<T> linear_chain(Memory& memory, const std::vector<T>& inputs, const std::vector<T>& constants,
                            const std::vector<int64_t>& stages, const std::vector<double>& eps,
                            const std::vector<int64_t>& results) {
  const char* op = "linear_chain";
  if (inputs.empty()) fail(op, "there must be an input");
  const T& first = inputs[0];
  check_float(op, "inputs", first.scalar_type());
  std::vector<T> values;
  std::vector<int64_t> leading;
  for (int64_t i = 0; i + 1 < first.dim(); ++i) leading.push_back(first.size(i));
  for (const T& t : inputs) {
    if (t.dim() != first.dim() || t.dim() < 1) fail(op, "inputs must have the leading sizes of the first one");
    auto shape = leading;
    shape.push_back(t.size(t.dim() - 1));
    check_shape(op, "inputs", t, shape);
    if (t.scalar_type() != first.scalar_type() || !t.is_cpu()) fail(op, "inputs must have one dtype, on the CPU");
    values.push_back(memory.contiguous(t));
  }
  const auto value = [&](int64_t i) -> const T& {
    if (i < 0 || i >= int64_t(values.size())) fail(op, "there is no value ", i, " at this stage");
    return values[size_t(i)];
  };
  if (eps.size() < 1 || eps.size() > size_t(kMostStages)) fail(op, "there must be 1..", kMostStages, " stages, got ", eps.size());
  ChainReader<T> read(constants, stages);
  std::vector<Stage> all(eps.size());
  std::vector<std::vector<Part>> parts(eps.size());
  Chain c{};
  for (size_t s = 0; s < eps.size(); ++s) {
    Stage& stage = all[s];
    Linear& a = stage.linear;
    const T x = value(read.number());
    check_rows(op, x, a);
    if (a.m > kMostRows) fail(op, "at most ", kMostRows, " rows, got ", a.m);
    const int64_t cols = x.size(x.dim() - 1);
    stage.norm = read_norm(op, read, cols, eps[s]);
    const std::optional<T> codes = read.constant(), scale = read.constant(), zero = read.constant(), bias = read.constant();
    const int64_t bits = read.number(), group_size = read.number(), activation = read.number();
    a.glu = read.number() != 0;
    const int64_t add = read.number(), count = read.number();
    if (activation < 0 || activation > int64_t(kLastActivation)) fail(op, "there is no activation ", activation);
    a.activation = Activation(activation);
    if (count < 1 || count > 64 || (count > 1 && (a.glu || add != -1))) fail(op, "a stage cannot have ", count, " parts");
    int64_t rows = 0;
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < count; ++i) {
      sizes.push_back(read.number());
      if (sizes.back() < 1 || sizes.back() > std::numeric_limits<int32_t>::max()) fail(op, "parts must have rows");
      a.units += (sizes.back() + kTile - 1) / kTile;
      rows += sizes.back();
    }
    a.x = bytes(x);
    c.threads = a.threads = int(torch::stable::get_num_threads());
    a.part_count = count;
    if (!codes) {
      if (stage.norm.weight == nullptr || scale || zero || bias || a.glu || add != -1 || count != 1 || rows != cols)
        fail(op, "a stage without codes must be a norm, of as many columns as it reads");
      a.units = 0;
      auto shape = leading;
      shape.push_back(cols);
      values.push_back(memory.make(shape, dense_strides(shape), first.scalar_type()));
      parts[s].push_back({0, cols, values.back().mutable_data_ptr(), nullptr, nullptr});
      a.parts = parts[s].data();
      continue;
    }
    if (!scale) fail(op, "a stage with codes must have a scale");
    const int64_t halves = a.glu ? 2 : 1;
    a.w = check_weight(op, *codes, *scale, zero, bits, group_size, a.units * halves, cols);
    a.exact = a.w.code != Code::kInteger;
    const char* bias_at = check_bias(op, bias, x.scalar_type(), rows * halves, a.bias_dtype);
    if (add != -1) {
      const T& other = value(add);
      auto shape = leading;
      shape.push_back(rows);
      check_shape(op, "what is added", other, shape);
      a.add = bytes(other);
    }
    int64_t unit = 0;
    for (const int64_t size : sizes) {
      auto shape = leading;
      shape.push_back(size);
      values.push_back(memory.make(shape, dense_strides(shape), first.scalar_type()));
      const char* up = a.glu && bias_at != nullptr ? bias_at + rows * int64_t(element_size(a.bias_dtype)) : nullptr;
      parts[s].push_back({unit, size, values.back().mutable_data_ptr(), bias_at, up});
      unit += (size + kTile - 1) / kTile;
      if (bias_at != nullptr) bias_at += size * int64_t(element_size(a.bias_dtype));
    }
    a.parts = parts[s].data();
    c.thread_bytes = std::max(c.thread_bytes, stage_bytes(a));
  }
  if (!read.done()) fail(op, "the description of the stages goes on after the last one");
  std::vector<T> out;
  for (const int64_t i : results) {
    if (i < int64_t(inputs.size())) fail(op, "value ", i, " is an input, not a result");
    out.push_back(value(i));
  }
  if (all[0].linear.m == 0) return out;
  const Scratch scratch(c.thread_bytes * size_t(c.threads));
  c.stages = all.data();
  c.count = int64_t(all.size());
  c.scratch = scratch.data();
  c.parallel = parallel;
  kernels().chain(c);
  return out;
}

}  // namespace
}  // namespace qcompile
