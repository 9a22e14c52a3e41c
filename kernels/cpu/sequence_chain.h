// The step linear_chain: planned when the program is read.
#pragma once

#include <algorithm>
#include <array>

#include "op_chain.h"
#include "sequence_steps.h"

namespace qcompile {
namespace {

Run chained(Reader& r) {
  const Slot<std::vector<Ref>> inputs(r), constants(r);
  const Slot<std::vector<int64_t>> stages(r);
  const Slot<std::vector<double>> eps(r);
  const Slot<std::vector<int64_t>> results(r);
  const auto shapes = [](const std::vector<Place>& places) {
    std::vector<Ref> all;
    for (const Place& p : places) all.push_back(p.shape);
    return all;
  };
  const ChainPlan plan(shapes(inputs.places), shapes(constants.places), stages.held, eps.held, results.held);
  const size_t values = plan.shapes().size();
  if (results.held.size() != r.gives.size())
    fail(kSequence, "linear_chain gives ", results.held.size(), " values, the program says ", r.gives.size());
  // Of each value that a stage gives: how it lies, how many bytes it has, and which result it is, -1 for none.
  struct Made {
    Ref shape;
    size_t bytes;
    int64_t result;
  };
  std::vector<Made> made;
  for (size_t i = plan.inputs(); i < values; ++i) {
    const auto& shape = plan.shapes()[i];
    const Ref lies(nullptr, plan.dtype(), shape, dense_strides(shape));
    const auto at = std::find(results.held.begin(), results.held.end(), int64_t(i));
    made.push_back({lies, size_t(lies.numel()) * lies.element_size(), at == results.held.end() ? -1 : at - results.held.begin()});
  }
  for (size_t i = 0; i < results.held.size(); ++i) {
    const Made& m = made[size_t(results.held[i]) - plan.inputs()];
    if (m.result != int64_t(i)) fail(kSequence, "linear_chain gives a value twice");
    if (!r.gives[i].describes(m.shape) || !r.gives[i].lies_as(m.shape))
      fail(kSequence, "linear_chain gives ", shape_of(m.shape), ", which is not what the program says");
  }
  return [=, given = inputs.places, read = constants.places](const Step& step, Flow& flow) {
    std::vector<char*> to(values);
    std::vector<const char*> from(read.size());
    for (size_t i = 0; i < given.size(); ++i)
      to[i] = static_cast<char*>(flow.contiguous(flow.ref(given[i])).mutable_data_ptr());
    for (size_t i = 0; i < read.size(); ++i) from[i] = flow.data(read[i]);
    for (size_t i = 0; i < made.size(); ++i) {
      const Made& m = made[i];
      to[given.size() + i] = m.result == -1 ? flow.borrow(m.bytes) : flow.lay(step.first + size_t(m.result), m.shape, m.bytes);
    }
    plan.run(to.data(), from.data());
  };
}

}  // namespace
}  // namespace qcompile
