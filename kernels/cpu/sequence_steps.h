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
  const std::vector<Place>& values;  // so far
  const std::vector<Kind>& gives;    // what the step gives
  size_t known = values.size();
  std::vector<size_t> read;          // whose memory

  const Place& value() {
    const int64_t i = words.number();
    if (i < 0 || i >= int64_t(known)) fail(kSequence, "there is no value ", i, " at this step");
    read.push_back(values[size_t(i)].root);
    return values[size_t(i)];
  }
  std::optional<Place> maybe() {
    const int64_t i = words.number();
    if (i == -1) return std::nullopt;
    if (i < 0 || i >= int64_t(known)) fail(kSequence, "there is no value ", i, " at this step");
    read.push_back(values[size_t(i)].root);
    return values[size_t(i)];
  }
};

template <class T>
T found(Flow& flow, const Place& place) {
  if constexpr (std::is_same_v<T, Ref>)
    return flow.ref(place);
  else
    return flow.tensor(place);
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
  Place place;
  explicit ValueSlot(Reader& r) : place(r.value()) {}
  T get(Flow& flow) const { return found<T>(flow, place); }
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
  std::optional<Place> place;
  explicit Slot(Reader& r) : place(r.maybe()) {}
  std::optional<T> get(Flow& flow) const {
    if (!place) return std::nullopt;
    return found<T>(flow, *place);
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
  std::vector<Place> places;
  explicit Slot(Reader& r) {
    for (int64_t n = r.words.count(1 << 16); n > 0; --n) places.push_back(r.value());
  }
  std::vector<T> get(Flow& flow) const {
    std::vector<T> all;
    all.reserve(places.size());
    for (const Place& p : places) all.push_back(found<T>(flow, p));
    return all;
  }
};

struct Step;
using Run = std::function<void(const Step&, Flow&)>;
struct Step {
  const char* op = "";
  Run run;
  size_t first = 0, count = 0;   // the memory of what it gives
  bool outside = false;          // one of these is a result: then torch allocates them, where the operator is torch's
  std::vector<size_t> done;      // memory that nothing reads afterwards
  std::vector<Kind> kinds;
};

// What an operator gave, if it is what the program says.
template <class T>
void take(const Step& step, Flow& flow, size_t i, const T& given) {
  const Ref ref(given);
  if (!step.kinds[i].describes(ref) || !step.kinds[i].lies_as(ref))
    fail(kSequence, step.op, " gave ", shape_of(ref), ", which is not what the program says");
  flow.set(step.first + i, given);
}

template <class R, class... A>
Run bound(R (*fn)(A...), Reader& reader) {
  std::tuple<Slot<std::decay_t<A>>...> slots{Slot<std::decay_t<A>>(reader)...};
  return [fn, slots](const Step& step, Flow& flow) {
    const auto call = [&] { return std::apply([&](const auto&... slot) { return fn(slot.get(flow)...); }, slots); };
    if constexpr (std::is_same_v<R, Tensor> || std::is_same_v<R, Ref>) {
      if (step.count != 1) fail(kSequence, step.op, " gives one value, the program says ", step.count);
      take(step, flow, 0, call());
    } else {
      const R all = call();
      if (all.size() != step.count) fail(kSequence, step.op, " gives ", all.size(), " values, the program says ", step.count);
      for (size_t i = 0; i < all.size(); ++i) take(step, flow, i, all[i]);
    }
  };
}

}  // namespace
}  // namespace qcompile
