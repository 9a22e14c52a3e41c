// A GPU's lanes as fibers of one thread of the CPU: what CUDA and Metal kernels run on where there is no GPU.
//
// The lanes of one block (threadgroup) take turns. A lane that comes to a barrier, shuffle or matrix operation leaves its
// contribution and yields; when every lane of its warp (or block) waits at the same line, all go on with a copy of what each
// brought. Lanes that wait at different places, or for lanes that have left the kernel, can never go on: that is reported as
// a deadlock, with the lines. Memory given to a kernel ends at a page that may not be touched, and shared memory starts out
// as NaN, so that a read or write outside, or of what nobody wrote, is seen.
//
// Not modelled: races between lanes without a barrier (lanes run one after the other), asynchronous copies, memory order.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <vector>

// Variables in this section are shared memory.
#define SHIM_SHARED static __attribute__((section("shim_shared"), used))
extern "C" char __start_shim_shared[] __attribute__((weak));
extern "C" char __stop_shim_shared[] __attribute__((weak));

namespace shim {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;
constexpr size_t SLOT = 128;

enum Scope { RUNNING, IN_WARP, IN_BLOCK };

struct Lane {
    ucontext_t start;
    jmp_buf place;
    std::vector<char> stack;
    bool begun, done;
    Scope scope;
    int line;
    const char* operation;
    alignas(16) char brought[SLOT];
    alignas(16) char released[SLOT];
};

struct Block {
    std::vector<Lane> lanes;
    int current = 0;
    jmp_buf scheduler;
    const std::function<void(int)>* body = nullptr;
};

inline Block& block() {
    static Block one;
    return one;
}

inline std::string& problem() {
    static std::string text;
    return text;
}

inline void enter() {
    Block& b = block();
    (*b.body)(b.current);
    b.lanes[b.current].done = true;
    _longjmp(b.scheduler, 1);
}

// Wait until all lanes in scope are here; `value` of each of them can then be read with `from`.
inline void meet(Scope scope, const char* operation, int line, const void* value = nullptr, size_t size = 0) {
    Block& b = block();
    Lane& lane = b.lanes[b.current];
    if (size) memcpy(lane.brought, value, size);
    lane.scope = scope;
    lane.operation = operation;
    lane.line = line;
    if (_setjmp(lane.place) == 0) _longjmp(b.scheduler, 1);
}

template <class T>
T exchange(const T& value, const char* operation, int line, int from) {
    static_assert(sizeof(T) <= SLOT, "a lane brings at most SLOT bytes");
    meet(IN_WARP, operation, line, &value, sizeof(T));
    T got;
    memcpy(&got, block().lanes[block().current / WARP * WARP + from % WARP].released, sizeof(T));
    return got;
}

inline sigjmp_buf& rescue() {
    static sigjmp_buf place;
    return place;
}

// Give up, with a reason.
[[noreturn]] inline void fail(const std::string& why) {
    problem() = why;
    siglongjmp(rescue(), 2);
}

template <class T>
T brought_by(int lane) {  // after a meet() of the warp
    T got;
    memcpy(&got, block().lanes[block().current / WARP * WARP + lane].released, sizeof(T));
    return got;
}

template <class T>
const T& seen_by(int lane) {  // the same without a copy
    return *(const T*)block().lanes[block().current / WARP * WARP + lane].released;
}

inline int lane_index() { return block().current % WARP; }

// Whether lanes [first, last) all wait at one place; false if some have left.
inline bool together(int first, int last, Scope scope) {
    const Lane& one = block().lanes[first];
    for (int i = first; i < last; i++) {
        const Lane& lane = block().lanes[i];
        if (lane.done || lane.scope != scope || lane.line != one.line || strcmp(lane.operation, one.operation)) return false;
    }
    return true;
}

inline void release(int first, int last) {
    for (int i = first; i < last; i++) {
        Lane& lane = block().lanes[i];
        memcpy(lane.released, lane.brought, SLOT);
        lane.scope = RUNNING;
    }
}

inline void report_deadlock() {
    std::string text = "deadlock:";
    std::string last;
    for (size_t i = 0; i < block().lanes.size(); i++) {
        const Lane& lane = block().lanes[i];
        std::string state = lane.done ? "have left the kernel"
                                      : "wait at " + std::string(lane.operation) + " in line " + std::to_string(lane.line);
        if (state != last) text += (last.empty() ? " lanes from " : "; from ") + std::to_string(i) + " on " + state;
        last = state;
    }
    problem() = text;
}

// Run one block; false, with `problem`, if it cannot go on.
inline bool run_block(int size, const std::function<void(int)>& body) {
    Block& b = block();
    b.lanes.resize(size);
    b.body = &body;
    for (Lane& lane : b.lanes) {
        if (lane.stack.empty()) lane.stack.resize(STACK);
        lane.begun = lane.done = false;
        lane.scope = RUNNING;
    }
    if (__start_shim_shared) memset(__start_shim_shared, 0xff, __stop_shim_shared - __start_shim_shared);
    for (;;) {
        volatile bool alive = false;
        for (volatile int i = 0; i < size; i = i + 1) {
            Lane& lane = b.lanes[i];
            if (lane.done || lane.scope != RUNNING) continue;
            alive = true;
            b.current = i;
            if (_setjmp(b.scheduler) == 0) {
                if (lane.begun) _longjmp(lane.place, 1);
                lane.begun = true;
                getcontext(&lane.start);
                lane.start.uc_stack.ss_sp = lane.stack.data();
                lane.start.uc_stack.ss_size = lane.stack.size();
                lane.start.uc_link = nullptr;
                makecontext(&lane.start, enter, 0);
                setcontext(&lane.start);
            }
        }
        bool waiting = false, freed = false;
        for (int first = 0; first < size; first += WARP) {
            const int last = first + WARP < size ? first + WARP : size;
            if (together(first, last, IN_WARP)) release(first, last), freed = true;
        }
        if (!freed && together(0, size, IN_BLOCK)) release(0, size), freed = true;
        for (const Lane& lane : b.lanes) waiting |= !lane.done;
        if (!waiting) return true;
        if (!freed && !alive) return report_deadlock(), false;
    }
}

// A copy of a buffer that ends (but for the rest to 16 bytes) at a page which may not be touched; the rest is NaN.
struct Guarded {
    char* pages;
    size_t mapped, size;
    char* data;

