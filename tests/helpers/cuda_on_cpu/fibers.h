// CUDA threads on one CPU core: a fiber for each thread of a block, block after block.
//
// Between barriers warps run in random order, and lanes in random order within a warp: an order that the program does
// not enforce changes with the seed. Include this header for everything: `launch`, the indices, `barrier`,
// `collective`, `shared_memory`, `fail`, and the checks of memory.h.
#pragma once

#include <utility>

#include "memory.h"
#include "signals.h"

namespace cuda_on_cpu {

constexpr size_t STACK_BYTES = 32 * 1024;
constexpr uint64_t STACK_END = 0x5CA1AB1E0DDBA11ull;  // stands where a stack must not reach
constexpr int NUM_ORDERS = 64;
constexpr size_t MAX_SHARED_BYTES = 48 * 1024;  // without opting in to more

struct Warp {
    int arrived;  // lanes at the collective
    void* operands[WARP];
    int lanes;
};

struct Scheduler {
    void (*kernel)(void*) = nullptr;
    void* args = nullptr;
    int num_threads = 0, num_warps = 0;
    Warp warps[MAX_THREADS / WARP];
    unsigned char orders[NUM_ORDERS][WARP];
    unsigned char* stacks = nullptr;
    uint64_t random = 1;
};

static Scheduler scheduler;

inline unsigned random_below(unsigned bound) {  // xorshift64*
    uint64_t& x = scheduler.random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return static_cast<unsigned>(((x * 0x2545F4914F6CDD1Dull) >> 32) * bound >> 32);
}

// The place of `i` in a random order of `count` things is order[i].
template <typename Number>
inline void shuffle(Number* order, unsigned count) {
    for (unsigned i = 0; i < count; ++i) order[i] = static_cast<Number>(i);
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
}

// ---------------------------------------------------------------------------------------------------------------------
// What a thread calls.

inline unsigned char* shared_memory() {
    return memory.shared;
}

inline void yield(Status status, const char* kind, int line) {
    Thread& thread = state.threads[state.thread];
    state.line = thread.line = line;
    thread.kind = kind;
    thread.status = status;
    switch_context(thread.context, state.scheduler);
}

// __syncthreads: all threads of the block must come to this line.
inline void barrier(int line = __builtin_LINE()) {
    yield(Status::AT_BARRIER, "barrier", line);
}

// An operation of the whole warp. `operands` is this lane's part, which `combine` finds by lane, reads and fills in.
inline void collective(const char* kind, int line, void* operands, void (*combine)(void* const* operands)) {
    const int number = state.thread / WARP, lane = state.thread % WARP;
    Warp& warp = scheduler.warps[number];
    state.line = line;
    warp.operands[lane] = operands;
    state.threads[state.thread].line = line;
    state.threads[state.thread].kind = kind;
    if (++warp.arrived < WARP) return yield(Status::AT_COLLECTIVE, kind, line);
    warp.arrived = 0;
    for (int other = 0; other < WARP; ++other) {
        Thread& thread = state.threads[number * WARP + other];
        if (thread.line != line || thread.kind != kind)
            fail("divergent collective: %s here, but lane %d is at %s in line %d", kind, other, thread.kind, thread.line);
        thread.status = Status::READY;
    }
    combine(warp.operands);
}

// ---------------------------------------------------------------------------------------------------------------------
// The scheduler.

inline uint64_t& stack_end(int thread) {
    return *reinterpret_cast<uint64_t*>(scheduler.stacks + STACK_BYTES * static_cast<size_t>(thread));
}

inline void run_fiber() {
    scheduler.kernel(scheduler.args);
    Thread& thread = state.threads[state.thread];
    if (stack_end(state.thread) != STACK_END) fail("the fiber's stack of %zu bytes was too small", STACK_BYTES);
    if (!thread.copies.empty()) {
        state.line = thread.copies.front().line;
        fail("thread ends while its cp.async is pending");
    }
    yield(Status::DONE, "the end", state.line);
    __builtin_unreachable();
}

inline void resume(int number) {
    Thread& thread = state.threads[number];
    state.thread = number;
    state.thread_index = thread.index;
    state.line = thread.line;
    switch_context(state.scheduler, thread.context);
    state.thread = -1;
}

// Runs each ready lane to its next barrier or collective; whether any is ready again.
inline bool run_warp(int number) {
    const Warp& warp = scheduler.warps[number];
    const unsigned char* order = scheduler.orders[random_below(NUM_ORDERS)];
    const Thread* threads = &state.threads[number * WARP];
    for (int i = 0; i < WARP; ++i) {
        if (order[i] >= warp.lanes || threads[order[i]].status != Status::READY) continue;
        resume(number * WARP + order[i]);
        if (state.error[0]) return false;
    }
    for (int lane = 0; lane < warp.lanes; ++lane)
        if (threads[lane].status == Status::READY) return true;
    return false;
}

inline void fail_stuck_warp(int number) {
    const Warp& warp = scheduler.warps[number];
    int waiting = 0, missing = -1;
    for (int lane = 0; lane < warp.lanes; ++lane) {
        const bool waits = state.threads[number * WARP + lane].status == Status::AT_COLLECTIVE;
        (waits ? waiting : missing) = number * WARP + lane;
    }
    const Thread& thread = state.threads[waiting];
    if (missing < 0)
        return fail_thread(waiting, thread.line, "divergent collective: %s in a warp of %d lanes", thread.kind, warp.lanes);
    const Thread& other = state.threads[missing];
    fail_thread(waiting, thread.line, "divergent collective: %s here, but lane %d is at %s in line %d", thread.kind,
                missing % WARP, other.status == Status::DONE ? "its end after" : other.kind, other.line);
}

// Runs warps in random order until no thread can go on. A warp mostly keeps its turn, so that some run far ahead.
inline void run_until_all_wait() {
    int ready[MAX_THREADS / WARP], count = scheduler.num_warps, turn = -1;
    for (int i = 0; i < count; ++i) ready[i] = i;
    while (count) {
        if (turn < 0 || random_below(16) == 0) turn = static_cast<int>(random_below(static_cast<unsigned>(count)));
        const int number = ready[turn];
        const bool again = run_warp(number);
        if (state.error[0]) return;
        if (again) continue;
        if (scheduler.warps[number].arrived) return fail_stuck_warp(number);
        ready[turn] = ready[--count];
        turn = -1;
    }
}

// Lets all threads pass the barrier; false when the block has ended, or not all came to the same one.
inline bool pass_barrier() {
    const Thread& first = state.threads[0];
    for (int number = 1; number < scheduler.num_threads; ++number) {
        const Thread& thread = state.threads[number];
        if (thread.status == first.status && (first.status == Status::DONE || thread.line == first.line)) continue;
        const bool first_waits = first.status == Status::AT_BARRIER;
        const Thread &waits = first_waits ? first : thread, &other = first_waits ? thread : first;
        fail_thread(first_waits ? 0 : number, waits.line, "barrier not reached by all: thread %d %s line %d",
                    first_waits ? number : 0, other.status == Status::DONE ? "ended after" : "is at the barrier in", other.line);
        return false;
    }
    if (first.status == Status::DONE) return false;
    ++state.epoch;
    for (int number = 0; number < scheduler.num_threads; ++number) state.threads[number].status = Status::READY;
    return true;
}

// The last warp of a block may have fewer.
inline int lanes_of(int warp) {
    const int left = scheduler.num_threads - warp * WARP;
    return left < WARP ? left : WARP;
}

inline void start_threads() {
    const Dim block = state.block_dim;
    for (int number = 0; number < scheduler.num_threads; ++number) {
        Thread& thread = state.threads[number];
        const auto n = static_cast<unsigned>(number);
        thread.index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
        thread.status = Status::READY;
        thread.line = 0;
        thread.kind = "the start";
        thread.copies.clear();
        thread.group_ends.clear();
        // Without the shift the same variable of all threads would compete for one set of the cache.
        unsigned char* const stack = scheduler.stacks + STACK_BYTES * n;
        stack_end(number) = STACK_END;
        thread.context.prepare(stack, stack + STACK_BYTES - n % 16 * 192, run_fiber);
    }
    for (int number = 0; number < scheduler.num_warps; ++number)
        scheduler.warps[number] = {0, {}, lanes_of(number)};
}

inline void run_block(unsigned number) {
    state.block_index = {number % state.grid_dim.x, number / state.grid_dim.x % state.grid_dim.y,
                         number / state.grid_dim.x / state.grid_dim.y};
    ++state.epoch;
    poison_shared();
    start_threads();
    do {
        run_until_all_wait();
    } while (!state.error[0] && pass_barrier());
    if (!state.error[0] && !shared_guard_intact()) fail_thread(0, 0, "write beyond the end of shared memory");
}

// ---------------------------------------------------------------------------------------------------------------------

struct Launch {
    Dim grid, block;
    size_t shared_bytes;
    uint64_t seed;
    const Buffer* buffers;
    int num_buffers;
    double limit_s;  // of CPU time
};

// Why a GPU would not start this, or null.
inline const char* why_refused(const Launch& geometry) {
    const Dim block = geometry.block;
    const auto threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    if (threads < 1 || threads > MAX_THREADS) return "a block has 1 to 1024 threads";
    if (geometry.shared_bytes > MAX_SHARED_BYTES) return "a block has at most 49152 bytes of shared memory";
    return nullptr;
}

inline void prepare_launch(void (*kernel)(void*), void* args, const Launch& geometry) {
    scheduler.kernel = kernel;
    scheduler.args = args;
    scheduler.num_threads = static_cast<int>(geometry.block.x * geometry.block.y * geometry.block.z);
    scheduler.num_warps = (scheduler.num_threads + WARP - 1) / WARP;
    scheduler.random = geometry.seed * 0x9E3779B97F4A7C15ull + 1;
    for (auto& order : scheduler.orders) shuffle(order, WARP);
    if (!scheduler.stacks)
        scheduler.stacks = static_cast<unsigned char*>(mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    state.grid_dim = geometry.grid;
    state.block_dim = geometry.block;
    state.error[0] = 0;
    state.epoch = 0;
    map_buffers(geometry.buffers, geometry.num_buffers);
    map_shared(geometry.shared_bytes);
}

// Runs kernel(args) on every thread of the grid, blocks in random order. Null, or the text of the first error.
inline const char* launch(void (*kernel)(void*), void* args, const Launch& geometry) {
    if (const char* const reason = why_refused(geometry)) return reason;
    prepare_launch(kernel, args, geometry);
    if (state.error[0]) return state.error;
    std::vector<unsigned> blocks(geometry.grid.x * geometry.grid.y * geometry.grid.z);
    shuffle(blocks.data(), static_cast<unsigned>(blocks.size()));
    SignalGuard guard(geometry.limit_s);
    for (const unsigned block : blocks) {
        run_block(block);
        if (state.error[0]) return state.error;
    }
    return nullptr;
}

}  // namespace cuda_on_cpu
