// Norms of rows, as steps of a sequence: checks, then the kernel.
#pragma once

#include "ref.h"

namespace qcompile {
namespace {

template <class Memory>
Ref norm_rows(Memory& memory, const char* op, const Ref& given, const std::optional<Ref>& weight, const std::optional<Ref>& bias,
              double eps, bool centered) {
  NormRows a{};
  if (given.dim() < 1) fail(op, "x must have an axis");
  a.cols = given.size(given.dim() - 1);
  a.dtype = check_float(op, "x", given.scalar_type());
  a.norm.centered = centered;
  a.norm.eps = float(eps);
  if (!(eps >= 0.0)) fail(op, "eps must not be negative, got ", eps);
  if (!weight) fail(op, "there must be a weight");
  a.norm.dtype = check_float(op, "the weight", weight->scalar_type());
  for (const std::optional<Ref>* held : {&weight, &bias}) {
    if (!*held) continue;
    check_shape(op, "weight and bias", **held, {a.cols});
    check_memory(op, "weight and bias", **held);
    if ((*held)->scalar_type() != weight->scalar_type()) fail(op, "weight and bias must have one dtype");
    (held == &weight ? a.norm.weight : a.norm.bias) = bytes(**held);
  }
  const Ref x = memory.contiguous(given);
  a.x = bytes(x);
  a.rows = a.cols > 0 ? x.numel() / a.cols : 0;
  a.parallel = parallel;
  const Ref out = memory.make(x.sizes(), dense_strides(x.sizes()), x.scalar_type());
  a.out = static_cast<char*>(out.mutable_data_ptr());
  if (a.rows > 0) kernels().norm(a);
  return out;
}

template <class Memory>
Ref layer_norm(Memory& memory, const Ref& x, const std::optional<Ref>& weight, const std::optional<Ref>& bias, double eps) {
  return norm_rows(memory, "layer_norm", x, weight, bias, eps, true);
}

template <class Memory>
Ref rms_norm(Memory& memory, const Ref& x, const std::optional<Ref>& weight, double eps) {
  return norm_rows(memory, "rms_norm", x, weight, std::optional<Ref>(), eps, false);
}

}  // namespace
}  // namespace qcompile
