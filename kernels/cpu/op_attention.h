// The operator attention: checks, then the kernel.
#pragma once

#include "attention_plan.h"
#include "op_checks.h"

namespace qcompile {
namespace {

// Byte strides of batch, head and position, and where the data begins. Returns what holds it: t, or a copy of it.
template <class Memory, class T = typename Memory::T>
T check_heads(Memory& memory, const char* name, const T& t, const std::vector<int64_t>& shape, const T& q, const char*& data,
              int64_t* strides) {
  const char* op = "attention";
  check_shape(op, name, t, shape);
  if (t.scalar_type() != q.scalar_type()) fail(op, name, " must have the dtype of q");
  if (!t.is_cpu()) fail(op, name, " must be on the CPU like q");
  const T held = t.size(3) == 1 || t.stride(3) == 1 ? t : memory.contiguous(t);
  for (int i = 0; i < 3; ++i) strides[i] = held.stride(i) * int64_t(held.element_size());
  data = bytes(held);
  return held;
}

template <class T>
void check_mask(const T& mask, const T& q, Attention& a) {
  const char* op = "attention";
  const int64_t shape[4] = {a.batch, a.heads, a.queries, a.keys};
  bool fits = mask.dim() <= 4;
  for (int64_t i = 0; fits && i < mask.dim(); ++i) {
    const int64_t axis = 4 - mask.dim() + i, size = mask.size(i);
    fits = size == 1 || size == shape[axis];
    a.mask_stride[axis] = size == 1 ? 0 : mask.stride(i) * int64_t(mask.element_size());
  }
  if (!fits)
    fail(op, "mask must broadcast to [", a.batch, ", ", a.heads, ", ", a.queries, ", ", a.keys, "], got ", shape_of(mask));
  if (!mask.is_cpu()) fail(op, "mask must be on the CPU like q");
  a.mask_is_bool = mask.scalar_type() == ScalarType::Bool;
  if (!a.mask_is_bool) {
    if (mask.scalar_type() != ScalarType::Float && mask.scalar_type() != q.scalar_type())
      fail(op, "mask must be bool, float32 or have the dtype of q");
    a.mask_dtype = *float_type(mask.scalar_type());
  }
  a.mask = bytes(mask);
}

template <class Memory, class T = typename Memory::T>
T attention(Memory& memory, const T& q, const T& k, const T& v, const std::optional<T>& mask, double scale, bool is_causal) {
  const char* op = "attention";
  Attention a{};
  a.dtype = check_float(op, "q", q.scalar_type());
  for (const T* t : {&q, &k, &v})
    if (t->dim() != 4) fail(op, "q, k and v must be [batch, heads, positions, head size], got ", shape_of(*t));
  a.batch = q.size(0), a.heads = q.size(1), a.queries = q.size(2), a.dim = q.size(3);
  a.kv_heads = k.size(1), a.keys = k.size(2), a.value_dim = v.size(3);
  if (a.dim < 1 || a.dim > kRowFloats || a.value_dim < 1 || a.value_dim > kRowFloats)
    fail(op, "head sizes must be in 1..", kRowFloats, ", got ", a.dim, " and ", a.value_dim);
  if (a.kv_heads > 0 ? a.heads % a.kv_heads != 0 : a.heads != 0)
    fail(op, "the heads of q must be a multiple of those of k and v, got ", a.heads, " and ", a.kv_heads);
  [[maybe_unused]] const T held[3] = {
      check_heads(memory, "q", q, {a.batch, a.heads, a.queries, a.dim}, q, a.q, a.q_stride),
      check_heads(memory, "k", k, {a.batch, a.kv_heads, a.keys, a.dim}, q, a.k, a.k_stride),
      check_heads(memory, "v", v, {a.batch, a.kv_heads, a.keys, a.value_dim}, q, a.v, a.v_stride),
  };
  if (mask && is_causal) fail(op, "mask and is_causal exclude each other: give one");
  if (mask) check_mask(*mask, q, a);
  a.causal = is_causal;
  a.scale = float(scale);
  // in memory [batch, queries, heads, value_dim], so that merging the heads, which comes next, moves nothing
  auto size = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t position = size(a.heads) * a.value_dim;
  const std::vector<int64_t> strides = {size(a.queries) * position, a.value_dim, position, 1};
  const T out = memory.make({a.batch, a.heads, a.queries, a.value_dim}, strides, q.scalar_type());
  for (int i = 0; i < 3; ++i) a.out_stride[i] = strides[size_t(i)] * int64_t(element_size(a.dtype));
  a.out = static_cast<char*>(out.mutable_data_ptr());
  a.threads = int(torch::stable::get_num_threads());
  a.parallel = parallel;
  const Scratch scratch(attention_scratch(a));
  a.scratch = scratch.data();
  kernels().attention(a);
  return out;
}

}  // namespace
}  // namespace qcompile
