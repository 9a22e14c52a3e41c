// Linears that feed one another, over few rows: one parallel region for all of them, without a barrier. Threads claim units of
// the current linear and go on to the next one when all of its units are done, whoever did them; so it does not matter how
// many threads there are, or whether they run at the same time.
#pragma once

#include <atomic>
#include <cmath>
#include <thread>

#include "linear.h"

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
      Linear a = c_.stages[s].linear;
      a.scratch = scratch;
      LinearRun<V> run(a);
      // Each thread rounds the few activations for itself: that is sooner done than waited for.
      const Norm& norm = c_.stages[s].norm;
      float* rows = reinterpret_cast<float*>(scratch + c_.thread_bytes) - a.m * a.w.cols;
      if (norm.weight != nullptr) {
        for (int64_t m = 0; m < a.m; ++m) normalize(a, norm, m, rows + m * a.w.cols);
        run.read_few(reinterpret_cast<const char*>(rows), DType::kFloat32);
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
      for (int spins = 0; done_[s].load(std::memory_order_acquire) < a.units; ++spins) wait(spins);
    }
  }

  // x / sqrt(mean(x^2) + eps) * weight, in float32.
  static void normalize(const Linear& a, const Norm& norm, int64_t m, float* out) {
    using F = typename V::F;
    const char* row = a.x + m * a.w.cols * int64_t(element_size(a.dtype));
    const int64_t whole = a.w.cols / kTile * kTile;
    F squares = V::set1(0.0f);
    for (int64_t k = 0; k < whole; k += kTile) {
      const F x = V::load16(row + k * int64_t(element_size(a.dtype)), a.dtype);
      squares = V::fma(x, x, squares);
    }
    alignas(64) float lanes[kTile];
    V::store(lanes, squares);
    float sum = 0.0f;
    for (float lane : lanes) sum += lane;
    for (int64_t k = whole; k < a.w.cols; ++k) {
      const float x = load_scalar(row, a.dtype, k);
      sum += x * x;
    }
    const float factor = 1.0f / std::sqrt(sum / float(a.w.cols) + norm.eps);
    for (int64_t k = 0; k < whole; k += kTile) {
      const F x = V::load16(row + k * int64_t(element_size(a.dtype)), a.dtype);
      const F w = V::load16(norm.weight + k * int64_t(element_size(norm.dtype)), norm.dtype);
      V::store(out + k, V::mul(V::mul(x, V::set1(factor)), w));
    }
    for (int64_t k = whole; k < a.w.cols; ++k)
      out[k] = load_scalar(row, a.dtype, k) * factor * load_scalar(norm.weight, norm.dtype, k);
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
