// A driver that launches nothing and says what it was asked to: for the one part of a launch that no emulation covers.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

int cuInit(unsigned flags) { return 0; }

int cuModuleLoadData(void** module, const void* image) {
    *module = (void*)0x1234;
    return memcmp(image, "\x7f" "ELF", 4) ? 300 : 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = (void*)0x5678;
    return module == (void*)0x1234 && !strcmp(name, "qcompile_linear") ? 0 : 500;
}

int cuLaunchKernel(
    void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
    void** arguments, void** extra
) {
    printf("launch %d %u %u %u %u %u %u %u %llu", function == (void*)0x5678 && !extra, gx, gy, gz, bx, by, bz, shared,
           (unsigned long long)(uintptr_t)stream);
    for (int i = 0; i < 8; i++) printf(" %llu", *(unsigned long long*)arguments[i]);
    for (int i = 8; i < 12; i++) printf(" %d", *(int*)arguments[i]);
    printf("\n");
    fflush(stdout);
    return gx == 999 ? 1 : 0;
}

int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status) {
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = self ? dlsym(self, symbol) : 0;
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}

int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, 0);
}
