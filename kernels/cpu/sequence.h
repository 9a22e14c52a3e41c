// The operator sequence: a program of operators, read once and checked once, then run without torch in between.
// kernels/ops/sequence.py says what its text means. Indices, views and sizes are checked when it is read; what operators give is
// compared with what the text says of it before anything reads it.
#pragma once

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "op_attention.h"
#include "op_chain.h"
#include "op_conv.h"
#include "op_linear.h"
#include "op_lookup.h"
#include "op_norm.h"
#include "sequence_small.h"

namespace qcompile {
namespace {

// The operators that a program may name. `writes`: its first argument is written to.
struct Known {
  const char* name;
  bool writes;
  Run (*bind)(Reader&);
};
const Known kKnown[] = {
    {"linear_chain", false, [](Reader& r) { return bound(&linear_chain<Flow>, r); }},
    {"attention", false, [](Reader& r) { return bound(&attention<Flow>, r); }},
    {"linear_tiled", false, [](Reader& r) { return bound(&linear_tiled, r); }},
    {"linear_tiled_split", false, [](Reader& r) { return bound(&linear_tiled_split, r); }},
    {"conv_tiled", false, [](Reader& r) { return bound(&conv_tiled<Flow>, r); }},
    {"conv_depthwise", false, [](Reader& r) { return bound(&conv_depthwise<Flow>, r); }},
    {"embedding_tiled", false, [](Reader& r) { return bound(&embedding_tiled, r); }},
    {"layer_norm", false, [](Reader& r) { return bound(&layer_norm<Flow>, r); }},
    {"rms_norm", false, [](Reader& r) { return bound(&rms_norm<Flow>, r); }},
    {"mul", false, [](Reader& r) { return pairwise("mul", r, [](float x, float y) { return x * y; }); }},
    {"add", false, [](Reader& r) { return pairwise("add", r, [](float x, float y) { return x + y; }); }},
    {"sub", false, [](Reader& r) { return pairwise("sub", r, [](float x, float y) { return x - y; }); }},
    {"neg", false, negated},
    {"cat", false, joined},
    {"clone", false, cloned},
    {"index_copy_", true, index_copied},
    {"copy_", true, copied},
};

// A program that has been read.
class Sequence {
 public:
  explicit Sequence(const std::string& text) {
    Words words(text);
    if (words.word() != "1") fail(kSequence, "a program of another version");
    constexpr int64_t kMost = int64_t(1) << 20;
    written_ = size_t(words.count(kMost));
    for (int64_t n = words.count(kMost); n > 0; --n) {
      roots_.push_back(kinds_.size());
      kinds_.push_back(words.kind());
    }
    inputs_ = kinds_.size();
    if (written_ > inputs_) fail(kSequence, "more inputs are written to than there are");
    std::vector<std::vector<size_t>> read;
    for (int64_t n = words.count(kMost); n > 0; --n) read.push_back(step(words));
    for (int64_t n = words.count(kMost); n > 0; --n) {
      const int64_t i = words.number();
      if (i < int64_t(inputs_) || i >= int64_t(kinds_.size())) fail(kSequence, "result ", i, " is no value of the program");
      if (roots_[size_t(i)] != size_t(i)) fail(kSequence, "result ", i, " is a view");
      results_.push_back({size_t(i), words.kind()});
      if (results_.back().second.sizes != kinds_[size_t(i)].sizes || results_.back().second.dtype != kinds_[size_t(i)].dtype)
        fail(kSequence, "result ", i, " is not what the program says of it");
      int64_t all = 1;
      for (const int64_t size : kinds_[size_t(i)].sizes) all *= size;
      if (results_.back().second.elements() != all) fail(kSequence, "result ", i, " must be dense");
    }
    if (!words.done()) fail(kSequence, "the program goes on after its end");
    std::vector<size_t> last(kinds_.size(), steps_.size());
    for (size_t s = 0; s < steps_.size(); ++s)
      for (size_t v = steps_[s].first; v < steps_[s].first + steps_[s].count; ++v) last[roots_[v]] = s;
    for (size_t s = 0; s < steps_.size(); ++s)
      for (const size_t v : read[s]) last[roots_[v]] = s;
    for (const auto& [v, kind] : results_) last[v] = steps_.size();
    for (size_t v = inputs_; v < kinds_.size(); ++v)
      if (roots_[v] == v && last[v] < steps_.size()) steps_[last[v]].done.push_back(v);
    for (Step& s : steps_)
      for (const auto& [v, kind] : results_) s.outside = s.outside || (v >= s.first && v < s.first + s.count);
  }

