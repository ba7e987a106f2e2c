// The CUDA words and the wrapper functions of project_splice.cu for a C++ compiler, on the fibers of fibers.h:
//     g++ -std=c++17 -O2 -march=native -DCUDA_ON_CPU -DSPLICE_DTYPE=2 -include shim.h -x c++ project_splice.cu
// Fragments lie in the lanes as the PTX ISA says (ldmatrix; mma.m16n8k16 with 16-bit types). Every wrapper function
// takes the line of its call as a default argument: it names the place in an error, and tells barriers apart.
#pragma once

#include <type_traits>

#include "fibers.h"

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

static const cuda_on_cpu::Dim &threadIdx = cuda_on_cpu::state.thread_index, &blockIdx = cuda_on_cpu::state.block_index,
                              &blockDim = cuda_on_cpu::state.block_dim, &gridDim = cuda_on_cpu::state.grid_dim;

using cuda_on_cpu::barrier;
using cuda_on_cpu::shared_memory;

struct Half {
    unsigned short bits;
};

struct alignas(16) Chunk16 {
    unsigned x, y, z, w;
};

[[noreturn]] inline void trap(int line = __builtin_LINE()) {
    cuda_on_cpu::state.line = line;
    cuda_on_cpu::fail("trap");
}

inline void cp_async16(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    cuda_on_cpu::cp_async(shared, global, 16, valid ? 16 : 0, line);
}

inline void cp_async_commit() {
    cuda_on_cpu::cp_async_commit_group();
}

template <int N>
inline void cp_async_wait() {
    cuda_on_cpu::cp_async_wait_group(N);
}

inline Chunk16 load16(const void* pointer, int line = __builtin_LINE()) {
    cuda_on_cpu::state.line = line;
    cuda_on_cpu::note_access(pointer, 16, false);
    return *static_cast<const Chunk16*>(pointer);
}

inline void store16(void* pointer, Chunk16 chunk, int line = __builtin_LINE()) {
    cuda_on_cpu::state.line = line;
    cuda_on_cpu::note_access(pointer, 16, true);
    *static_cast<Chunk16*>(pointer) = chunk;
}

// ---------------------------------------------------------------------------------------------------------------------
// Element types: round to nearest even, one NaN.

#if !defined(SPLICE_DTYPE) || SPLICE_DTYPE == 0

inline float to_float(float value) {
    return value;
}

inline float from_float(float value) {
    return value;
}

#else

inline float to_float(Half value) {
#if SPLICE_DTYPE == 1
    return static_cast<float>(__builtin_bit_cast(_Float16, value.bits));
#else
    return __builtin_bit_cast(float, static_cast<unsigned>(value.bits) << 16);
#endif
}

inline Half from_float(float value) {
    if (value != value) return {0x7FFF};
#if SPLICE_DTYPE == 1
    return {__builtin_bit_cast(unsigned short, static_cast<_Float16>(value))};
#else
    const unsigned bits = __builtin_bit_cast(unsigned, value);
    return {static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
#endif
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Operations of a warp.

namespace cuda_on_cpu {

struct Ldmatrix {
    unsigned* result;
    const void* row;
};

static unsigned long long num_bank_conflicts = 0;  // of ldmatrix, since the library was loaded

// Shared memory has 32 banks of 4 bytes: the eight rows of a matrix come at once if they lie in different banks.
inline void count_bank_conflicts(void* const* operands) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned banks = 0;
        for (int row = 0; row < 8; ++row) {
            const void* address = static_cast<const Ldmatrix*>(operands[matrix * 8 + row])->row;
            const unsigned bit = 1u << reinterpret_cast<uintptr_t>(address) / 16 % 8;
            if (banks & bit) ++num_bank_conflicts;
            banks |= bit;
        }
    }
}

template <bool TRANSPOSED>
inline void combine_ldmatrix(void* const* operands) {
    count_bank_conflicts(operands);
    for (int lane = 0; lane < WARP; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix) {
            const auto value = [&](int row, int column) -> unsigned {
                const auto& holder = *static_cast<const Ldmatrix*>(operands[matrix * 8 + row]);
                return static_cast<const unsigned short*>(holder.row)[column];
            };
            const int group = lane / 4, first = lane % 4 * 2;
            const unsigned low = TRANSPOSED ? value(first, group) : value(group, first);
            const unsigned high = TRANSPOSED ? value(first + 1, group) : value(group, first + 1);
            static_cast<Ldmatrix*>(operands[lane])->result[matrix] = low | high << 16;
        }
}

template <bool TRANSPOSED>
inline void ldmatrix(unsigned (&result)[4], const void* row, int line) {
    state.line = line;
    note_shared(row, 16, false);
    Ldmatrix operands{result, row};
    collective(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", line, &operands, combine_ldmatrix<TRANSPOSED>);
}

}  // namespace cuda_on_cpu

inline void ldmatrix_x4(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) {
    cuda_on_cpu::ldmatrix<false>(r, row, line);
}

inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) {
    cuda_on_cpu::ldmatrix<true>(r, row, line);
}

