// The operator linear_chain: what its stages are is checked once, into a plan; a call only says where the memory is.
// kernels/ops/linear_chain.py says what the numbers of a stage are.
#pragma once

#include "op_linear.h"

namespace qcompile {
namespace {

// Reads a chain's description front to back: numbers, and which constants they name.
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
  // The constant, and its number in `index`, -1 for none.
  std::optional<T> constant(int64_t& index) {
    index = number();
    if (index == -1) return std::nullopt;
    if (index < 0 || index >= int64_t(constants_.size())) fail("linear_chain", "there is no constant ", index);
    return constants_[size_t(index)];
  }

 private:
  const std::vector<T>& constants_;
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;
};

// The norm of a stage that reads `cols` columns, and which constants its weight and bias are.
template <class T>
Norm read_norm(const char* op, ChainReader<T>& read, int64_t cols, double eps, int64_t& weight, int64_t& bias) {
  const char* what = "weight and bias of a norm";
  Norm norm{};
  for (int64_t* index : {&weight, &bias}) {
    const std::optional<T> held = read.constant(*index);
    if (!held) continue;
    if (index == &bias && weight == -1) fail(op, "a norm with a bias must have a weight");
    check_shape(op, what, *held, {cols});
    check_memory(op, what, *held);
    const DType type = check_float(op, what, held->scalar_type());
    if (index == &bias && type != norm.dtype) fail(op, what, " must have one dtype");
    norm.dtype = type;
  }
  norm.centered = read.number() != 0;
  norm.eps = float(eps);
  if (!(eps >= 0.0)) fail(op, "eps must not be negative, got ", eps);
  return norm;
}

// What a chain does with memory that it is told of at each call.
class ChainPlan {
 public:
  // Of inputs and constants nothing is read, but for how they lie.
  template <class T>
  ChainPlan(const std::vector<T>& inputs, const std::vector<T>& constants, const std::vector<int64_t>& stages,
            const std::vector<double>& eps, const std::vector<int64_t>& results)
      : inputs_(inputs.size()) {
    if (inputs.empty()) fail(kOp, "there must be an input");
    const T& first = inputs[0];
    dtype_ = first.scalar_type();
    check_float(kOp, "inputs", dtype_);
    for (int64_t i = 0; i + 1 < first.dim(); ++i) leading_.push_back(first.size(i));
    for (const T& t : inputs) {
      if (t.dim() != first.dim() || t.dim() < 1) fail(kOp, "inputs must have the leading sizes of the first one");
      shapes_.push_back(leading_);
      shapes_.back().push_back(t.size(t.dim() - 1));
      check_shape(kOp, "inputs", t, shapes_.back());
      if (t.scalar_type() != dtype_ || !t.is_cpu()) fail(kOp, "inputs must have one dtype, on the CPU");
    }
    if (eps.size() < 1 || eps.size() > size_t(kMostStages)) fail(kOp, "there must be 1..", kMostStages, " stages, got ", eps.size());
    ChainReader<T> read(constants, stages);
    for (const double e : eps) add_stage(read, e);
    if (!read.done()) fail(kOp, "the description of the stages goes on after the last one");
    for (const int64_t i : results) {
      if (i < int64_t(inputs_)) fail(kOp, "value ", i, " is an input, not a result");
      shape(i);
    }
  }

  size_t inputs() const { return inputs_; }
  ScalarType dtype() const { return dtype_; }  // of all values
  const std::vector<std::vector<int64_t>>& shapes() const { return shapes_; }  // of inputs, and then of what stages give

  // `values`: where inputs are, contiguous, and where what stages give is to go; `constants`: where these are.
  void run(char* const* values, const char* const* constants) const {
    if (stages_[0].stage.linear.m == 0) return;
    Stage all[kMostStages];
    std::vector<Part> parts = parts_;
    const int threads = int(torch::stable::get_num_threads());
    const auto constant = [&](int64_t i) { return i == -1 ? nullptr : constants[i]; };
    for (size_t s = 0; s < stages_.size(); ++s) {
      const Planned& planned = stages_[s];
      all[s] = planned.stage;
      Linear& a = all[s].linear;
      a.x = values[planned.x];
      a.add = planned.add == -1 ? nullptr : values[planned.add];
      a.w.codes = reinterpret_cast<const uint8_t*>(constant(planned.codes));
      a.w.scale = constant(planned.scale);
      a.w.zero = constant(planned.zero);
      all[s].norm.weight = constant(planned.norm);
      all[s].norm.bias = constant(planned.norm_bias);
      a.threads = threads;
      Part* own = parts.data() + planned.part;
      a.parts = own;
      const char* bias = constant(planned.bias);
      for (int64_t i = 0; i < a.part_count; ++i) {
        own[i].out = values[planned.out + i];
        if (bias == nullptr) continue;
        const int64_t size = own[i].rows * int64_t(element_size(a.bias_dtype));
        own[i].bias = bias;
        if (a.glu) own[i].bias_up = bias + size;
        bias += size;
      }
    }
    const Scratch scratch(thread_bytes_ * size_t(threads));
    kernels().chain({all, int64_t(stages_.size()), scratch.data(), thread_bytes_, threads, parallel});
  }

