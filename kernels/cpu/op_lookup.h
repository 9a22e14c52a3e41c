// The operators embedding_tiled and dequantize_tiled: checks, then the kernel.
#pragma once

#include "op_checks.h"

namespace qcompile {
namespace {

Tensor embedding_tiled(const Tensor& indices, const Tensor& codes, const Tensor& scale,
                       const std::optional<Tensor>& zero, int64_t bits, int64_t group_size, int64_t num_embeddings,
                       int64_t embedding_dim, ScalarType dtype) {
  const char* op = "embedding_tiled";
  if (num_embeddings < 1 || num_embeddings > std::numeric_limits<int32_t>::max())
    fail(op, "num_embeddings must be positive, got ", num_embeddings);
  Decode d{};
  d.w = check_weight(op, codes, scale, zero, bits, group_size, (num_embeddings + kTile - 1) / kTile, embedding_dim);
  d.dtype = check_float(op, "dtype", dtype);
  d.wide_indices = indices.scalar_type() == ScalarType::Long;
  if (!d.wide_indices && indices.scalar_type() != ScalarType::Int) fail(op, "indices must be int64 or int32");
  if (!indices.is_cpu()) fail(op, "indices must be on the CPU like the table");
  // A copy, so that nobody can change an index between its check and its use.
  d.count = indices.numel();
  const Tensor flat = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  std::vector<int64_t> rows(static_cast<size_t>(d.count));
  for (int64_t i = 0; i < d.count; ++i) {
    const int64_t row = d.wide_indices ? static_cast<const int64_t*>(flat.const_data_ptr())[i]
                                       : static_cast<const int32_t*>(flat.const_data_ptr())[i];
    if (row < 0 || row >= num_embeddings)
      fail(op, "index ", row, " at position ", i, " is out of range, allowed is 0..", num_embeddings - 1);
    rows[size_t(i)] = row;
  }
  d.indices = rows.data();
  d.wide_indices = true;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < indices.dim(); ++i) shape.push_back(indices.size(i));
  shape.push_back(embedding_dim);
  const Tensor out = make(shape, dtype);
  d.out = static_cast<char*>(out.mutable_data_ptr());
  d.parallel = parallel;
  kernels().decode(d);
  return out;
}

Tensor dequantize_tiled(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero, int64_t bits,
                        int64_t group_size, int64_t rows, int64_t cols, ScalarType dtype) {
  const char* op = "dequantize_tiled";
  Decode d{};
  if (codes.dim() != 3) fail(op, "codes must be [tiles, blocks, 64 * bits], got ", shape_of(codes));
  d.w = check_weight(op, codes, scale, zero, bits, group_size, codes.size(0), cols);
  if (rows < 0 || rows > d.w.tiles * kTile)
    fail(op, "rows must be in 0..", d.w.tiles * kTile, " (16 a tile), got ", rows);
  d.dtype = check_float(op, "dtype", dtype);
  d.count = rows;
  const Tensor out = make({rows, cols}, dtype);
  d.out = static_cast<char*>(out.mutable_data_ptr());
  d.parallel = parallel;
  kernels().decode(d);
  return out;
}

}  // namespace
}  // namespace qcompile
