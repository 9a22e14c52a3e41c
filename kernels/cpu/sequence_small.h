// Steps of a sequence that are loops of their own, made when the program is read.
#pragma once

#include "sequence_steps.h"

namespace qcompile {
namespace {

void expect(const char* op, const Reader& r, size_t count) {
  if (r.gives.size() != count) fail(kSequence, op, " gives ", count, " values, the program says ", r.gives.size());
}

// f of each value of one operand, or of each pair of two; the second may be a number.
template <class Fn>
Run pairwise(const char* op, Reader& r, Fn f) {
  expect(op, r, 1);
  const Kind& kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t size = size_t(kind.elements()) * bytes_of(kind.dtype);
  const Place a = r.value();
  const std::optional<Place> b = r.maybe();
  if (!b) {
    const Loop loop(op, out, {&a.shape});
    const float number = float(r.words.real());
    return [=, x = Where(a)](const Step& step, Flow& flow) {
      char* to = flow.give(step.first, size);
      loop.run(to, flow.data(x), flow.data(x), [&](float value, float) { return f(value, number); });
    };
  }
  const Loop loop(op, out, {&a.shape, &b->shape});
  return [=, x = Where(a), y = Where(*b)](const Step& step, Flow& flow) {
    char* to = flow.give(step.first, size);
    loop.run(to, flow.data(x), flow.data(y), f);
  };
}

// Numbers of int64: where the next one lies, 0 where one stands for all of a result of `count`.
int64_t stepped(const char* op, const Ref& t, int64_t count) {
  if (t.scalar_type() != ScalarType::Long || t.dim() > 1 || !t.is_contiguous() || (t.numel() != 1 && t.numel() != count))
    fail(op, "operands must be vectors of int64 of ", count, " elements, or of one, got ", shape_of(t));
  return t.numel() == 1 ? 0 : 1;
}

// Sums of int64: positions in a cache, and the length of what is in it.
Run counted(const char* op, Reader& r, bool in_place) {
  expect(op, r, in_place ? 0 : 1);
  const Place a = r.value();
  const std::optional<Place> b = r.maybe();
  const int64_t number = b ? 0 : int64_t(r.words.real());
  const Ref out = in_place ? a.shape : r.gives[0].nowhere();
  const int64_t n = out.numel(), x_step = stepped(op, a.shape, n), y_step = b ? stepped(op, b->shape, n) : 0;
  stepped(op, out, n);
  return [=, at = Where(a), by = b ? std::optional<Where>(*b) : std::nullopt](const Step& step, Flow& flow) {
    int64_t* to = reinterpret_cast<int64_t*>(in_place ? flow.data(at) : flow.give(step.first, size_t(n) * 8));
    const int64_t* x = reinterpret_cast<const int64_t*>(flow.data(at));
    const int64_t* y = by ? reinterpret_cast<const int64_t*>(flow.data(*by)) : &number;
    for (int64_t i = 0; i < n; ++i) to[i] = int64_t(uint64_t(x[i * x_step]) + uint64_t(y[i * y_step]));
  };
}

Run added(Reader& r) {
  if (r.gives.size() == 1 && r.gives[0].dtype == ScalarType::Long) return counted("add", r, false);
  return pairwise("add", r, [](float x, float y) { return x + y; });
}

Run ranged(Reader& r) {
  expect("arange", r, 1);
  const Ref out = r.gives[0].nowhere();
  const int64_t n = r.words.number();
  if (out.scalar_type() != ScalarType::Long || out.dim() != 1 || out.numel() != n || !out.is_contiguous())
    fail(kSequence, "arange gives as many int64 as it says");
  return [=](const Step& step, Flow& flow) {
    int64_t* to = reinterpret_cast<int64_t*>(flow.give(step.first, size_t(n) * 8));
    for (int64_t i = 0; i < n; ++i) to[i] = i;
  };
}

Run rotated(Reader& r) {
  expect("rotate", r, 1);
  const Kind& kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t size = size_t(kind.elements()) * bytes_of(kind.dtype);
  const Place x = r.value(), cos = r.value(), sin = r.value();
  check_shape("rotate", "what is turned", x.shape, out.sizes());
  if (out.dim() < 1 || out.size(out.dim() - 1) % 2 != 0) fail(kSequence, "rotate turns rows of even lengths, got ", shape_of(out));
  const Loop loop("rotate", out, {&x.shape, &cos.shape, &sin.shape});
  return [=, from = Where(x), c = Where(cos), s = Where(sin)](const Step& step, Flow& flow) {
    loop.rotate(flow.give(step.first, size), flow.data(from), flow.data(c), flow.data(s));
  };
}

Run negated(Reader& r) {
  expect("neg", r, 1);
  const Kind& kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t size = size_t(kind.elements()) * bytes_of(kind.dtype);
  const Place a = r.value();
  const Loop loop("neg", out, {&a.shape});
  return [=, from = Where(a)](const Step& step, Flow& flow) {
    loop.run(flow.give(step.first, size), flow.data(from), flow.data(from), [](float x, float) { return -x; });
  };
}

// A dense copy, of as many values in another shape.
Run cloned(Reader& r) {
  expect("clone", r, 1);
  const Kind& kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t size = size_t(kind.elements()) * bytes_of(kind.dtype);
  const Place a = r.value();
  const Ref& from = a.shape;
  if (from.numel() != out.numel() || !out.is_contiguous()) fail(kSequence, "clone makes a dense copy of all values");
  const Loop loop("clone", out.seen(0, from.sizes(), dense_strides(from.sizes())), {&from});
  return [=, at = Where(a)](const Step& step, Flow& flow) { loop.copy(flow.give(step.first, size), flow.data(at)); };
}

Run joined(Reader& r) {
  const char* op = "cat";
  expect(op, r, 1);
  const Kind& kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t size = size_t(kind.elements()) * bytes_of(kind.dtype);
  std::vector<Place> values;
  for (int64_t n = r.words.count(1 << 16); n > 0; --n) values.push_back(r.value());
  const int64_t axis = check_axis(op, r.words.number(), out.dim());
  struct Part {
    Where value;
    int64_t offset;
    Loop loop;
  };
  std::vector<Part> parts;
  int64_t at = 0;
  for (const Place& v : values) {
    const Ref& part = v.shape;
    if (part.dim() != out.dim() || at + part.size(axis) > out.size(axis)) fail(kSequence, "cat: parts do not fit");
    const Ref place = narrow(out, axis, part.size(axis));
    check_shape(op, "a part", part, place.sizes());
    parts.push_back({v, at * out.stride(axis) * int64_t(out.element_size()), Loop(op, place, {&part})});
    at += part.size(axis);
  }
  if (at != out.size(axis)) fail(kSequence, "cat: parts do not fill the result");
  return [=](const Step& step, Flow& flow) {
    char* to = flow.give(step.first, size);
    for (const Part& part : parts) part.loop.copy(to + part.offset, flow.data(part.value));
  };
}

// Writes the slices of a source to those that an index names; all indices are checked before anything is written.
Run index_copied(Reader& r) {
  const char* op = "index_copy_";
  expect(op, r, 0);
  const Place self = r.value();
  const Ref& to = self.shape;
  const int64_t axis = check_axis(op, r.words.number(), to.dim());
  const Place index = r.value(), source = r.value();
  const Ref &at = index.shape, &from = source.shape;
  if (at.dim() > 1 || (at.scalar_type() != ScalarType::Long && at.scalar_type() != ScalarType::Int))
    fail(op, "the index must be a vector of int64 or int32");
  auto shape = to.sizes();
  shape[size_t(axis)] = at.numel();
  check_shape(op, "the source", from, shape);
  const int64_t count = at.numel(), size = to.size(axis), bytes = int64_t(to.element_size());
  const int64_t to_step = to.stride(axis) * bytes, from_step = from.stride(axis) * bytes;
  const Ref slice = narrow(from, axis, 1);
  const Loop loop(op, narrow(to, axis, 1), {&slice});
  return [=, into = Where(self), given = Where(source)](const Step&, Flow& flow) {
    const Ref where = flow.ref(index);
    for (int64_t i = 0; i < count; ++i)
      if (index_at(where, i) < 0 || index_at(where, i) >= size)
        fail(op, "index ", index_at(where, i), " is out of range, allowed is 0..", size - 1);
    for (int64_t i = 0; i < count; ++i)
      loop.copy(flow.data(into) + index_at(where, i) * to_step, flow.data(given) + i * from_step);
  };
}

// Writes a value, or one that broadcasts, over another.
Run copied(Reader& r) {
  expect("copy_", r, 0);
  const Place self = r.value(), source = r.value();
  const Loop loop("copy_", self.shape, {&source.shape});
  return [loop, to = Where(self), from = Where(source)](const Step&, Flow& flow) { loop.copy(flow.data(to), flow.data(from)); };
}

}  // namespace
}  // namespace qcompile
