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
  const Kind kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t a = r.value(), size = size_t(kind.elements()) * bytes_of(kind.dtype);
  const std::optional<size_t> b = r.maybe();
  if (!b) {
    const Loop loop(op, out, r.kinds[a].nowhere());
    const float number = float(r.words.real());
    return [=](const Step& step, Flow& flow) {
      char* to = flow.give(step.first, out, size);
      loop.run(to, flow.data(a), flow.data(a), [&](float x, float) { return f(x, number); });
    };
  }
  const Loop loop(op, out, r.kinds[a].nowhere(), r.kinds[*b].nowhere());
  return [=](const Step& step, Flow& flow) {
    char* to = flow.give(step.first, out, size);
    loop.run(to, flow.data(a), flow.data(*b), f);
  };
}

Run negated(Reader& r) {
  expect("neg", r, 1);
  const Kind kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t a = r.value(), size = size_t(kind.elements()) * bytes_of(kind.dtype);
  const Loop loop("neg", out, r.kinds[a].nowhere());
  return [=](const Step& step, Flow& flow) {
    loop.run(flow.give(step.first, out, size), flow.data(a), flow.data(a), [](float x, float) { return -x; });
  };
}

// A dense copy, of as many values in another shape.
Run cloned(Reader& r) {
  expect("clone", r, 1);
  const Kind kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t a = r.value(), size = size_t(kind.elements()) * bytes_of(kind.dtype);
  const Ref from = r.kinds[a].nowhere();
  if (from.numel() != out.numel() || !out.is_contiguous()) fail(kSequence, "clone makes a dense copy of all values");
  const Loop loop("clone", out.seen(0, from.sizes(), dense_strides(from.sizes())), from);
  return [=](const Step& step, Flow& flow) { loop.copy(flow.give(step.first, out, size), flow.data(a)); };
}

Run joined(Reader& r) {
  const char* op = "cat";
  expect(op, r, 1);
  const Kind kind = r.gives[0];
  const Ref out = kind.nowhere();
  const size_t size = size_t(kind.elements()) * bytes_of(kind.dtype);
  std::vector<size_t> values;
  for (int64_t n = r.words.count(1 << 16); n > 0; --n) values.push_back(r.value());
  const int64_t axis = check_axis(op, r.words.number(), out.dim());
  struct Part {
    size_t value;
    int64_t offset;
    Loop loop;
  };
  std::vector<Part> parts;
  int64_t at = 0;
  for (const size_t v : values) {
    const Ref part = r.kinds[v].nowhere();
    if (part.dim() != out.dim() || at + part.size(axis) > out.size(axis)) fail(kSequence, "cat: parts do not fit");
    const Ref place = narrow(out, axis, part.size(axis));
    check_shape(op, "a part", part, place.sizes());
    parts.push_back({v, at * out.stride(axis) * int64_t(out.element_size()), Loop(op, place, part)});
    at += part.size(axis);
  }
  if (at != out.size(axis)) fail(kSequence, "cat: parts do not fill the result");
  return [=](const Step& step, Flow& flow) {
    char* to = flow.give(step.first, out, size);
    for (const Part& part : parts) part.loop.copy(to + part.offset, flow.data(part.value));
  };
}

// Writes the slices of a source to those that an index names; all indices are checked before anything is written.
Run index_copied(Reader& r) {
  const char* op = "index_copy_";
  expect(op, r, 0);
  const size_t self = r.value();
  const Ref to = r.kinds[self].nowhere();
  const int64_t axis = check_axis(op, r.words.number(), to.dim());
  const size_t index = r.value(), source = r.value();
  const Ref at = r.kinds[index].nowhere(), from = r.kinds[source].nowhere();
  if (at.dim() > 1 || (at.scalar_type() != ScalarType::Long && at.scalar_type() != ScalarType::Int))
    fail(op, "the index must be a vector of int64 or int32");
  auto shape = to.sizes();
  shape[size_t(axis)] = at.numel();
  check_shape(op, "the source", from, shape);
  const int64_t count = at.numel(), size = to.size(axis), bytes = int64_t(to.element_size());
  const int64_t to_step = to.stride(axis) * bytes, from_step = from.stride(axis) * bytes;
  const Loop loop(op, narrow(to, axis, 1), narrow(from, axis, 1));
  return [=](const Step&, Flow& flow) {
    const Ref& where = flow.ref(index);
    for (int64_t i = 0; i < count; ++i)
      if (index_at(where, i) < 0 || index_at(where, i) >= size)
        fail(op, "index ", index_at(where, i), " is out of range, allowed is 0..", size - 1);
    for (int64_t i = 0; i < count; ++i)
      loop.copy(flow.data(self) + index_at(where, i) * to_step, flow.data(source) + i * from_step);
  };
}

// Writes a value, or one that broadcasts, over another.
Run copied(Reader& r) {
  expect("copy_", r, 0);
  const size_t self = r.value(), source = r.value();
  const Loop loop("copy_", r.kinds[self].nowhere(), r.kinds[source].nowhere());
  return [=](const Step&, Flow& flow) { loop.copy(flow.data(self), flow.data(source)); };
}

}  // namespace
}  // namespace qcompile
