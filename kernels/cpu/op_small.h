// What lies between the products of a token: element by element on a few thousand values, in one thread. Each result is rounded
// to its dtype, as torch does.
#pragma once

#include "half.h"
#include "ref.h"

namespace qcompile {
namespace {

inline float load_one(const char* p, DType t) {
  if (t == DType::kFloat32) {
    float f;
    std::memcpy(&f, p, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  return t == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
}

inline void store_one(char* p, DType t, float f) {
  if (t == DType::kFloat32) {
    std::memcpy(p, &f, 4);
    return;
  }
  const uint16_t h = t == DType::kFloat16 ? to_float16(f) : to_bfloat16(f);
  std::memcpy(p, &h, 2);
}

// One pass over a result and at most two operands that broadcast to it; made when a program is read, run at each call.
class Loop {
 public:
  // Their places do not matter yet, only how they lie. Without b the second operand is the first.
  Loop(const char* op, const Ref& out, const Ref& a, const Ref& b) : axes_(out.dim()), total_(out.numel()) {
    type_ = check_float(op, "the result", out.scalar_type());
    for (const Ref* t : {&a, &b})
      if (t->scalar_type() != out.scalar_type()) fail(op, "operands must have the dtype of the result");
    for (int64_t i = 0; i < axes_; ++i) {
      size_[i] = out.size(i);
      to_[i] = out.stride(i) * int64_t(out.element_size());
    }
    lay(op, a, out, a_);
    lay(op, b, out, b_);
  }
  Loop(const char* op, const Ref& out, const Ref& a) : Loop(op, out, a, a) {}

  template <class Fn>
  void run(char* to, const char* a, const char* b, Fn f) const {
    if (total_ == 0) return;
    const int64_t last = axes_ - 1, n = axes_ > 0 ? size_[last] : 1;
    const int64_t s = axes_ > 0 ? to_[last] : 0, sa = axes_ > 0 ? a_[last] : 0, sb = axes_ > 0 ? b_[last] : 0;
    const bool plain = type_ == DType::kFloat32 && s == 4 && sa == 4 && (sb == 4 || sb == 0);
    int64_t at[kMostAxes] = {};
    for (int64_t rows = total_ / n; rows > 0; --rows) {
      if (plain) {
        const float *p = reinterpret_cast<const float*>(a), *q = reinterpret_cast<const float*>(b);
        float* r = reinterpret_cast<float*>(to);
        if (sb == 4)
          for (int64_t i = 0; i < n; ++i) r[i] = f(p[i], q[i]);
        else
          for (int64_t i = 0; i < n; ++i) r[i] = f(p[i], q[0]);
      } else {
        for (int64_t i = 0; i < n; ++i)
          store_one(to + i * s, type_, f(load_one(a + i * sa, type_), load_one(b + i * sb, type_)));
      }
      for (int64_t i = last - 1; i >= 0; --i) {
        to += to_[i], a += a_[i], b += b_[i];
        if (++at[i] < size_[i]) break;
        to -= at[i] * to_[i], a -= at[i] * a_[i], b -= at[i] * b_[i];
        at[i] = 0;
      }
    }
  }
  void copy(char* to, const char* from) const {
    run(to, from, from, [](float x, float) { return x; });
  }

 private:
  static void lay(const char* op, const Ref& t, const Ref& out, int64_t* step) {
    const int64_t skip = out.dim() - t.dim();
    bool fits = skip >= 0;
    for (int64_t i = 0; fits && i < t.dim(); ++i) {
      fits = t.size(i) == 1 || t.size(i) == out.size(skip + i);
      step[skip + i] = t.size(i) == 1 ? 0 : t.stride(i) * int64_t(t.element_size());
    }
    if (!fits) fail(op, "an operand of ", shape_of(t), " does not broadcast to ", shape_of(out));
  }

  int64_t axes_, total_;
  DType type_;
  int64_t size_[kMostAxes] = {}, to_[kMostAxes] = {}, a_[kMostAxes] = {}, b_[kMostAxes] = {};  // steps in bytes
};

// A dense copy.
template <class Memory>
Ref dense(Memory& memory, const Ref& a) {
  const Ref out = memory.make(a.sizes(), dense_strides(a.sizes()), a.scalar_type());
  Loop("contiguous", out, a).copy(static_cast<char*>(out.mutable_data_ptr()), bytes(a));
  return out;
}

int64_t check_axis(const char* op, int64_t axis, int64_t axes) {
  if (axis < -axes || axis >= axes) fail(op, "there is no axis ", axis);
  return axis < 0 ? axis + axes : axis;
}

// `t` from its beginning on along an axis.
Ref narrow(const Ref& t, int64_t axis, int64_t count) {
  auto sizes = t.sizes();
  sizes[size_t(axis)] = count;
  return t.seen(0, sizes, t.strides());
}

int64_t index_at(const Ref& index, int64_t i) {
  const char* p = bytes(index) + (index.dim() > 0 ? i * index.stride(0) * int64_t(index.element_size()) : 0);
  if (index.scalar_type() == ScalarType::Int) return *reinterpret_cast<const int32_t*>(p);
  return *reinterpret_cast<const int64_t*>(p);
}

}  // namespace
}  // namespace qcompile
