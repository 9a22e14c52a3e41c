// What lies between the products of a token: element by element on a few thousand values, in one thread. Each result is rounded
// to its dtype, as torch does.
#pragma once

#include <array>

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

// One pass over a result and at most three operands that broadcast to it; made when a program is read, run at each call.
class Loop {
 public:
  // Their places do not matter yet, only how they lie.
  Loop(const char* op, const Ref& out, std::initializer_list<const Ref*> operands) : axes_(out.dim()), total_(out.numel()) {
    type_ = check_float(op, "the result", out.scalar_type());
    for (int64_t i = 0; i < axes_; ++i) {
      size_[i] = out.size(i);
      to_[i] = out.stride(i) * int64_t(out.element_size());
    }
    int64_t(*step)[kMostAxes] = from_;
    for (const Ref* t : operands) {
      if (t->scalar_type() != out.scalar_type()) fail(op, "operands must have the dtype of the result");
      lay(op, *t, out, *step++);
    }
  }

  // f of each pair of two operands.
  template <class Fn>
  void run(char* to, const char* a, const char* b, Fn f) const {
    const int64_t n = length(), s = last(to_), sa = last(from_[0]), sb = last(from_[1]);
    const bool plain = type_ == DType::kFloat32 && s == 4 && sa == 4 && (sb == 4 || sb == 0);
    rows(to, {a, b, b}, [&](char* out, const char* x, const char* y, const char*) {
      if (plain) {
        const float *p = reinterpret_cast<const float*>(x), *q = reinterpret_cast<const float*>(y);
        float* r = reinterpret_cast<float*>(out);
        if (sb == 4)
          for (int64_t i = 0; i < n; ++i) r[i] = f(p[i], q[i]);
        else
          for (int64_t i = 0; i < n; ++i) r[i] = f(p[i], q[0]);
      } else {
        for (int64_t i = 0; i < n; ++i)
          store_one(out + i * s, type_, f(load_one(x + i * sa, type_), load_one(y + i * sb, type_)));
      }
    });
  }
  void copy(char* to, const char* from) const {
    run(to, from, from, [](float x, float) { return x; });
  }
  // Pairs of the first and second half of each row, turned by an angle of which the cosines and sines are given.
  void rotate(char* to, const char* x, const char* cos, const char* sin) const {
    const int64_t half = length() / 2, s = last(to_), sx = last(from_[0]), sc = last(from_[1]), ss = last(from_[2]);
    const bool plain = type_ == DType::kFloat32 && s == 4 && sx == 4 && sc == 4 && ss == 4;
    rows(to, {x, cos, sin}, [&](char* out, const char* a, const char* b, const char* c) {
      if (plain)
        turn<float>(half, out, a, b, c);
      else
        turn(half, out, s, a, sx, b, sc, c, ss);
    });
  }

 private:
  int64_t length() const { return axes_ > 0 ? size_[axes_ - 1] : 1; }
  int64_t last(const int64_t* step) const { return axes_ > 0 ? step[axes_ - 1] : 0; }

  // f of each row of the result and the operands.
  template <class Fn>
  void rows(char* to, std::array<const char*, 3> from, Fn f) const {
    if (total_ == 0) return;
    int64_t at[kMostAxes] = {};
    for (int64_t left = total_ / length(); left > 0; --left) {
      f(to, from[0], from[1], from[2]);
      for (int64_t i = axes_ - 2; i >= 0; --i) {
        const bool more = ++at[i] < size_[i];
        const int64_t moved = more ? 1 : 1 - at[i];
        to += moved * to_[i];
        for (int k = 0; k < 3; ++k) from[size_t(k)] += moved * from_[k][i];
        if (more) break;
        at[i] = 0;
      }
    }
  }

  template <class Float>
  static void turn(int64_t half, char* out, const char* x, const char* cos, const char* sin) {
    const Float *a = reinterpret_cast<const Float*>(x), *c = reinterpret_cast<const Float*>(cos);
    const Float* s = reinterpret_cast<const Float*>(sin);
    Float* to = reinterpret_cast<Float*>(out);
    for (int64_t i = 0; i < half; ++i) to[i] = a[i] * c[i] + -a[i + half] * s[i];
    for (int64_t i = half; i < 2 * half; ++i) to[i] = a[i] * c[i] + a[i - half] * s[i];
  }
  // The same for other dtypes and strides.
  void turn(int64_t half, char* out, int64_t s, const char* x, int64_t sx, const char* cos, int64_t sc, const char* sin,
            int64_t ss) const {
    const auto product = [&](const char* p, const char* q, float sign) {
      return rounded(sign * load_one(p, type_) * load_one(q, type_));
    };
    for (int64_t i = 0; i < 2 * half; ++i) {
      const float turned = i < half ? product(x + (i + half) * sx, sin + i * ss, -1.0f) : product(x + (i - half) * sx, sin + i * ss, 1.0f);
      store_one(out + i * s, type_, product(x + i * sx, cos + i * sc, 1.0f) + turned);
    }
  }
  float rounded(float f) const {
    char held[4];
    store_one(held, type_, f);
    return load_one(held, type_);
  }

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
  int64_t size_[kMostAxes] = {}, to_[kMostAxes] = {}, from_[3][kMostAxes] = {};  // steps in bytes
};

// A dense copy.
template <class Memory>
Ref dense(Memory& memory, const Ref& a) {
  const Ref out = memory.make(a.sizes(), dense_strides(a.sizes()), a.scalar_type());
  Loop("contiguous", out, {&a}).copy(static_cast<char*>(out.mutable_data_ptr()), bytes(a));
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
