// Switching between stacks. A switch stays in user space: a kernel with 256 threads and a few hundred collective
// operations makes some hundred thousand of them, and swapcontext's two system calls each would dominate.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)

extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** from, void* to);

// Saves what the System V ABI makes the callee keep, and continues on the other stack.
asm(R"(
    .text
    .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
    .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    // `entry` will run on the stack that ends at `top`; it must not return.
    void prepare(unsigned char* /*stack*/, unsigned char* top, void (*entry)()) {
        auto slot = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
        *--slot = nullptr;  // the return address of `entry`; with it the stack is aligned as after a call
        *--slot = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--slot = nullptr;
        stack_pointer = slot;
    }
};

inline void switch_context(Context& from, Context& to) {
    cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
}

#else

}  // namespace cuda_on_cpu

#include <ucontext.h>

namespace cuda_on_cpu {

struct Context {
    ucontext_t saved;

    void prepare(unsigned char* stack, unsigned char* top, void (*entry)()) {
        getcontext(&saved);
        saved.uc_stack.ss_sp = stack;
        saved.uc_stack.ss_size = static_cast<size_t>(top - stack);
        saved.uc_link = nullptr;
        makecontext(&saved, entry, 0);
    }
};

inline void switch_context(Context& from, Context& to) {
    swapcontext(&from.saved, &to.saved);
}

#endif

}  // namespace cuda_on_cpu