#if defined(SPLICE_DTYPE) && SPLICE_DTYPE != 0

namespace cuda_on_cpu {

struct Mma {
    float* c;
    const unsigned *a, *b;
};

typedef float Columns __attribute__((vector_size(32)));  // the eight of a row of B and C

inline float half_of(unsigned pair, int high) {
    return to_float(Half{static_cast<unsigned short>(high ? pair >> 16 : pair)});
}

// Products of 16-bit values are exact in fp32; the sum over k is fp32, in ascending order.
inline void combine_mma(void* const* operands) {
    float a[16][16];
    Columns b[16], c[16];
    for (int lane = 0; lane < WARP; ++lane) {
        const Mma& part = *static_cast<const Mma*>(operands[lane]);
        const int group = lane / 4, first = lane % 4 * 2;
        for (int high = 0; high < 2; ++high) {
            for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][first + i / 2 * 8 + high] = half_of(part.a[i], high);
            for (int i = 0; i < 2; ++i) b[first + i * 8 + high][group] = half_of(part.b[i], high);
            for (int i = 0; i < 2; ++i) c[group + i * 8][first + high] = part.c[2 * i + high];
        }
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) c[row] += a[row][k] * b[k];
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i)
            static_cast<const Mma*>(operands[lane])->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace cuda_on_cpu

// c += a b, a 16 x 16 and b 16 x 8 of the element type.
inline void mma_16816(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) {
    cuda_on_cpu::Mma operands{c, a, b};
    cuda_on_cpu::collective("mma", line, &operands, cuda_on_cpu::combine_mma);
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// What a program loads from the compiled library: CUDA_ON_CPU_ENTRY(kernel) makes `launch_kernel` and
// `parameters_kernel`, a letter for each parameter: p pointer, i 32-bit integer, l 64-bit integer.

namespace cuda_on_cpu {

template <typename Parameter>
constexpr char parameter_letter() {
    if (std::is_pointer<Parameter>::value) return 'p';
    static_assert(std::is_pointer<Parameter>::value || std::is_integral<Parameter>::value, "pointers and integers only");
    return sizeof(Parameter) == 8 ? 'l' : 'i';
}

template <typename... Parameters>
struct Entry {
    void (*kernel)(Parameters...);
    void* const* values;

    static constexpr char LETTERS[] = {parameter_letter<Parameters>()..., 0};

    static void run(void* self) {
        static_cast<Entry*>(self)->call(std::index_sequence_for<Parameters...>());
    }

    template <size_t... I>
    void call(std::index_sequence<I...>) {
        kernel(*static_cast<Parameters*>(values[I])...);
    }
};

template <typename... Parameters>
Entry<Parameters...> entry(void (*kernel)(Parameters...), void* const* values) {
    return {kernel, values};
}

}  // namespace cuda_on_cpu

extern "C" __global__ unsigned long long bank_conflicts() {
    return cuda_on_cpu::num_bank_conflicts;
}

#define CUDA_ON_CPU_ENTRY(name)                                                                           \
    extern "C" __global__ const char* launch_##name(void* const* values, const cuda_on_cpu::Launch* geometry) { \
        auto entry = cuda_on_cpu::entry(name, values);                                                    \
        return cuda_on_cpu::launch(entry.run, &entry, *geometry);                                         \
    }                                                                                                     \
    extern "C" __global__ const char* parameters_##name() {                                               \
        return decltype(cuda_on_cpu::entry(name, nullptr))::LETTERS;                                      \
    }
