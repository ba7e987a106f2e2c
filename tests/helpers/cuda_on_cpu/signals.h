// Signals: an access that meets a protected page, or what the compiler was asked to check (SIGILL, SIGTRAP), ends the
// launch, not the process. So does an alarm (SIGVTALRM), by CPU time so that a busy machine does not set it off.
#pragma once

#include <signal.h>
#include <sys/time.h>

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

// Comes again and again: what it tells the scheduler is too late for the thread that has just been resumed.
inline void on_alarm(int, siginfo_t*, void*) {
    const char* const message = "the launch does not end in its time";
    if (state.thread >= 0) fail("%s", message);
    fail_thread(-1, 0, "%s", message);
}

class SignalGuard {
public:
    explicit SignalGuard(double limit_s) {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
        stack_t stack = {};
        stack.ss_sp = handler_stack_;
        stack.ss_size = sizeof handler_stack_;
        sigaltstack(&stack, &old_stack_);
        for (int i = 0; i < NUM_SIGNALS; ++i) sigaction(SIGNALS[i], &action, &old_[i]);
        action.sa_sigaction = on_alarm;
        sigaction(SIGVTALRM, &action, &old_alarm_);
        const auto seconds = static_cast<time_t>(limit_s);
        const timeval limit = {seconds, static_cast<suseconds_t>((limit_s - static_cast<double>(seconds)) * 1e6)};
        const itimerval timer = {{0, 10000}, limit};
        setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    }

    ~SignalGuard() {
        const itimerval none = {};
        setitimer(ITIMER_VIRTUAL, &none, nullptr);
        sigaction(SIGVTALRM, &old_alarm_, nullptr);
        for (int i = 0; i < NUM_SIGNALS; ++i) sigaction(SIGNALS[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    static constexpr int NUM_SIGNALS = 5;
    static constexpr int SIGNALS[NUM_SIGNALS] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    static inline unsigned char handler_stack_[64 * 1024];
    struct sigaction old_[NUM_SIGNALS], old_alarm_;
    stack_t old_stack_;
};

}  // namespace cuda_on_cpu
