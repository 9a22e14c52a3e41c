// The operator quantize_weight: checks, then the kernel.
#pragma once

#include <tuple>

#include "op_checks.h"

namespace qcompile {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_weight(const Tensor& weight, int64_t bits, int64_t group_size,
                                                           const std::string& mode, ScalarType scale_dtype) {
  const char* op = "quantize_weight";
  Encode a{};
  if (weight.dim() != 2) fail(op, "the weight must be a matrix, got ", shape_of(weight));
  a.dtype = check_float(op, "the weight", weight.scalar_type());
  check_memory(op, "the weight", weight);
  if (bits < 2 || bits == 7 || bits > 8) fail(op, "bits must be 2, 3, 4, 5, 6 or 8, got ", bits);
  if (group_size < 0) fail(op, "group_size must be positive, or 0 for one group a row, got ", group_size);
  a.bits = int(bits);
  a.rows = weight.size(0);
  a.cols = weight.size(1);
  a.group_size = group_size > 0 && group_size < a.cols ? group_size : a.cols;
  a.groups = a.cols > 0 ? (a.cols + a.group_size - 1) / a.group_size : 0;
  a.scale_dtype = check_float(op, "scale_dtype", scale_dtype);
  if (mode != "symmetric" && mode != "affine" && mode != "shift")
    fail(op, "mode must be symmetric, affine or shift, got ", mode);
  a.kind = mode == "symmetric" ? Zero::kMiddle : mode == "affine" ? Zero::kCode : Zero::kShift;
  a.row_bytes = (a.cols * bits + 7) / 8;
  const bool is_signed = bits == 8 && a.kind == Zero::kMiddle;
  const Tensor data = make({a.rows, a.row_bytes}, is_signed ? ScalarType::Char : ScalarType::Byte);
  const Tensor scale = make({a.rows, a.groups}, scale_dtype);
  const Tensor zero = make({a.kind == Zero::kMiddle ? 0 : a.rows, a.groups}, a.kind == Zero::kCode ? ScalarType::Byte : scale_dtype);
  const Tensor squares = make({a.rows, 2}, ScalarType::Double);
  a.x = bytes(weight);
  a.data = static_cast<uint8_t*>(data.mutable_data_ptr());
  a.scale = scale.mutable_data_ptr();
  a.zero = zero.mutable_data_ptr();
  a.squares = static_cast<double*>(squares.mutable_data_ptr());
  a.parallel = parallel;
  constexpr int64_t kGrain = 1 << 15;  // values that are worth a thread
  const int64_t worth = a.rows * a.cols / kGrain + 1;
  a.parts = std::min({worth, a.rows, int64_t(torch::stable::get_num_threads())});
  a.part_scratch = a.kind == Zero::kCode ? (a.group_size + kTile - 1) / kTile * kTile + kTile : 0;
  const Scratch scratch(size_t(a.parts * a.part_scratch) * 4);
  a.scratch = reinterpret_cast<float*>(scratch.data());
  if (a.parts > 0) kernels().encode(a);
  return {data, scale, zero, squares};
}

}  // namespace
}  // namespace qcompile
