// The operators linear_tiled and linear_tiled_split: checks, then the kernel.
#pragma once

#include "op_checks.h"

namespace qcompile {
namespace {

Activation check_activation(const char* op, const std::string& name) {
  static const char* const kNames[] = {"none",    "relu", "gelu",  "gelu_tanh", "silu",
                                       "sigmoid", "tanh", "relu6", "hardswish", "hardsigmoid"};
  for (int i = 0; i < 10; ++i)
    if (name == kNames[i]) return Activation(i);
  fail(op, "activation must be one of none, relu, gelu, gelu_tanh, silu, sigmoid, tanh, relu6, hardswish, hardsigmoid, got '",
       name, "'");
}

// A scale of activations: positive, and its reciprocal finite.
template <class T>
float check_scale(const char* op, const char* name, const T& t) {
  if (t.scalar_type() != ScalarType::Float || t.dim() != 0)
    fail(op, name, " must be a float32 scalar, got ", shape_of(t));
  check_memory(op, name, t);
  const float scale = *static_cast<const float*>(t.const_data_ptr());
  if (!(scale >= 1e-36f && scale <= 1e36f)) fail(op, name, " must be in [1e-36, 1e36], got ", scale);
  return scale;
}

// Checks x and fills in what linears share.
template <class T>
void check_rows(const char* op, const T& x, Linear& a) {
  a.dtype = check_float(op, "x", x.scalar_type());
  if (x.dim() < 1) fail(op, "x must be [..., in_features], got a scalar");
  if (!x.is_cpu()) fail(op, "x must be on the CPU like the weight");
  a.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) a.m *= x.size(i);
}

// The same for linear_tiled and linear_tiled_split. Returns x, contiguous.
Tensor check_input(const char* op, const Tensor& x, Linear& a) {
  check_rows(op, x, a);
  return TorchMemory().contiguous(x);
}

template <class T>
const char* check_bias(const char* op, const std::optional<T>& bias, ScalarType dtype, int64_t size, DType& held) {
  if (!bias) return nullptr;
  check_shape(op, "bias", *bias, {size});
  check_memory(op, "bias", *bias);
  if (bias->scalar_type() != ScalarType::Float && bias->scalar_type() != dtype)
    fail(op, "bias must be float32 or have the dtype of x");
  held = *float_type(bias->scalar_type());
  return bytes(*bias);
}

// How activations are rounded: not at all, by a scale that is known, or by scales of their rows or blocks.
void check_rounding(const char* op, bool exact, const std::optional<Tensor>& x_scale, bool per_row, Linear& a) {
  a.exact = exact || a.w.code != Code::kInteger;
  a.per_row = per_row;
  if (int(exact) + int(per_row) + int(x_scale.has_value()) > 1) fail(op, "give one of exact, x_scale and per_row");
  if (!x_scale) return;
  a.x_scale = check_scale(op, "x_scale", *x_scale);
}

// Runs the kernel over all rows, in pieces whose scratch is kept: the pages of a fresh one cost more than rounding x into them.
void run(Linear a, std::vector<Part> parts) {
  a.parts = parts.data();
  a.part_count = int64_t(parts.size());
  a.parallel = parallel;
  a.threads = int(torch::stable::get_num_threads());
  const Kernels& k = kernels();
  const int64_t most = std::max<int64_t>(128, int64_t(kKeptScratch / ScratchPlan(a.w, 64, a.exact).bytes) * 64);
  const int64_t size = int64_t(element_size(a.dtype));
  for (int64_t left = a.m; left > 0; left -= most) {
    a.m = left < most ? left : most;
    const Scratch scratch(ScratchPlan(a.w, a.m, a.exact).bytes);
    a.scratch = scratch.data();
    k.linear(a);
    a.x += a.m * a.w.cols * size;
    for (Part& p : parts) p.out = static_cast<char*>(p.out) + a.m * p.rows * size;
    if (a.mul != nullptr) a.mul += a.m * parts[0].rows * size;
    if (a.add != nullptr) a.add += a.m * parts[0].rows * size;
  }
}

std::vector<int64_t> output_shape(const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(rows);
  return shape;
}

Tensor linear_tiled(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                    const std::optional<Tensor>& bias, int64_t bits, int64_t group_size, int64_t out_features,
                    const std::string& activation, const std::optional<Tensor>& mul, const std::optional<Tensor>& add,
                    bool glu, bool exact, const std::optional<Tensor>& x_scale, bool per_row) {
  const char* op = "linear_tiled";
  Linear a{};
  const Tensor input = check_input(op, x, a);
  if (out_features < 1 || out_features > std::numeric_limits<int32_t>::max())
    fail(op, "out_features must be positive, got ", out_features);
  a.units = (out_features + kTile - 1) / kTile;
  a.w = check_weight(op, codes, scale, zero, bits, group_size, a.units * (glu ? 2 : 1), x.size(x.dim() - 1));
  a.x = bytes(input);
  a.activation = check_activation(op, activation);
  a.glu = glu;
  check_rounding(op, exact, x_scale, per_row, a);
  const auto shape = output_shape(x, out_features);
  std::optional<Tensor> operands[2] = {mul, add};
  const char* names[2] = {"mul", "add"};
  for (int i = 0; i < 2; ++i) {
    if (!operands[i]) continue;
    check_shape(op, names[i], *operands[i], shape);
    if (operands[i]->scalar_type() != x.scalar_type()) fail(op, names[i], " must have the dtype of x");
    if (!operands[i]->is_cpu()) fail(op, names[i], " must be on the CPU like x");
    if (!operands[i]->is_contiguous()) operands[i] = torch::stable::contiguous(*operands[i]);
    (i == 0 ? a.mul : a.add) = bytes(*operands[i]);
  }
  const Tensor out = make(shape, x.scalar_type());
  Part part{0, out_features, out.mutable_data_ptr(), nullptr, nullptr};
  part.bias = check_bias(op, bias, x.scalar_type(), out_features * (glu ? 2 : 1), a.bias_dtype);
  if (glu && part.bias != nullptr) part.bias_up = part.bias + out_features * int64_t(element_size(a.bias_dtype));
  run(a, {part});
  return out;
}

// Without the arguments that have defaults.
Tensor linear_tiled_plain(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                          const std::optional<Tensor>& bias, int64_t bits, int64_t group_size, int64_t out_features) {
  static const std::string none = "none";
  return linear_tiled(x, codes, scale, zero, bias, bits, group_size, out_features, none, {}, {}, false, false, {}, false);
}

std::vector<Tensor> linear_tiled_split(const Tensor& x, const Tensor& codes, const Tensor& scale,
                                       const std::optional<Tensor>& zero, const std::optional<Tensor>& bias,
                                       int64_t bits, int64_t group_size, const std::vector<int64_t>& sizes, bool exact,
                                       const std::optional<Tensor>& x_scale, bool per_row) {
  const char* op = "linear_tiled_split";
  Linear a{};
  const Tensor input = check_input(op, x, a);
  int64_t rows = 0;
  for (int64_t s : sizes) {
    if (s < 1 || s > std::numeric_limits<int32_t>::max()) fail(op, "sizes must be positive row counts, got ", s);
    a.units += (s + kTile - 1) / kTile;
    rows += s;
  }
  if (sizes.empty()) fail(op, "sizes must name at least one part");
  a.w = check_weight(op, codes, scale, zero, bits, group_size, a.units, x.size(x.dim() - 1));
  a.x = bytes(input);
  check_rounding(op, exact, x_scale, per_row, a);
  const char* bias_at = check_bias(op, bias, x.scalar_type(), rows, a.bias_dtype);
  std::vector<Tensor> outputs;
  std::vector<Part> parts;
  int64_t unit = 0;
  for (int64_t s : sizes) {
    outputs.push_back(make(output_shape(x, s), x.scalar_type()));
    parts.push_back({unit, s, outputs.back().mutable_data_ptr(), bias_at, nullptr});
    unit += (s + kTile - 1) / kTile;
    if (bias_at != nullptr) bias_at += s * int64_t(element_size(a.bias_dtype));
  }
  run(a, parts);
  return outputs;
}

}  // namespace
}  // namespace qcompile
