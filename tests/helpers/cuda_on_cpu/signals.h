// Signals: an access that meets a protected page, or what the compiler was asked to check (SIGILL, SIGTRAP), ends the
// launch, not the process.
#pragma once

#include <signal.h>

#include "state.h"

namespace cuda_on_cpu {

inline void on_signal(int signal, siginfo_t* info, void*) {
    if (state.thread < 0) {  // not the kernel's: let it happen again, with the usual consequence
        ::signal(signal, SIG_DFL);
        return;
    }
    const bool is_access = signal == SIGSEGV || signal == SIGBUS;
    fail("%s at %p, after that line (0: the start)",
         is_access ? "access out of bounds: protected memory" : "undefined arithmetic or index", info->si_addr);
}

class SignalGuard {
public:
    SignalGuard() {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
        stack_t stack = {};
        stack.ss_sp = handler_stack_;
        stack.ss_size = sizeof handler_stack_;
        sigaltstack(&stack, &old_stack_);
        for (int i = 0; i < NUM_SIGNALS; ++i) sigaction(SIGNALS[i], &action, &old_[i]);
    }

    ~SignalGuard() {
        for (int i = 0; i < NUM_SIGNALS; ++i) sigaction(SIGNALS[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    static constexpr int NUM_SIGNALS = 5;
    static constexpr int SIGNALS[NUM_SIGNALS] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    static inline unsigned char handler_stack_[64 * 1024];
    struct sigaction old_[NUM_SIGNALS];
    stack_t old_stack_;
};

}  // namespace cuda_on_cpu
