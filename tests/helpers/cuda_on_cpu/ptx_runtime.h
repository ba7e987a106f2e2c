// What C++ that ptx.py made of PTX calls: one function for each instruction that is more than an expression.
// Those that can fail take the line of the instruction in the PTX text; errors name it.
#pragma once

#include <cmath>
#include <limits>

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
inline void check_divisor(Value divisor, int line) {
    state.line = line;
    if (divisor == 0) fail("division by zero: its result is not specified");
}

template <typename Value>
inline Value quotient(Value a, Value b, int line) {
    check_divisor(b, line);
    const bool negates = b == static_cast<Value>(-1) && std::is_signed<Value>::value;  // a / b may not fit
    return static_cast<Value>(negates ? 0 - static_cast<uint64_t>(a) : static_cast<uint64_t>(a / b));
}

template <typename Value>
inline Value remainder(Value a, Value b, int line) {
    check_divisor(b, line);
    return b == static_cast<Value>(-1) && std::is_signed<Value>::value ? Value{0} : static_cast<Value>(a % b);
}

template <typename Value>
inline Value absolute(Value value) {
    return value < 0 ? static_cast<Value>(0 - static_cast<uint64_t>(value)) : value;
}

// Any function of three bits, for each bit: `table` is its truth table.
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (int row = 0; row < 8; ++row)
        if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return result;
}

// Four of the eight bytes of (b, a), chosen by the nibbles of `selector`; a nibble's highest bit repeats the byte's
// sign.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t choice = selector >> (4 * i) & 15;
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7))) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}

// `value` with `length` bits from `position` on replaced by those of `field`. Both numbers are of one byte.
inline uint32_t insert_bits(uint32_t field, uint32_t value, uint32_t position, uint32_t length) {
    const uint64_t mask = ((uint64_t{1} << std::min(length & 255, 32u)) - 1) << std::min(position & 255, 32u);
    const uint64_t moved = static_cast<uint64_t>(field) << std::min(position & 255, 32u);
    return static_cast<uint32_t>((value & ~mask) | (moved & mask));
}

// `length` bits from `position` on; what stands above is zero, or for signed values the highest bit of the field (or of
// the value where the field reaches beyond it).
template <typename Value>
inline uint32_t extract_bits(Value value, uint32_t position, uint32_t length) {
    position &= 255;
    length &= 255;
    const bool negative = std::is_signed<Value>::value && length && value >> std::min(position + length - 1, 31u) & 1;
    const uint64_t source = (negative ? ~uint64_t{0} << 32 : 0) | static_cast<uint32_t>(value);
    const uint64_t mask = (uint64_t{1} << std::min(length, 32u)) - 1;
    const uint64_t field = position < 32 ? source >> position & mask : negative ? mask : 0;
    return static_cast<uint32_t>(field | (negative ? ~mask : 0));
}

// ---------------------------------------------------------------------------------------------------------------------
// Floating point. A NaN that an instruction makes is always the same one.

inline float canonical(float value) {
    return value == value ? value : bits_as<float>(0x7FFFFFFFu);
}

inline double canonical(double value) {
    return value == value ? value : bits_as<double>(uint64_t{0x7FFFFFFFFFFFFFFF});
}

// Of a NaN and a number the number; -0 is below +0.
inline float minimum(float a, float b) {
    if (a != a || b != b) return canonical(a != a ? b : a);
    return a < b || (a == b && std::signbit(a)) ? a : b;
}

inline float maximum(float a, float b) {
    if (a != a || b != b) return canonical(a != a ? b : a);
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}

// Towards zero; a NaN gives zero, and what is beyond the type its nearest value.
template <typename Value>
inline Value truncated(float value) {
    constexpr Value LOWEST = std::numeric_limits<Value>::min(), HIGHEST = std::numeric_limits<Value>::max();
    if (value != value) return 0;
    if (value <= static_cast<float>(LOWEST)) return LOWEST;
    if (value >= static_cast<float>(HIGHEST)) return HIGHEST;  // the float of HIGHEST is one above it, or it itself
    return static_cast<Value>(value);
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

enum class Space { GENERIC, GLOBAL, SHARED };

inline unsigned char* shared_pointer(uint64_t address) {
    return memory.shared + (address - SHARED_WINDOW);
}

inline uint64_t shared_to_generic(uint64_t address) {
    return reinterpret_cast<uint64_t>(shared_pointer(address));
}

inline uint64_t generic_to_shared(uint64_t address, int line) {
    state.line = line;
    const uint64_t offset = address - reinterpret_cast<uint64_t>(memory.shared);
    if (offset > memory.shared_bytes) fail("0x%lx does not point to shared memory", address);
    return offset + SHARED_WINDOW;
}

template <Space SPACE>
inline unsigned char* checked_pointer(uint64_t address, size_t bytes, bool write, int line) {
    state.line = line;
    const auto pointer = SPACE == Space::SHARED ? shared_pointer(address) : reinterpret_cast<unsigned char*>(address);
    if (SPACE == Space::SHARED) {
        note_shared(pointer, bytes, write);
    } else if (SPACE == Space::GLOBAL) {
        check_alignment(pointer, bytes);
        check_global(pointer, bytes, write);
    } else {
        note_access(pointer, bytes, write);
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