    Guarded(const void* from, size_t bytes) : size(bytes) {
        const size_t page = sysconf(_SC_PAGESIZE);
        const size_t inner = (bytes + 15) / 16 * 16;
        mapped = (inner + page - 1) / page * page + 2 * page;
        pages = (char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(pages + page, 0xff, mapped - 2 * page);
        data = pages + mapped - page - inner;
        memcpy(data, from, bytes);
        mprotect(pages, page, PROT_NONE);
        mprotect(pages + mapped - page, page, PROT_NONE);
    }
    bool whole() const {  // nothing was written behind the end
        for (const char* p = data + size; p < pages + mapped - sysconf(_SC_PAGESIZE); p++) {
            if (*p != (char)0xff) return false;
        }
        return true;
    }
    bool near(const void* address) const { return address >= pages && address < pages + mapped; }
    ~Guarded() { munmap(pages, mapped); }
};

inline void*& fault() {
    static void* address;
    return address;
}
inline void on_fault(int, siginfo_t* info, void*) {
    fault() = info->si_addr;
    siglongjmp(rescue(), 1);
}

// One argument of a kernel: a buffer (`bytes` of it) or a scalar (bytes = 0).
struct Argument {
    void* data;
    int64_t bytes;
};

// Run blocks of `threads` lanes over a grid. `body(arguments, block x, y, z, thread)` calls the kernel.
using Body = std::function<void(void* const* arguments, const int* place, int thread)>;

inline const char* run_grid(Argument* arguments, int count, const int* grid, int threads, const Body& body) {
    std::vector<Guarded*> copies(count, nullptr);
    std::vector<void*> pointers(count);
    for (int i = 0; i < count; i++) {
        if (arguments[i].bytes) copies[i] = new Guarded(arguments[i].data, arguments[i].bytes);
        pointers[i] = copies[i] ? copies[i]->data : arguments[i].data;
    }
    static std::vector<char> spare(1 << 16);
    stack_t old_stack, stack = {};
    stack.ss_sp = spare.data();
    stack.ss_size = spare.size();
    sigaltstack(&stack, &old_stack);
    struct sigaction action = {}, old_segv, old_bus;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    problem().clear();
    const int stopped = sigsetjmp(rescue(), 1);
    if (stopped == 0) {
        for (int at = 0; at < grid[0] * grid[1] * grid[2]; at++) {
            const int place[3] = {at % grid[0], at / grid[0] % grid[1], at / grid[0] / grid[1]};
            if (!run_block(threads, [&](int thread) { body(pointers.data(), place, thread); })) break;
        }
    } else if (stopped == 1) {
        problem() = "read or write outside every argument";
        for (int i = 0; i < count; i++) {
            if (copies[i] && copies[i]->near(fault())) {
                const long off = (char*)fault() - copies[i]->data;
                problem() = "read or write outside argument " + std::to_string(i) + ": byte " + std::to_string(off) + " of " +
                            std::to_string(copies[i]->size);
            }
        }
    }
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
    for (int i = 0; i < count; i++) {
        if (!copies[i]) continue;
        if (!copies[i]->whole() && problem().empty()) problem() = "wrote behind the end of argument " + std::to_string(i);
        if (problem().empty()) memcpy(arguments[i].data, copies[i]->data, arguments[i].bytes);
        delete copies[i];
    }
    return problem().c_str();
}

}  // namespace shim
