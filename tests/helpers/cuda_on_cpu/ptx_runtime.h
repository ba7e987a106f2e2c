// What C++ that ptx.py made of PTX calls: one function for each instruction that is more than an expression.
// Those that can fail take the line of the instruction in the PTX text; errors name it.
#pragma once

#include <cmath>

#include "fibers.h"

namespace ptx {

using namespace cuda_on_cpu;

// The address of dynamic shared memory in its own space. It is not zero and not the generic address, so an offset or a
// generic pointer in its place is out of bounds.
constexpr uint64_t SHARED_WINDOW = 1024;

template <typename To, typename From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    return __builtin_bit_cast(To, value);
}

template <typename Value, int COUNT>
struct Vector {
    Value values[COUNT];

    Value operator[](int i) const {
        return values[i];
    }
};

// What a register holds before it is written: NaN, or an address out of bounds.
template <typename Value>
inline Value poison() {
    Value value;
    memset(&value, 0xFF, sizeof value);
    return value;
}

template <>
inline bool poison<bool>() {
    return true;
}

[[noreturn]] inline void trap(int line) {
    state.line = line;
    fail("trap");
}

// ---------------------------------------------------------------------------------------------------------------------
// Integers.

template <typename Value>
inline Value shift_left(Value value, uint32_t count) {
    return count < 8 * sizeof(Value) ? static_cast<Value>(value << count) : Value{0};
}

// Of a signed value the sign moves in.
template <typename Value>
inline Value shift_right(Value value, uint32_t count) {
    const uint32_t most = 8 * sizeof(Value) - 1;
    if (count <= most) return static_cast<Value>(value >> count);
    return value < 0 ? static_cast<Value>(-1) : Value{0};
}

template <typename Value>
inline Value quotient(Value a, Value b, int line) {
    state.line = line;
    if (b == 0) fail("division by zero: its result is not specified");
    const bool negates = std::is_signed<Value>::value && b == static_cast<Value>(-1);  // a / b may not fit
    return static_cast<Value>(negates ? 0 - static_cast<uint64_t>(a) : static_cast<uint64_t>(a / b));
}

// Any function of three bits, for each bit: `table` is its truth table.
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (int row = 0; row < 8; ++row)
        if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return result;
}

// `value` with `length` bits from `position` on replaced by those of `field`. Both numbers are of one byte.
inline uint32_t insert_bits(uint32_t field, uint32_t value, uint32_t position, uint32_t length) {
    const uint64_t mask = ((uint64_t{1} << std::min(length & 255, 32u)) - 1) << std::min(position & 255, 32u);
    const uint64_t moved = static_cast<uint64_t>(field) << std::min(position & 255, 32u);
    return static_cast<uint32_t>((value & ~mask) | (moved & mask));
}

// ---------------------------------------------------------------------------------------------------------------------
// Floating point. A NaN that an instruction makes is always the same one.

inline float canonical(float value) {
    return value == value ? value : bits_as<float>(0x7FFFFFFFu);
}

// Of a NaN and a number the number; -0 is below +0.
inline float minimum(float a, float b) {
    if (a != a || b != b) return canonical(a != a ? b : a);
    return a < b || (a == b && std::signbit(a)) ? a : b;
}

inline uint16_t to_f16(float value) {
    return value == value ? bits_as<uint16_t>(static_cast<_Float16>(value)) : 0x7FFF;
}

inline float from_f16(uint16_t bits) {
    return canonical(static_cast<float>(bits_as<_Float16>(bits)));
}

inline uint16_t to_bf16(float value) {
    if (value != value) return 0x7FFF;
    const uint32_t bits = bits_as<uint32_t>(value), below = bits & 0xFFFF, above = bits >> 16;
    const bool up = below > 0x8000 || (below == 0x8000 && (above & 1));  // nearest, ties to even
    return static_cast<uint16_t>(above + up);
}

inline float from_bf16(uint16_t bits) {
    return canonical(bits_as<float>(static_cast<uint32_t>(bits) << 16));
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory.

enum class Space { GLOBAL, SHARED };

inline unsigned char* shared_pointer(uint64_t address) {
    return memory.shared + (address - SHARED_WINDOW);
}

template <Space SPACE>
inline unsigned char* checked_pointer(uint64_t address, size_t bytes, bool write, int line) {
    state.line = line;
    const auto pointer = SPACE == Space::SHARED ? shared_pointer(address) : reinterpret_cast<unsigned char*>(address);
    if (SPACE == Space::SHARED) {
        note_shared(pointer, bytes, write);
    } else {
        check_alignment(pointer, bytes);
        check_global(pointer, bytes, write);
    }
    return pointer;
}

template <Space SPACE, typename Value, int COUNT>
__attribute__((noinline)) Vector<Value, COUNT> load(uint64_t address, int line) {
    Vector<Value, COUNT> result;
    memcpy(&result, checked_pointer<SPACE>(address, sizeof result, false, line), sizeof result);
    return result;
}

template <Space SPACE, typename Value, int COUNT>
__attribute__((noinline)) void store(uint64_t address, Vector<Value, COUNT> values, int line) {
    memcpy(checked_pointer<SPACE>(address, sizeof values, true, line), &values, sizeof values);
}

inline void cp_async_cg(uint64_t shared, uint64_t global, uint32_t bytes_read, int line) {
    state.line = line;
    if (bytes_read > 16) fail("cp.async of 16 bytes reads %u", bytes_read);
    cp_async(shared_pointer(shared), reinterpret_cast<const void*>(global), 16, bytes_read, line);
}

}  // namespace ptx
