// Memory as a block sees it: shared memory with a shadow that finds races, global buffers, and cp.async.
//
// In global memory the rule is stricter than the hardware's: a launch writes each byte of its results once, whichever
// thread does, and never reads one. Then no order of blocks changes a result.
//
// An access is checked where a wrapper function passes it here. Others (raw pointers) meet what surrounds: protected
// pages after every buffer and around shared memory, and NaN in everything that nobody wrote.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "state.h"

namespace cuda_on_cpu {

constexpr unsigned GRANULE = 4;  // bytes that the shadow tells apart
constexpr int POISON = 0xFF;     // a NaN in fp32, fp16 and bf16
constexpr size_t PROTECTED = 1 << 20;  // bytes before and after shared memory that nobody may touch
constexpr short NOBODY = -1;

struct Shadow {
    unsigned write_epoch = 0, read_epoch = 0;
    short writer = NOBODY, reader = NOBODY, second_reader = NOBODY;
    short copier = NOBODY;  // the thread whose cp.async is still writing here
};

// Who wrote each byte of a buffer: 0 nobody, else one more than a thread's number in the grid. Pages appear as they are
// touched, so that a buffer may be larger than the memory of the machine.
class Writers {
public:
    explicit Writers(size_t bytes) : size_(bytes * sizeof(uint32_t)) {
        if (!size_) return;
        constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* const mapping = mmap(nullptr, size_, PROT_READ | PROT_WRITE, FLAGS, -1, 0);
        if (mapping == MAP_FAILED)
            fail_thread(-1, 0, "no address space to note who writes %zu bytes", bytes);
        else
            writers_ = static_cast<uint32_t*>(mapping);
    }

    Writers(Writers&& other) noexcept : size_(other.size_), writers_(other.writers_) { other.writers_ = nullptr; }

    ~Writers() {
        if (writers_) munmap(writers_, size_);
    }

