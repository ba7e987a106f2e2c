// What every part of the emulation knows: the threads of the block that runs now, and the first error of the launch.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "context.h"

namespace cuda_on_cpu {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

// A buffer in global memory that the kernel may use.
struct Buffer {
    const void* base;
    size_t bytes;
    int writable;
};

struct Copy {  // of cp.async, not carried out yet
    unsigned char* shared;
    const unsigned char* global;
    unsigned bytes, bytes_read;
    int line;
};

enum class Status { READY, AT_BARRIER, AT_COLLECTIVE, DONE };

struct Thread {
    Context context;
    Dim index;
    Status status;
    int line;          // of the barrier or collective where it waits
    const char* kind;  // of that collective
    std::vector<Copy> copies;
    std::vector<size_t> group_ends;  // committed groups: `copies` up to here
};

struct State {
    Dim thread_index, block_index, block_dim, grid_dim;  // of the thread that runs now
    int thread = -1;                                     // its number in the block; -1: the scheduler runs
    int line = 0;                                        // of the last wrapper function that it called
    unsigned epoch = 0;                                  // changes with every barrier and every block
    Context scheduler;
    Thread threads[MAX_THREADS];
    char error[1024] = "";
};

static State state;

// Notes the first error; later ones are its consequences.
inline void note_error(int thread, int line, const char* format, va_list values) {
    if (state.error[0]) return;
    const Dim t = thread < 0 ? Dim{0, 0, 0} : state.threads[thread].index, b = state.block_index;
    char text[768];
    vsnprintf(text, sizeof text, format, values);
    snprintf(state.error, sizeof state.error, "line %d, thread (%u, %u, %u) of block (%u, %u, %u): %s", line, t.x, t.y,
             t.z, b.x, b.y, b.z, text);
}

// Ends the launch with an error of the thread that runs now; the scheduler never comes back to it.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    note_error(state.thread, state.line, format, values);
    va_end(values);
    Context abandoned;
    switch_context(abandoned, state.scheduler);
    __builtin_unreachable();
}

// The same for an error that the scheduler finds: it returns.
__attribute__((format(printf, 3, 4))) inline void fail_thread(int thread, int line, const char* format, ...) {
    va_list values;
    va_start(values, format);
    note_error(thread, line, format, values);
    va_end(values);
}

}  // namespace cuda_on_cpu