  size_t written() const { return written_; }
  size_t results() const { return results_.size(); }

  // With `into`, results are put there; else they are returned.
  std::vector<Tensor> run(const std::vector<Tensor>& written, const std::vector<Tensor>& given,
                          const std::vector<Tensor>* into) const {
    if (written.size() != written_ || written.size() + given.size() != inputs_)
      fail(kSequence, "the program takes ", written_, " tensors that it writes to and ", inputs_ - written_, " that it reads, got ",
           written.size(), " and ", given.size());
    Flow flow(kinds_.size());
    for (size_t i = 0; i < inputs_; ++i) {
      const bool writes = i < written_;
      const Tensor& t = writes ? written[i] : given[i - written_];
      if (!t.is_cpu()) fail(kSequence, "inputs must be on the CPU");
      flow.set(i, t);
      if (!kinds_[i].describes(flow.ref(i)))
        fail(kSequence, "input ", i, " of ", shape_of(t), " is not what the program says: ", Kinds{kinds_[i]});
      if (!kinds_[i].lies_as(flow.ref(i))) {
        if (writes || kinds_[i].elements() != flow.ref(i).numel())
          fail(kSequence, "input ", i, " has other strides than the program says, and cannot be copied into these");
        flow.set(i, TorchMemory().laid(t, kinds_[i].sizes, kinds_[i].strides));
      }
    }
    for (const Step& step : steps_) {
      flow.outside = step.outside && into == nullptr;
      const Lending lending(flow.outside ? nullptr : &flow);
      step.run(step, flow);
      flow.end_step();
      for (const size_t v : step.done) flow.drop(flow.values[v]);
    }
    std::vector<Tensor> out;
    for (const auto& [v, kind] : results_) {
      if (into != nullptr) {
        put(flow, v, (*into)[out.size()]);
        out.push_back((*into)[out.size()]);
        continue;
      }
      Flow::Value& value = flow.values[v];
      if (value.tensor && !value.block && kind.lies_as(value.ref)) {
        out.push_back(*value.tensor);
        continue;
      }
      const Tensor fresh = qcompile::make(kind.sizes, kind.strides, kind.dtype);
      put(flow, v, fresh);
      out.push_back(fresh);
    }
    return out;
  }

 private:
  struct Lending {
    explicit Lending(Lender* now) : before(lender()) { lender() = now; }
    ~Lending() { lender() = before; }
    Lender* before;
  };
  struct Kinds {
    const Kind& kind;
    friend std::ostream& operator<<(std::ostream& out, const Kinds& k) {
      for (const int64_t n : k.kind.sizes) out << n << ' ';
      return out;
    }
  };

  static void put(Flow& flow, size_t v, const Tensor& to) {
    const Ref& from = flow.ref(v);
    check_shape(kSequence, "a tensor for a result", to, from.sizes());
    if (!to.is_cpu() || to.scalar_type() != from.scalar_type()) fail(kSequence, "a tensor for a result has another dtype or device");
    if (from.is_contiguous() && to.is_contiguous())
      std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), size_t(from.numel()) * from.element_size());
    else
      torch::stable::copy_(const_cast<Tensor&>(to), flow.tensor(v));
  }

