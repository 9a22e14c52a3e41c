// Which instruction set runs: the best the processor has, unless QCOMPILE_ISA or set_isa() names another.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qcompile {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
// Not every compiler that builds it knows its name in __builtin_cpu_supports.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#elif defined(__aarch64__)
// The dot product of ARMv8.2; every 64-bit Apple processor that runs macOS has it.
bool has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
#else
  return true;
#endif
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

const Candidate kCandidates[] = {
// best first; build.py leaves out what the processor that it builds for cannot run
#if defined(__x86_64__) || defined(_M_X64)
#ifndef QCOMPILE_WITHOUT_AVX512VNNI
    {&kAvx512Vnni,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni");
     }},
#endif
#ifndef QCOMPILE_WITHOUT_AVXVNNI
    {&kAvxVnni, has_avxvnni},
#endif
    {&kAvx2, has_avx2},
#elif defined(__aarch64__) && !defined(QCOMPILE_WITHOUT_NEON)
    {&kNeon, has_dotprod},
#endif
    {&kPortable, [] { return true; }},
};

std::atomic<const Kernels*> current{nullptr};

const Kernels* find(const std::string& name) {
  std::string known, usable;
  for (const Candidate& c : kCandidates) {
    const bool ok = c.supported();
    if (ok && (name.empty() || name == c.kernels->name)) return c.kernels;
    known += std::string(known.empty() ? "" : ", ") + c.kernels->name;
    if (ok) usable += std::string(usable.empty() ? "" : ", ") + c.kernels->name;
  }
  throw std::runtime_error("QCOMPILE_ISA=" + name + " cannot run here: this build knows " + known +
                           ", this processor runs " + usable);
}

}  // namespace

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_acquire);
  if (k == nullptr) {
    const char* wanted = std::getenv("QCOMPILE_ISA");
    k = find(wanted == nullptr ? "" : wanted);
    current.store(k, std::memory_order_release);
  }
  return *k;
}

void set_isa(const char* name) { current.store(find(name), std::memory_order_release); }

}  // namespace qcompile