    uint32_t& operator[](size_t byte) { return writers_[byte]; }

private:
    size_t size_;
    uint32_t* writers_ = nullptr;
};

struct Memory {
    const Buffer* buffers = nullptr;
    int num_buffers = 0;
    std::vector<Writers> writers;  // of each buffer; of none that is read-only
    unsigned char* mapping = nullptr;
    size_t mapped = 0;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<Shadow> shadow;
};

static Memory memory;

inline size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

// Shared memory of exactly this size, 128-byte aligned, that ends at a protected page (and, where it fills whole pages,
// begins after one).
inline void map_shared(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t space = round_up(bytes ? bytes : 1, page);
    memory.shared_bytes = bytes;
    memory.shadow.assign(round_up(bytes, GRANULE) / GRANULE, Shadow{});
    if (memory.mapped != space + 2 * PROTECTED) {
        if (memory.mapping) munmap(memory.mapping, memory.mapped);
        memory.mapped = space + 2 * PROTECTED;
        memory.mapping = static_cast<unsigned char*>(
            mmap(nullptr, memory.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        mprotect(memory.mapping + PROTECTED, space, PROT_READ | PROT_WRITE);
    }
    memory.shared = memory.mapping + PROTECTED + space - round_up(bytes, 128);
}

inline void map_buffers(const Buffer* buffers, int count) {
    memory.buffers = buffers;
    memory.num_buffers = count;
    memory.writers.clear();
    for (int i = 0; i < count; ++i) memory.writers.emplace_back(buffers[i].writable ? buffers[i].bytes : 0);
}

inline void poison_shared() {
    if (memory.shared_bytes) memset(memory.shared, POISON, round_up(memory.shared_bytes, 128));
}

// Whether a raw pointer wrote beyond shared memory that does not end at the protected page.
inline bool shared_guard_intact() {
    for (size_t i = memory.shared_bytes; i < round_up(memory.shared_bytes, 128); ++i)
        if (memory.shared[i] != POISON) return false;
    return true;
}

inline bool is_shared(const void* pointer) {
    const auto byte = static_cast<const unsigned char*>(pointer);
    return byte >= memory.shared && byte < memory.shared + memory.shared_bytes;
}

inline void check_alignment(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes)
        fail("misaligned access: %zu bytes at %p", bytes, pointer);
}

// Checks, and remembers, an access to a buffer that the launch writes.
inline void note_result(int buffer, size_t byte, size_t bytes, bool write) {
    const unsigned threads = state.block_dim.x * state.block_dim.y * state.block_dim.z;
    const Dim block = state.block_index, grid = state.grid_dim;
    const unsigned number = (block.z * grid.y + block.y) * grid.x + block.x;
    Writers& writers = memory.writers[static_cast<size_t>(buffer)];
    for (size_t i = byte; i < byte + bytes; ++i) {
        uint32_t& writer = writers[i];
        if (writer)
            fail("race in global memory: %s buffer %d, byte %zu, which thread %u of block %u wrote",
                 write ? "write to" : "read of", buffer, i, (writer - 1) % threads, (writer - 1) / threads);
        if (!write) fail("race in global memory: read of buffer %d, byte %zu, which is for results", buffer, i);
        writer = number * threads + static_cast<unsigned>(state.thread) + 1;
    }
}

inline void check_global(const void* pointer, size_t bytes, bool write) {
    const auto byte = static_cast<const unsigned char*>(pointer);
    for (int i = 0; i < memory.num_buffers; ++i) {
        const Buffer& buffer = memory.buffers[i];
        const auto base = static_cast<const unsigned char*>(buffer.base);
        if (byte < base || byte + bytes > base + buffer.bytes) continue;
        if (buffer.writable) return note_result(i, static_cast<size_t>(byte - base), bytes, write);
        if (write) fail("write to read-only buffer %d, byte %td", i, byte - base);
        return;
    }
    fail("%s out of bounds: %zu bytes at %p lie in no buffer", write ? "write" : "read", bytes, pointer);
}

[[noreturn]] inline void fail_race(const char* what, size_t offset, const char* did, short other) {
    fail("race in shared memory: %s byte %zu, which thread %d %s since the last barrier", what, offset, other, did);
}

inline void note_read(Shadow& shadow, size_t offset) {
    const auto self = static_cast<short>(state.thread);
    if (shadow.copier != NOBODY)
        fail("read of shared byte %zu before the cp.async of thread %d has been waited for", offset, shadow.copier);
    if (shadow.write_epoch == state.epoch && shadow.writer != self) fail_race("read of", offset, "wrote", shadow.writer);
    if (shadow.read_epoch != state.epoch) {
        shadow.read_epoch = state.epoch;
        shadow.reader = self;
        shadow.second_reader = NOBODY;
    } else if (shadow.reader != self) {
        shadow.second_reader = self;
    }
}

inline void check_write(const Shadow& shadow, size_t offset) {
    const auto self = static_cast<short>(state.thread);
    if (shadow.copier != NOBODY)
        fail("write to shared byte %zu before the cp.async of thread %d has been waited for", offset, shadow.copier);
    if (shadow.write_epoch == state.epoch && shadow.writer != self) fail_race("write to", offset, "wrote", shadow.writer);
    if (shadow.read_epoch != state.epoch) return;
    if (shadow.reader != self) fail_race("write to", offset, "read", shadow.reader);
    if (shadow.second_reader != NOBODY && shadow.second_reader != self)
        fail_race("write to", offset, "read", shadow.second_reader);
}

inline void note_write(Shadow& shadow) {
    shadow.write_epoch = state.epoch;
    shadow.writer = static_cast<short>(state.thread);
}

// The shadows of an access to shared memory, after a check of its bounds.
inline Shadow* shared_shadows(const void* pointer, size_t bytes, size_t& offset, size_t& count) {
    offset = static_cast<size_t>(static_cast<const unsigned char*>(pointer) - memory.shared);
    if (offset > memory.shared_bytes || offset + bytes > memory.shared_bytes)
        fail("access out of bounds: %zu bytes at byte %td of %zu of shared memory", bytes,
             static_cast<ptrdiff_t>(offset), memory.shared_bytes);
    count = (offset + bytes - 1) / GRANULE - offset / GRANULE + 1;
    return &memory.shadow[offset / GRANULE];
}

// Checks, and remembers for the checks of other threads, that this thread reads or writes shared memory.
inline void note_shared(const void* pointer, size_t bytes, bool write) {
    size_t offset, count;
    check_alignment(pointer, bytes);
    Shadow* shadow = shared_shadows(pointer, bytes, offset, count);
    for (size_t i = 0; i < count; ++i) {
        if (write) {
            check_write(shadow[i], offset);
            note_write(shadow[i]);
        } else {
            note_read(shadow[i], offset);
        }
    }
}

// An aligned access of `bytes` (a power of two) to shared or global memory.
inline void note_access(const void* pointer, size_t bytes, bool write) {
    if (is_shared(pointer)) return note_shared(pointer, bytes, write);
    check_alignment(pointer, bytes);
    check_global(pointer, bytes, write);
}

// cp.async: the bytes arrive as late as the program allows, at the wait for their group; until then they are NaN and
// nobody may touch them. `bytes_read` of them come from global memory, the others are zeros.
inline void cp_async(void* shared, const void* global, unsigned bytes, unsigned bytes_read, int line) {
    size_t offset, count;
    state.line = line;
    check_alignment(shared, bytes);
    check_alignment(global, bytes);
    if (bytes_read) check_global(global, bytes_read, false);
    Shadow* shadow = shared_shadows(shared, bytes, offset, count);
    for (size_t i = 0; i < count; ++i) {
        check_write(shadow[i], offset);
        shadow[i].copier = static_cast<short>(state.thread);
    }
    memset(shared, POISON, bytes);
    state.threads[state.thread].copies.push_back({static_cast<unsigned char*>(shared),
                                                  static_cast<const unsigned char*>(global), bytes, bytes_read, line});
}

inline void cp_async_commit_group() {
    Thread& thread = state.threads[state.thread];
    thread.group_ends.push_back(thread.copies.size());
}

inline void finish_copy(const Copy& copy) {
    memcpy(copy.shared, copy.global, copy.bytes_read);
    memset(copy.shared + copy.bytes_read, 0, copy.bytes - copy.bytes_read);
    size_t offset, count;
    Shadow* shadow = shared_shadows(copy.shared, copy.bytes, offset, count);
    for (size_t i = 0; i < count; ++i) {
        shadow[i].copier = NOBODY;
        note_write(shadow[i]);  // other threads may read after the next barrier
    }
}

// Carries out the copies of all but the `pending` latest committed groups of this thread.
inline void cp_async_wait_group(size_t pending) {
    Thread& thread = state.threads[state.thread];
    if (thread.group_ends.size() <= pending) return;
    const size_t finished = thread.group_ends.size() - pending;
    const size_t num_copies = thread.group_ends[finished - 1];
    for (size_t i = 0; i < num_copies; ++i) finish_copy(thread.copies[i]);
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(num_copies));
    thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.begin() + static_cast<ptrdiff_t>(finished));
    for (size_t& end : thread.group_ends) end -= num_copies;
}

}  // namespace cuda_on_cpu
