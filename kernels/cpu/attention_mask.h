// Which keys the mask of an attention shows, block by block, so that the others need not be read.
#pragma once

#include <limits>

#include "attention_plan.h"
#include "half.h"
#include "tile.h"

namespace qcompile {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();  // a score that excludes its key

// What an element of the mask adds to a score.
inline float mask_value(const Attention& a, const char* element) {
  if (a.mask_is_bool) return *element != 0 ? 0.0f : kNever;
  return load_scalar(element, a.mask_dtype, 0);
}

// Finds what each block of keys shows to any query: once for all heads that see the same mask.
class MaskScan {
 public:
  MaskScan(const Attention& a, const AttentionPlan& plan) : a_(a), plan_(plan) {}

  void run(VisibleKeys* out) {
    out_ = out;
    a_.parallel(plan_.masks, 1 + 65536 / (plan_.mask_heads * a_.queries * a_.keys + 1),
                [](int64_t begin, int64_t end, void* self) {
                  for (int64_t i = begin; i < end; ++i) static_cast<MaskScan*>(self)->scan(i);
                }, this);
  }

 private:
  void scan(int64_t index) {
    const int64_t batch = index / plan_.mask_groups, group = index % plan_.mask_groups;
    const char* mask = a_.mask + batch * a_.mask_stride[0] + group * plan_.mask_heads * a_.mask_stride[1];
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const int count = int(min64(kKeyBlock, a_.keys - block * kKeyBlock));
      uint64_t some[kKeyBlock / 8] = {};
      uint8_t all[kKeyBlock];
      std::memset(all, 1, sizeof all);
      uint8_t* any = reinterpret_cast<uint8_t*>(some);
      for (int64_t head = 0; head < plan_.mask_heads; ++head)
        for (int64_t query = 0; query < plan_.mask_queries; ++query)
          add_row(mask + head * a_.mask_stride[1] + query * a_.mask_stride[2] + block * kKeyBlock * a_.mask_stride[3],
                  count, any, all);
      int begin = 0, end = count;
      while (begin < count && some[begin / 8] == 0) begin += 8;
      while (begin < count && any[begin] == 0) ++begin;
      if (begin >= count) begin = end = 0;
      while (end > begin && any[end - 1] == 0) --end;
      bool plain = true;
      for (int i = begin; i < end; ++i) plain = plain && all[i] != 0;
      out_[index * plan_.blocks + block] = {uint8_t(begin), uint8_t(end), plain};
    }
  }

  void add_row(const char* row, int count, uint8_t* any, uint8_t* all) const {
    const int64_t step = a_.mask_stride[3];
    if (a_.mask_is_bool && step == 1) {
      const uint8_t* seen = reinterpret_cast<const uint8_t*>(row);
      for (int i = 0; i < count; ++i) {
        any[i] |= seen[i];
        all[i] &= uint8_t(seen[i] != 0);
      }
      return;
    }
    for (int i = 0; i < count; ++i) {
      const float bias = mask_value(a_, row + i * step);
      any[i] |= uint8_t(bias != kNever);
      all[i] &= uint8_t(bias == 0.0f);
    }
  }

  const Attention& a_;
  const AttentionPlan& plan_;
  VisibleKeys* out_ = nullptr;
};

// Finds what each block of keys shows to each query: for many queries.
class RowScan {
 public:
  RowScan(const Attention& a, const ManyPlan& plan) : a_(a), plan_(plan) {}

  void run(VisibleKeys* out) {
    out_ = out;
    a_.parallel(plan_.mask_rows, 1 + 65536 / (a_.keys + 1), [](int64_t begin, int64_t end, void* self) {
      for (int64_t i = begin; i < end; ++i) static_cast<RowScan*>(self)->scan(i);
    }, this);
  }

 private:
  void scan(int64_t index) {
    const int64_t query = index % plan_.mask_queries, rest = index / plan_.mask_queries;
    const int64_t head = rest % plan_.mask_heads, batch = rest / plan_.mask_heads, step = a_.mask_stride[3];
    const char* row = a_.mask + batch * a_.mask_stride[0] + head * a_.mask_stride[1] + query * a_.mask_stride[2];
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const int count = int(min64(kKeyBlock, a_.keys - block * kKeyBlock));
      out_[index * plan_.blocks + block] = visible(row + block * kKeyBlock * step, count, step);
    }
  }

  VisibleKeys visible(const char* row, int count, int64_t step) const {
    const VisibleKeys nothing = {0, 0, true}, everything = {0, uint8_t(count), true};
    int shown = 0, hidden = 0;  // as in most blocks: seen as they are, or not at all
    if (a_.mask_is_bool && step == 1) {
      for (int i = 0; i < count; ++i) shown += row[i] != 0;
      hidden = count - shown;
    } else if (!a_.mask_is_bool && a_.mask_dtype == DType::kFloat32 && step == 4) {
      const float* bias = reinterpret_cast<const float*>(row);
      for (int i = 0; i < count; ++i) {
        shown += bias[i] == 0.0f;
        hidden += bias[i] == kNever;
      }
    }
    if (hidden == count) return nothing;
    if (shown == count) return everything;
    int begin = 0, end = count;
    while (begin < count && mask_value(a_, row + begin * step) == kNever) ++begin;
    if (begin == count) return nothing;
    while (mask_value(a_, row + (end - 1) * step) == kNever) --end;
    bool plain = true;
    for (int i = begin; plain && i < end; ++i) plain = mask_value(a_, row + i * step) == 0.0f;
    return {uint8_t(begin), uint8_t(end), plain};
  }

  const Attention& a_;
  const ManyPlan& plan_;
  VisibleKeys* out_ = nullptr;
};

}  // namespace
}  // namespace qcompile