 private:
  static constexpr const char* kOp = "linear_chain";

  // A stage without pointers, and the numbers of what they will point to; of its parts, and of what it gives, the first.
  struct Planned {
    Stage stage;
    int64_t x, add, norm, norm_bias, codes, scale, zero, bias, part, out;
  };

  const std::vector<int64_t>& shape(int64_t i) const {
    if (i < 0 || i >= int64_t(shapes_.size())) fail(kOp, "there is no value ", i, " at this stage");
    return shapes_[size_t(i)];
  }

  template <class T>
  void add_stage(ChainReader<T>& read, double eps) {
    Planned planned{};
    Linear& a = planned.stage.linear;
    planned.x = read.number();
    const int64_t cols = shape(planned.x).back();
    a.dtype = *float_type(dtype_);
    a.parallel = parallel;
    a.m = 1;
    for (const int64_t n : leading_) a.m *= n;
    if (a.m > kMostRows) fail(kOp, "at most ", kMostRows, " rows, got ", a.m);
    planned.stage.norm = read_norm(kOp, read, cols, eps, planned.norm, planned.norm_bias);
    const std::optional<T> codes = read.constant(planned.codes), scale = read.constant(planned.scale);
    const std::optional<T> zero = read.constant(planned.zero), bias = read.constant(planned.bias);
    const int64_t bits = read.number(), group_size = read.number(), activation = read.number();
    a.glu = read.number() != 0;
    planned.add = read.number();
    a.part_count = read.number();
    if (activation < 0 || activation > int64_t(kLastActivation)) fail(kOp, "there is no activation ", activation);
    a.activation = Activation(activation);
    if (a.part_count < 1 || a.part_count > 64 || (a.part_count > 1 && (a.glu || planned.add != -1)))
      fail(kOp, "a stage cannot have ", a.part_count, " parts");
    planned.part = int64_t(parts_.size());
    planned.out = int64_t(shapes_.size());
    int64_t rows = 0;
    for (int64_t i = 0; i < a.part_count; ++i) {
      const int64_t size = read.number();
      if (size < 1 || size > std::numeric_limits<int32_t>::max()) fail(kOp, "parts must have rows");
      parts_.push_back({a.units, size, nullptr, nullptr, nullptr});
      a.units += (size + kTile - 1) / kTile;
      rows += size;
    }
    if (planned.add != -1 && shape(planned.add).back() != rows)
      fail(kOp, "what is added must have ", rows, " columns, got ", shape(planned.add).back());
    if (!codes) {
      if (planned.norm == -1 || scale || zero || bias || a.glu || planned.add != -1 || a.part_count != 1 || rows != cols)
        fail(kOp, "a stage without codes must be a norm, of as many columns as it reads");
      a.units = 0;
    } else {
      if (!scale) fail(kOp, "a stage with codes must have a scale");
      const int64_t halves = a.glu ? 2 : 1;
      a.w = check_weight(kOp, *codes, *scale, zero, bits, group_size, a.units * halves, cols);
      a.exact = a.w.code != Code::kInteger;
      check_bias(kOp, bias, dtype_, rows * halves, a.bias_dtype);
      thread_bytes_ = std::max(thread_bytes_, stage_bytes(a));
    }
    for (int64_t i = 0; i < a.part_count; ++i) {
      shapes_.push_back(leading_);
      shapes_.back().push_back(parts_[size_t(planned.part + i)].rows);
    }
    stages_.push_back(planned);
  }

  ScalarType dtype_;
  size_t inputs_, thread_bytes_ = 0;
  std::vector<int64_t> leading_;
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<Planned> stages_;
  std::vector<Part> parts_;
};

std::vector<Tensor> linear_chain(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants,
                                 const std::vector<int64_t>& stages, const std::vector<double>& eps,
                                 const std::vector<int64_t>& results) {
  const ChainPlan plan(inputs, constants, stages, eps, results);
  std::vector<Tensor> held;  // all values
  for (const Tensor& t : inputs) held.push_back(TorchMemory().contiguous(t));
  for (size_t i = plan.inputs(); i < plan.shapes().size(); ++i) held.push_back(make(plan.shapes()[i], plan.dtype()));
  std::vector<char*> values;
  for (const Tensor& t : held) values.push_back(static_cast<char*>(const_cast<void*>(t.const_data_ptr())));
  std::vector<const char*> read;
  for (const Tensor& t : constants) read.push_back(bytes(t));
  plan.run(values.data(), read.data());
  std::vector<Tensor> out;
  for (const int64_t i : results) out.push_back(held[size_t(i)]);
  return out;
}

}  // namespace
}  // namespace qcompile
