// ldmatrix and mma for what ptx.py translates. The layouts are taken from the PTX ISA here once more, not from shim.h:
// where source and PTX compute the same, two readings of them agree.
#pragma once

#include "ptx_runtime.h"

namespace ptx {

struct MatrixRows {
    const unsigned char* row;
    Vector<uint32_t, 4> result;
};

// Thread t gets of each matrix, in row t / 4, the values in columns t % 4 * 2 and one beside it; transposed, rows and
// columns change places. Row r of matrix m stands where thread 8 m + r points.
template <bool TRANSPOSED>
inline void load_matrices(void* const* operands) {
    uint16_t matrices[4][8][8];
    for (int t = 0; t < WARP; ++t) memcpy(matrices[t / 8][t % 8], static_cast<const MatrixRows*>(operands[t])->row, 16);
    for (int t = 0; t < WARP; ++t)
        for (int m = 0; m < 4; ++m) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
                const int row = t / 4, column = t % 4 * 2 + i;
                pair[i] = TRANSPOSED ? matrices[m][column][row] : matrices[m][row][column];
            }
            memcpy(&static_cast<MatrixRows*>(operands[t])->result.values[m], pair, sizeof pair);
        }
}

template <bool TRANSPOSED>
__attribute__((noinline)) Vector<uint32_t, 4> ldmatrix_x4(uint64_t address, int line) {
    MatrixRows operands{checked_pointer<Space::SHARED>(address, 16, false, line), {}};
    collective(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", line, &operands, load_matrices<TRANSPOSED>);
    return operands.result;
}

struct Fragments {
    Vector<uint32_t, 4> a;
    Vector<uint32_t, 2> b;
    Vector<float, 4> c;
};

// mma.m16n8k16: with group g = t / 4 and place p = t % 4 of thread t,
//     a0 a1 a4 a5 stand in row g, a2 a3 a6 a7 in row g + 8; a0-a3 in columns 2 p and 2 p + 1, a4-a7 eight further;
//     b0 b1 in rows 2 p and 2 p + 1, b2 b3 eight further, all in column g;
//     c0 c1 in row g, c2 c3 in row g + 8, in columns 2 p and 2 p + 1.
// Products are exact; their sum is taken in fp32, in ascending order of k, on top of c.
template <float WIDEN(uint16_t)>
inline void multiply_matrices(void* const* operands) {
    float a[16][16], b[16][8];
    for (int t = 0; t < WARP; ++t) {
        const auto& own = *static_cast<const Fragments*>(operands[t]);
        uint16_t a_values[8], b_values[4];
        memcpy(a_values, &own.a, sizeof a_values);
        memcpy(b_values, &own.b, sizeof b_values);
        for (int i = 0; i < 8; ++i)
            a[t / 4 + (i & 2 ? 8 : 0)][t % 4 * 2 + (i & 1) + (i & 4 ? 8 : 0)] = WIDEN(a_values[i]);
        for (int i = 0; i < 4; ++i) b[t % 4 * 2 + (i & 1) + (i & 2 ? 8 : 0)][t / 4] = WIDEN(b_values[i]);
    }
    for (int t = 0; t < WARP; ++t)
        for (int i = 0; i < 4; ++i) {
            float& sum = static_cast<Fragments*>(operands[t])->c.values[i];
            const int row = t / 4 + (i & 2 ? 8 : 0), column = t % 4 * 2 + (i & 1);
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            sum = canonical(sum);
        }
}

template <float WIDEN(uint16_t)>
__attribute__((noinline)) Vector<float, 4> mma_m16n8k16(Vector<uint32_t, 4> a, Vector<uint32_t, 2> b,
                                                        Vector<float, 4> c, int line) {
    Fragments operands{a, b, c};
    collective("mma", line, &operands, multiply_matrices<WIDEN>);
    return operands.c;
}

}  // namespace ptx