  // Reads a step; returns what it reads.
  std::vector<size_t> step(Words& words) {
    const std::string name = words.word();
    if (name == "view") return view(words);
    const auto* known = std::find_if(std::begin(kKnown), std::end(kKnown), [&](const Known& k) { return name == k.name; });
    if (known == std::end(kKnown)) fail(kSequence, "there is no operator '", name, "'");
    Step s;
    s.op = known->name;
    s.first = kinds_.size();
    s.count = size_t(words.count(1 << 16));
    for (size_t i = 0; i < s.count; ++i) s.kinds.push_back(words.kind());
    Reader reader{words, kinds_, s.kinds};
    s.run = known->bind(reader);
    if (known->writes && (reader.read.empty() || (roots_[reader.read[0]] >= written_ && roots_[reader.read[0]] < inputs_)))
      fail(kSequence, name, " writes to an input that is only read");
    for (const Kind& kind : s.kinds) {
      roots_.push_back(kinds_.size());
      kinds_.push_back(kind);
    }
    steps_.push_back(std::move(s));
    return reader.read;
  }

  // A view is a step of its own: it costs nothing worth saving.
  std::vector<size_t> view(Words& words) {
    const std::vector<Kind> none;
    Reader reader{words, kinds_, none};
    const size_t base = reader.value();
    const int64_t offset = words.number();
    const Kind kind = words.kind();
    const int64_t width = int64_t(bytes_of(kind.dtype)), unit = int64_t(bytes_of(kinds_[base].dtype));
    if (kind.dtype != kinds_[base].dtype && (kinds_[base].dtype != ScalarType::Byte || offset % width != 0))
      fail(kSequence, "a view of another dtype must be of bytes, and begin at a whole element of its own");
    if (offset < 0 || offset > kinds_[base].elements() || offset + kind.elements() * width / unit > kinds_[base].elements())
      fail(kSequence, "a view reaches beyond what it shows");
    Step s;
    s.op = "view";
    s.first = kinds_.size();
    s.count = 1;
    s.run = [base, width, bytes = offset * unit, shown = kind.nowhere()](const Step& step, Flow& flow) {
      char* data = flow.data(base) + bytes;
      if (reinterpret_cast<uintptr_t>(data) % uintptr_t(width) != 0) fail(kSequence, "a view of bytes that are not aligned");
      flow.values[step.first].ref = shown.at(data);
    };
    roots_.push_back(roots_[base]);
    kinds_.push_back(kind);
    steps_.push_back(std::move(s));
    return reader.read;
  }

  size_t written_ = 0, inputs_ = 0;
  std::vector<Kind> kinds_;
  std::vector<size_t> roots_;  // of each value, the one whose memory it shows
  std::vector<Step> steps_;
  std::vector<std::pair<size_t, Kind>> results_;
};

// The program of this text; read when it is first met.
std::shared_ptr<const Sequence> sequence_of(const std::string& text) {
  thread_local std::string last;
  thread_local std::shared_ptr<const Sequence> held;
  if (held && last == text) return held;
  static std::mutex lock;
  static std::unordered_map<std::string, std::shared_ptr<const Sequence>> known;
  std::shared_ptr<const Sequence> found;
  {
    const std::lock_guard<std::mutex> guard(lock);
    const auto at = known.find(text);
    if (at != known.end()) found = at->second;
  }
  if (!found) {
    found = std::make_shared<const Sequence>(text);
    const std::lock_guard<std::mutex> guard(lock);
    if (known.size() >= 256) known.clear();
    known[text] = found;
  }
  last = text;
  held = found;
  return found;
}

std::vector<Tensor> sequence(const std::vector<Tensor>& inputs, const std::string& program) {
  return sequence_of(program)->run({}, inputs, nullptr);
}

void sequence_writing(const std::vector<Tensor>& written, const std::vector<Tensor>& inputs, const std::string& program) {
  const auto found = sequence_of(program);
  if (written.size() < found->results()) fail(kSequence, "there must be a tensor for each result, got ", written.size());
  const auto split = written.end() - std::ptrdiff_t(found->results());
  const std::vector<Tensor> into(split, written.end());
  found->run({written.begin(), split}, inputs, &into);
}

}  // namespace
}  // namespace qcompile
