// Functions that run in turn on one OS thread, each on a stack of its own, and hand on to each other without a system
// call. Where there is no assembly for the processor, or with DQL_EMULATOR_UCONTEXT, by ucontext: slowly.
#pragma once

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if !(defined(__x86_64__) || defined(__aarch64__)) || defined(DQL_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define DQL_UCONTEXT 1
#else
#define DQL_UCONTEXT 0
#endif

// AddressSanitizer is told of each switch, or exceptions on these stacks would confuse it.
#if defined(__SANITIZE_ADDRESS__)
#define DQL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DQL_ASAN 1
#endif
#endif
#if defined(DQL_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dql {
namespace emulator {

struct Stack {
    char* bottom;
    size_t size;
};

// Of one OS thread. They stay mapped for its next run, since a page's first touch is slow.
class Stacks {
public:
    Stack at(size_t fiber, size_t count) {
        if (count > count_) grow(count);
        // Their tops differ in their low bits: else all that is in use would fall into the same few lines of the cache.
        return {memory_ + fiber * apart_ + page_, SIZE - fiber % 16 * 256};
    }
    ~Stacks() { give_back(); }

private:
    static constexpr size_t SIZE = 64 * 1024;

    void give_back() {
        if (memory_ != nullptr) munmap(memory_, count_ * apart_);
        memory_ = nullptr;
        count_ = 0;
    }
    void grow(size_t count) {
        give_back();
        void* const mapped = mmap(nullptr, count * apart_, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        memory_ = static_cast<char*>(mapped);
        count_ = count;
        for (size_t i = 0; i < count; ++i)  // whoever needs more than his stack is not to find his neighbour's
            if (mprotect(memory_ + i * apart_, page_, PROT_NONE) != 0) throw std::bad_alloc();
    }

    const size_t page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t apart_ = (SIZE + page_ - 1) / page_ * page_ + page_;
    char* memory_ = nullptr;
    size_t count_ = 0;
};

// A function that stands still, or (at first) the OS thread's own.
struct Context {
#if DQL_UCONTEXT
    ucontext_t saved;
#else
    void* saved = nullptr;  // its stack pointer
#endif
#if defined(DQL_ASAN)
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake = nullptr;
#endif
};

#if !DQL_UCONTEXT
// Pushes what a call keeps, leaves the stack pointer at `from`, goes on with the stack at `to`.
extern "C" void dql_emulator_switch(void** from, void* to);
#if defined(__x86_64__)
constexpr int KEPT = 6;  // words, the return address behind them
asm(R"(
.pushsection .text
.local dql_emulator_switch
.type dql_emulator_switch, %function
dql_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size dql_emulator_switch, .-dql_emulator_switch
.popsection
)");
#else
constexpr int KEPT = 20;
asm(R"(
.pushsection .text
.local dql_emulator_switch
.type dql_emulator_switch, %function
dql_emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size dql_emulator_switch, .-dql_emulator_switch
.popsection
)");
#endif
#endif

// `entry` on this stack, when it is first switched to. Whatever ran on it before is forgotten.
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
    context = Context();
#if defined(DQL_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(stack.bottom, stack.size);
    context.bottom = stack.bottom;
    context.size = stack.size;
#endif
#if DQL_UCONTEXT
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = stack.bottom;
    context.saved.uc_stack.ss_size = stack.size;
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, entry, 0);
#else
    auto* top = reinterpret_cast<uint64_t*>(stack.bottom + stack.size);
#if defined(__x86_64__)
    *--top = 0;  // in place of the return address of entry, so that its stack is aligned as after a call
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < KEPT; ++i) *--top = 0;
#else
    for (int i = 0; i < KEPT; ++i) *--top = 0;
    top[11] = reinterpret_cast<uint64_t>(entry);  // x30
#endif
    context.saved = top;
#endif
}

// First of all in an `entry` that `from` switched to: whose stack that was is known only now.
inline void arrived(Context& from) {
#if defined(DQL_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
#else
    static_cast<void>(from);
#endif
}

inline void go(Context& from, Context& to) {
#if defined(DQL_ASAN)
    __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
#if DQL_UCONTEXT
    swapcontext(&from.saved, &to.saved);
#else
    dql_emulator_switch(&from.saved, to.saved);
#endif
#if defined(DQL_ASAN)
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

}  // namespace emulator
}  // namespace dql
