// The operator sequence: a program of operators, read once and checked once, then run without torch in between.
// kernels/ops/sequence.py says what its text means. Indices, views and sizes are checked when it is read; what operators give is
// compared with what the text says of it before anything reads it.
#pragma once

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "op_attention.h"
#include "op_conv.h"
#include "op_hold.h"
#include "op_linear.h"
#include "op_lookup.h"
#include "op_norm.h"
#include "sequence_chain.h"
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
    {"linear_chain", false, chained},
    {"attention", false, [](Reader& r) { return bound(&attention<Flow>, r); }},
    {"linear_tiled", false, [](Reader& r) { return bound(&linear_tiled, r); }},
    {"linear_tiled_split", false, [](Reader& r) { return bound(&linear_tiled_split, r); }},
    {"conv_tiled", false, [](Reader& r) { return bound(&conv_tiled<Flow>, r); }},
    {"conv_depthwise", false, [](Reader& r) { return bound(&conv_depthwise<Flow>, r); }},
    {"embedding_tiled", false, [](Reader& r) { return bound(&embedding_tiled, r); }},
    {"layer_norm", false, [](Reader& r) { return bound(&layer_norm<Flow>, r); }},
    {"rms_norm", false, [](Reader& r) { return bound(&rms_norm<Flow>, r); }},
    {"mul", false, [](Reader& r) { return pairwise("mul", r, [](float x, float y) { return x * y; }); }},
    {"add", false, added},
    {"add_", true, [](Reader& r) { return counted("add_", r, true); }},
    {"arange", false, ranged},
    {"rotate", false, rotated},
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
    for (int64_t n = words.count(kMost); n > 0; --n) add(words.kind());
    inputs_ = values_.size();
    if (written_ > inputs_) fail(kSequence, "more inputs are written to than there are");
    std::vector<std::vector<size_t>> read;
    for (int64_t n = words.count(kMost); n > 0; --n) {
      const std::string name = words.word();
      if (name == "view")
        view(words);
      else if (name == "held")
        held(words);
      else
        read.push_back(step(name, words));
    }
    for (int64_t n = words.count(kMost); n > 0; --n) results_.push_back(result(words));
    if (!words.done()) fail(kSequence, "the program goes on after its end");
    std::vector<size_t> last(kinds_.size(), steps_.size());
    for (size_t s = 0; s < steps_.size(); ++s) {
      for (size_t i = 0; i < steps_[s].count; ++i) last[steps_[s].first + i] = s;
      for (const size_t root : read[s]) last[root] = s;
    }
    for (const Result& r : results_) last[r.value.root] = steps_.size();
    for (size_t root = inputs_; root < kinds_.size(); ++root)
      if (last[root] < steps_.size() && !boxed_.count(root)) steps_[last[root]].done.push_back(root);
    for (Step& s : steps_)
      for (const Result& r : results_) s.outside = s.outside || (r.value.root >= s.first && r.value.root < s.first + s.count);
  }

  size_t written() const { return written_; }
  size_t results() const { return results_.size(); }

  // With `into`, results are put there; else they are returned.
  std::vector<Tensor> run(const std::vector<Tensor>& written, const std::vector<Tensor>& given,
                          const std::vector<Tensor>* into) const {
    if (written.size() != written_ || written.size() + given.size() != inputs_)
      fail(kSequence, "the program takes ", written_, " tensors that it writes to and ", inputs_ - written_, " that it reads, got ",
           written.size(), " and ", given.size());
    const auto input = [&](size_t i) -> const Tensor& { return i < written_ ? written[i] : given[i - written_]; };
    Flow flow(kinds_.size());
    for (size_t i = 0; i < inputs_; ++i) enter(flow, i, input(i), i < written_);
    std::vector<Held> held;  // they stay for as long as this runs, whoever lets them go
    for (const Box& box : boxes_) {
      held.push_back(Boxes::all().at(number_of(input(box.input))));
      if (!held.back()) fail(kSequence, "what this program held was let go; compile the model again");
      for (const auto& [root, place] : box.values) {
        if (place >= held.back()->size()) fail(kSequence, "a box of ", held.back()->size(), " tensors has none at ", place);
        enter(flow, root, (*held.back())[place], box.input < written_);
      }
    }
    for (const Step& step : steps_) {
      flow.outside = step.outside && into == nullptr;
      const Lending lending(flow.outside ? nullptr : &flow);
      step.run(step, flow);
      flow.end_step();
      for (const size_t root : step.done) flow.drop(root);
    }
    std::vector<Tensor> out;
    for (const Result& r : results_) {
      if (into != nullptr) {
        put(flow, r, (*into)[out.size()]);
        out.push_back((*into)[out.size()]);
        continue;
      }
      const Tensor* made = flow.allocated(r.value.root);
      if (made != nullptr && r.kind.lies_as(Ref(*made))) {
        out.push_back(*made);
        continue;
      }
      const Tensor fresh = qcompile::make(r.kind.sizes, r.kind.strides, r.kind.dtype);
      put(flow, r, fresh);
      out.push_back(fresh);
    }
    return out;
  }

 private:
  // An input whose number tells what it holds: the memory that it gives, and where that is in it.
  struct Box {
    size_t input;
    std::vector<std::pair<size_t, size_t>> values;
  };
  struct Result {
    Place value;
    Kind kind;
  };
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

  // A value from outside, checked; copied where it does not lie as the program says.
  void enter(Flow& flow, size_t root, const Tensor& t, bool writes) const {
    const Kind& kind = kinds_[root];
    if (!t.is_cpu()) fail(kSequence, "inputs must be on the CPU");
    const Ref given(t);
    if (!kind.describes(given)) fail(kSequence, "input ", root, " of ", shape_of(t), " is not what the program says: ", Kinds{kind});
    if (reinterpret_cast<uintptr_t>(given.const_data_ptr()) % align_[root] != 0)
      fail(kSequence, "a view of bytes that are not aligned");
    if (kind.lies_as(given)) return flow.enter(root, t);
    if (writes || kind.elements() != given.numel())
      fail(kSequence, "input ", root, " has other strides than the program says, and cannot be copied into these");
    flow.keep(root, TorchMemory().laid(t, kind.sizes, kind.strides));
  }

  static void put(Flow& flow, const Result& r, const Tensor& to) {
    const Ref from = flow.ref(r.value);
    check_shape(kSequence, "a tensor for a result", to, from.sizes());
    if (!to.is_cpu() || to.scalar_type() != from.scalar_type()) fail(kSequence, "a tensor for a result has another dtype or device");
    if (from.is_contiguous() && to.is_contiguous())
      std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), size_t(from.numel()) * from.element_size());
    else
      torch::stable::copy_(const_cast<Tensor&>(to), flow.tensor(r.value));
  }

  // A value with memory of its own.
  void add(const Kind& kind) {
    Place place;
    place.root = kinds_.size();
    place.shape = kind.nowhere();
    values_.push_back(place);
    kinds_.push_back(kind);
    align_.push_back(1);
  }

  // Reads a step; returns whose memory it reads.
  std::vector<size_t> step(const std::string& name, Words& words) {
    const auto* known = std::find_if(std::begin(kKnown), std::end(kKnown), [&](const Known& k) { return name == k.name; });
    if (known == std::end(kKnown)) fail(kSequence, "there is no operator '", name, "'");
    Step s;
    s.op = known->name;
    s.first = kinds_.size();
    s.count = size_t(words.count(1 << 16));
    for (size_t i = 0; i < s.count; ++i) s.kinds.push_back(words.kind());
    Reader reader{words, values_, s.kinds};
    s.run = known->bind(reader);
    if (known->writes && (reader.read.empty() || !writable(reader.read[0])))
      fail(kSequence, name, " writes to an input that is only read");
    for (const Kind& kind : s.kinds) add(kind);
    steps_.push_back(std::move(s));
    return reader.read;
  }

  bool writable(size_t root) const {
    const auto box = boxed_.find(root);
    const size_t input = box == boxed_.end() ? root : box->second;
    return input < written_ || input >= inputs_;
  }

  // What a box holds; there before the first step runs.
  void held(Words& words) {
    const std::vector<Kind> none;
    const Place from = Reader{words, values_, none}.value();
    const size_t place = size_t(words.count(1 << 20));
    if (from.root >= inputs_ || !from.whole || from.shape.scalar_type() != ScalarType::Long || from.shape.numel() != 1)
      fail(kSequence, "a box must be an input of one int64");
    auto box = std::find_if(boxes_.begin(), boxes_.end(), [&](const Box& b) { return b.input == from.root; });
    if (box == boxes_.end()) box = boxes_.insert(box, {from.root, {}});
    box->values.push_back({kinds_.size(), place});
    boxed_[kinds_.size()] = from.root;
    add(words.kind());
  }

  // A view is a place, and costs nothing when the program runs.
  void view(Words& words) {
    const std::vector<Kind> none;
    Place place = Reader{words, values_, none}.value();
    const Ref base = place.shape;
    const Kind own{base.scalar_type(), base.sizes(), base.strides()};
    int64_t offset = words.number();
    const Kind kind = words.kind();
    if (kind.elements() == 0) offset = std::min<int64_t>(offset, 0);  // shows nothing, wherever it says that it begins
    const int64_t width = int64_t(bytes_of(kind.dtype)), unit = int64_t(bytes_of(own.dtype));
    if (kind.dtype != own.dtype && (own.dtype != ScalarType::Byte || (place.offset + offset) % width != 0))
      fail(kSequence, "a view of another dtype must be of bytes, and begin at a whole element of its own");
    if (offset < 0 || offset > own.elements() || offset + kind.elements() * width / unit > own.elements())
      fail(kSequence, "a view reaches beyond what it shows");
    align_[place.root] = std::max(align_[place.root], size_t(width));
    place.offset += offset * unit;
    place.whole = false;
    place.shape = kind.nowhere();
    values_.push_back(place);
  }

  Result result(Words& words) {
    const int64_t i = words.number();
    if (i < 0 || i >= int64_t(values_.size()) || values_[size_t(i)].root < inputs_)
      fail(kSequence, "result ", i, " is no value of the program");
    const Place& value = values_[size_t(i)];
    if (!value.whole || boxed_.count(value.root)) fail(kSequence, "result ", i, " is a view, or held");
    const Kind kind = words.kind();
    if (kind.sizes != value.shape.sizes() || kind.dtype != value.shape.scalar_type())
      fail(kSequence, "result ", i, " is not what the program says of it");
    if (kind.elements() != value.shape.numel()) fail(kSequence, "result ", i, " must be dense");
    return {value, kind};
  }

  size_t written_ = 0, inputs_ = 0;
  std::vector<Place> values_;
  std::vector<Kind> kinds_;                   // of each memory, what lies in it
  std::vector<size_t> align_;                 // and what its address must be a multiple of
  std::vector<Box> boxes_;
  std::unordered_map<size_t, size_t> boxed_;  // of each memory that a box holds, the input
  std::vector<Step> steps_;
  std::vector<Result> results_;
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
