// Steps of a sequence that call the C++ functions of operators: arguments are read once, by the types that the function takes.
#pragma once

#include <functional>
#include <tuple>

#include "sequence_flow.h"

namespace qcompile {
namespace {

// The arguments of operators as the text gives them, by the type that the operator's C++ function takes: read once, looked up
// at each call.
struct Reader {
  Words& words;
  const std::vector<Kind>& kinds;  // of the values so far
  const std::vector<Kind>& gives;  // of what the step gives
  size_t known = kinds.size();
  std::vector<size_t> read;

  size_t value() {
    const int64_t i = words.number();
    if (i < 0 || i >= int64_t(known)) fail(kSequence, "there is no value ", i, " at this step");
    read.push_back(size_t(i));
    return size_t(i);
  }
  std::optional<size_t> maybe() {
    const int64_t i = words.number();
    if (i == -1) return std::nullopt;
    if (i < 0 || i >= int64_t(known)) fail(kSequence, "there is no value ", i, " at this step");
    read.push_back(size_t(i));
    return size_t(i);
  }
};

template <class T>
const T& found(Flow& flow, size_t i) {
  if constexpr (std::is_same_v<T, Ref>)
    return flow.ref(i);
  else
    return flow.tensor(i);
}

template <class P>
struct Slot {  // a number, a flag, a name
  P held;
  explicit Slot(Reader& r) {
    if constexpr (std::is_same_v<P, bool>)
      held = r.words.count(1) != 0;
    else if constexpr (std::is_same_v<P, int64_t>)
      held = r.words.number();
    else if constexpr (std::is_same_v<P, double>)
      held = r.words.real();
    else if constexpr (std::is_same_v<P, ScalarType>)
      held = dtype_named(r.words.word());
    else
      held = r.words.word();
  }
  const P& get(Flow&) const { return held; }
};
template <>
struct Slot<Flow> {
  explicit Slot(Reader&) {}
  Flow& get(Flow& flow) const { return flow; }
};
template <class T>
struct ValueSlot {
  size_t index;
  explicit ValueSlot(Reader& r) : index(r.value()) {}
  const T& get(Flow& flow) const { return found<T>(flow, index); }
};
template <>
struct Slot<Tensor> : ValueSlot<Tensor> {
  using ValueSlot::ValueSlot;
};
template <>
struct Slot<Ref> : ValueSlot<Ref> {
  using ValueSlot::ValueSlot;
};
template <>
struct Slot<std::optional<ScalarType>> {
  std::optional<ScalarType> held;
  explicit Slot(Reader& r) {
    const std::string name = r.words.word();
    if (name != "-") held = dtype_named(name);
  }
  const std::optional<ScalarType>& get(Flow&) const { return held; }
};
template <class T>
struct Slot<std::optional<T>> {
  std::optional<size_t> index;
  explicit Slot(Reader& r) : index(r.maybe()) {}
  std::optional<T> get(Flow& flow) const {
    if (!index) return std::nullopt;
    return found<T>(flow, *index);
  }
};
template <>
struct Slot<std::vector<int64_t>> {
  std::vector<int64_t> held;
  explicit Slot(Reader& r) : held(r.words.numbers(1 << 16)) {}
  const std::vector<int64_t>& get(Flow&) const { return held; }
};
template <>
struct Slot<std::vector<double>> {
  std::vector<double> held;
  explicit Slot(Reader& r) : held(size_t(r.words.count(1 << 16))) {
    for (double& f : held) f = r.words.real();
  }
  const std::vector<double>& get(Flow&) const { return held; }
};
template <class T>
struct Slot<std::vector<T>> {
  std::vector<size_t> indices;
  explicit Slot(Reader& r) {
    for (int64_t n = r.words.count(1 << 16); n > 0; --n) indices.push_back(r.value());
  }
  std::vector<T> get(Flow& flow) const {
    std::vector<T> all;
    all.reserve(indices.size());
    for (const size_t i : indices) all.push_back(found<T>(flow, i));
    return all;
  }
};

struct Step;
using Run = std::function<void(const Step&, Flow&)>;
struct Step {
  const char* op = "";
  Run run;
  size_t first = 0, count = 0;   // the values that it gives
  bool outside = false;          // one of these is a result: then torch allocates them, where the operator is torch's
  std::vector<size_t> done;      // values that nothing reads afterwards
  std::vector<Kind> kinds;
};

void give(const Step& step, Flow& flow, size_t i, size_t count) {
  if (count != step.count) fail(kSequence, step.op, " gives ", count, " values, the program says ", step.count);
  const Ref& ref = flow.ref(step.first + i);
  if (!step.kinds[i].describes(ref) || !step.kinds[i].lies_as(ref))
    fail(kSequence, step.op, " gave ", shape_of(ref), ", which is not what the program says");
}

template <class R, class... A>
Run bound(R (*fn)(A...), Reader& reader) {
  std::tuple<Slot<std::decay_t<A>>...> slots{Slot<std::decay_t<A>>(reader)...};
  return [fn, slots](const Step& step, Flow& flow) {
    const auto call = [&] { return std::apply([&](const auto&... slot) { return fn(slot.get(flow)...); }, slots); };
    if constexpr (std::is_same_v<R, Tensor> || std::is_same_v<R, Ref>) {
      flow.set(step.first, call());
      give(step, flow, 0, 1);
    } else {
      const R all = call();
      if (all.size() != step.count) fail(kSequence, step.op, " gives ", all.size(), " values, the program says ", step.count);
      for (size_t i = 0; i < all.size(); ++i) {
        flow.set(step.first + i, all[i]);
        give(step, flow, i, all.size());
      }
    }
  };
}

}  // namespace
}  // namespace qcompile
