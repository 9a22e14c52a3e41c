// Answers the CPUID instructions that onnxruntime_avx2.py replaced by traps as a processor without AVX-512, AVX-VNNI and AMX
// would. Preloaded; x86-64 Linux.
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

static unsigned without(unsigned value, const int* bits) {
  for (; *bits >= 0; ++bits) value &= ~(1u << *bits);
  return value;
}

static void on_trap(int number, siginfo_t* info, void* context) {
  // Bits of leaf 7 (Intel SDM, CPUID): AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL / VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ /
  // 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8; of its first subleaf AVX-VNNI, AVX512-BF16,
  // AMX-FP16, AVX-IFMA.
  static const int ebx[] = {16, 17, 21, 26, 27, 28, 30, 31, -1}, ecx[] = {1, 6, 11, 12, 14, -1};
  static const int edx[] = {2, 3, 8, 22, 23, 24, 25, -1}, eax1[] = {4, 5, 21, 23, -1};
  greg_t* r = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned leaf = (unsigned)r[REG_RAX], subleaf = (unsigned)r[REG_RCX];
  unsigned a, b, c, d;
  (void)number, (void)info;
  __cpuid_count(leaf, subleaf, a, b, c, d);
  if (leaf == 7 && subleaf == 0) {
    b = without(b, ebx);
    c = without(c, ecx);
    d = without(d, edx);
  } else if (leaf == 7 && subleaf == 1) {
    a = without(a, eax1);
    d = 0;  // AVX-VNNI-INT8 and later
  }
  r[REG_RAX] = a;
  r[REG_RBX] = b;
  r[REG_RCX] = c;
  r[REG_RDX] = d;
  r[REG_RIP] += 1;  // the byte after the trap, which was CPUID's second
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_trap;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGTRAP, &action, 0);
}
