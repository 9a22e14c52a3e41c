// The text of a sequence: its words, and what it says of values. Nothing in it is trusted.
#pragma once

#include <cerrno>
#include <cstdlib>

#include "ref.h"

namespace qcompile {
namespace {

constexpr const char* kSequence = "sequence";

ScalarType dtype_named(const std::string& name) {
  static const std::pair<const char*, ScalarType> kNames[] = {
      {"float32", ScalarType::Float},        {"float16", ScalarType::Half},
      {"bfloat16", ScalarType::BFloat16},    {"uint8", ScalarType::Byte},
      {"int8", ScalarType::Char},            {"int32", ScalarType::Int},
      {"int64", ScalarType::Long},           {"bool", ScalarType::Bool},
      {"float8_e4m3fn", ScalarType::Float8_e4m3fn}, {"float8_e4m3fnuz", ScalarType::Float8_e4m3fnuz},
      {"float8_e5m2", ScalarType::Float8_e5m2},
  };
  for (const auto& [known, type] : kNames)
    if (name == known) return type;
  fail(kSequence, "there is no dtype '", name, "'");
}

// What the text says of a value.
struct Kind {
  ScalarType dtype;
  std::vector<int64_t> sizes, strides;

  int64_t elements() const {  // from the first to the last, of any strides
    int64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] == 0) return 0;
      last += (sizes[i] - 1) * strides[i];
    }
    return last + 1;
  }
  bool describes(const Ref& t) const {
    if (t.scalar_type() != dtype || t.dim() != int64_t(sizes.size())) return false;
    for (int64_t i = 0; i < t.dim(); ++i)
      if (t.size(i) != sizes[size_t(i)]) return false;
    return true;
  }
  Ref nowhere() const { return Ref(nullptr, dtype, sizes, strides); }
  bool lies_as(const Ref& t) const {
    bool same = true;
    for (int64_t i = 0; i < t.dim(); ++i) same = same && (t.size(i) == 1 || t.stride(i) == strides[size_t(i)]);
    return same || t.numel() == 0;
  }
};

// The words of a program, front to back.
class Words {
 public:
  explicit Words(const std::string& text) : text_(text) {}

  std::string word() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
    const size_t begin = at_;
    while (at_ < text_.size() && text_[at_] != ' ') ++at_;
    if (begin == at_) fail(kSequence, "the program ends too early");
    return text_.substr(begin, at_ - begin);
  }
  int64_t number() {
    const std::string w = word();
    char* end = nullptr;
    errno = 0;
    const long long n = std::strtoll(w.c_str(), &end, 10);
    if (*end != 0 || errno != 0) fail(kSequence, "'", w, "' is no number");
    return n;
  }
  int64_t count(int64_t most) {
    const int64_t n = number();
    if (n < 0 || n > most) fail(kSequence, n, " is not a count of at most ", most);
    return n;
  }
  double real() {
    const std::string w = word();
    char* end = nullptr;
    const double f = std::strtod(w.c_str(), &end);
    if (*end != 0) fail(kSequence, "'", w, "' is no number");
    return f;
  }
  std::vector<int64_t> numbers(int64_t most) {
    std::vector<int64_t> all(size_t(count(most)));
    for (int64_t& n : all) n = number();
    return all;
  }
  Kind kind() {
    Kind k{dtype_named(word()), {}, {}};
    k.sizes = numbers(kMostAxes);
    double all = 1, span = 1;
    for (int64_t n : k.sizes) {
      if (n < 0) fail(kSequence, "a size is negative");
      all *= double(n);
    }
    for (size_t i = 0; i < k.sizes.size(); ++i) {
      k.strides.push_back(number());
      if (k.strides.back() < 0) fail(kSequence, "a stride is negative");
      span += double(k.sizes[i]) * double(k.strides.back());
    }
    if (all > 1e15 || span > 1e15) fail(kSequence, "a value is too large");
    return k;
  }
  bool done() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
    return at_ == text_.size();
  }

 private:
  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace
}  // namespace qcompile
