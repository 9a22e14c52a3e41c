// Linears and norms that feed one another, over few rows: one parallel region for all of them, without a barrier. Threads claim
// units of the current stage and go on to the next one when all of its units are done, whoever did them; so it does not matter
// how many threads there are, or whether they run at the same time.
#pragma once

#include <atomic>
#include <thread>

#include "linear.h"
#include "norm.h"

namespace qcompile {
namespace {

template <class V>
class ChainRun {
 public:
  explicit ChainRun(const Chain& c) : c_(c) {
    for (int64_t s = 0; s < c.count; ++s) claimed_[s] = done_[s] = 0;
  }

  void run() {
    int64_t work = 0;
    for (int64_t s = 0; s < c_.count; ++s) work += c_.stages[s].linear.w.tiles * c_.stages[s].linear.w.blocks * 512;
    if (c_.threads == 1 || work < 2 * kThreadWork) return follow(0);
    c_.parallel(c_.threads, 1, [](int64_t begin, int64_t, void* self) { static_cast<ChainRun*>(self)->follow(begin); }, this);
  }

 private:
  // Through all stages, in the scratch of a thread.
  void follow(int64_t thread) {
    char* scratch = c_.scratch + size_t(thread) * c_.thread_bytes;
    for (int64_t s = 0; s < c_.count; ++s) {
      const Stage& stage = c_.stages[s];
      if (stage.linear.units > 0)
        compute(s, stage, scratch);
      else if (claimed_[s].fetch_add(1, std::memory_order_relaxed) == 0) {
        const Part& part = stage.linear.parts[0];
        normalize(stage, part.rows, static_cast<char*>(part.out), stage.linear.dtype);
        done_[s].store(1, std::memory_order_release);
      }
      const int64_t units = stage.linear.units > 0 ? stage.linear.units : 1;
      for (int spins = 0; done_[s].load(std::memory_order_acquire) < units; ++spins) wait(spins);
    }
  }

  // A thread's share of a linear.
  void compute(int64_t s, const Stage& stage, char* scratch) {
    Linear a = stage.linear;
    a.scratch = scratch;
    LinearRun<V> run(a);
    // Each thread rounds the few activations for itself: that is sooner done than waited for.
    if (stage.norm.weight != nullptr) {
      char* rows = scratch + c_.thread_bytes - size_t(a.m * a.w.cols) * 4;
      normalize(stage, a.w.cols, rows, DType::kFloat32);
      run.read_few(rows, DType::kFloat32);
    } else {
      run.read_few(a.x, a.dtype);
    }
    // One long share for each thread: it reads fastest where it goes on.
    const int64_t share = (a.units + c_.threads - 1) / c_.threads;
    for (int64_t first; (first = claimed_[s].fetch_add(share, std::memory_order_relaxed)) < a.units;) {
      const int64_t last = min64(first + share, a.units);
      run.compute(first, last);
      done_[s].fetch_add(last - first, std::memory_order_release);
    }
  }

  static void normalize(const Stage& stage, int64_t cols, char* out, DType type) {
    const Linear& a = stage.linear;
    for (int64_t at = 0; at < a.m * cols; at += cols)
      normalize_row<V>(stage.norm, a.x + at * int64_t(element_size(a.dtype)), a.dtype, cols,
                       out + at * int64_t(element_size(type)), type);
  }

  // A moment is usually enough; after some, whoever has the work may need this core.
  static void wait(int spins) {
    if (spins > 2000) return std::this_thread::yield();
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const Chain& c_;
  std::atomic<int64_t> claimed_[kMostStages], done_[kMostStages];
};

template <class V>
void chain(const Chain& c) {
  ChainRun<V>(c).run();
}

}  // namespace
}  // namespace qcompile
