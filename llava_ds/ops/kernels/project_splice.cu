// Projection of patch features and their splice into the text embeddings (LLaVA, arXiv 2304.08485, section 4.1),
// forward in one launch, and its four gradients. docs/kernel.md explains the design and how it is verified.
//
// Sizes: R rows of the flattened sequence, M patches, C vision width, D LLM width, V rows of the embedding table.
// Compiled by NVRTC or nvcc for one element type (SPLICE_DTYPE: 0 fp32, 1 fp16, 2 bf16) and one way of access
// (SPLICE_VECTOR: 1 when rows and pointers are multiples of 16 bytes, else 0), and by a C++ compiler with
// CUDA_ON_CPU, which brings its own versions of the wrapper functions below. Includes nothing. Every block has 256
// threads. Sums are fp32, in an order that does not depend on timing: no atomics, so results repeat bit by bit.

#ifndef CUDA_ON_CPU

struct Half {
    unsigned short bits;
};

struct __align__(16) Chunk16 {
    unsigned x, y, z, w;
};

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    return dynamic_shared;
}

__device__ __forceinline__ void barrier() {
    __syncthreads();
}

__device__ __forceinline__ void trap() {
    asm volatile("trap;");
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory in the background, or zeros where nothing valid stands.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's latest groups are pending.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ Chunk16 load16(const void* pointer) {
    return *reinterpret_cast<const Chunk16*>(pointer);
}

__device__ __forceinline__ void store16(void* pointer, Chunk16 chunk) {
    *reinterpret_cast<Chunk16*>(pointer) = chunk;
}

// Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#if SPLICE_DTYPE == 0

__device__ __forceinline__ float to_float(float value) {
    return value;
}

__device__ __forceinline__ float from_float(float value) {
    return value;
}

#else

#if SPLICE_DTYPE == 1
#define SPLICE_PTX_TYPE "f16"
#else
#define SPLICE_PTX_TYPE "bf16"
#endif

// c += a b on a tensor core: a is 16 x 16, b is 16 x 8.
__device__ __forceinline__ void mma_16816(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." SPLICE_PTX_TYPE "." SPLICE_PTX_TYPE
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float to_float(Half value) {
#if SPLICE_DTYPE == 1
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
#endif
}

__device__ __forceinline__ Half from_float(float value) {
    Half narrow;
    asm("cvt.rn." SPLICE_PTX_TYPE ".f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
}

#endif  // SPLICE_DTYPE
#endif  // CUDA_ON_CPU

#if SPLICE_DTYPE == 0
typedef float Element;
#else
typedef Half Element;
#endif

typedef long long Index;

constexpr Index PAD_ROW = -1;
constexpr Index IMAGE_ROW = -2;

constexpr int THREADS = 256;
constexpr int VEC = 16 / sizeof(Element);  // elements of a 16-byte chunk
constexpr int TILE = 128;                  // rows and columns of the output that a block computes
constexpr int TILE_K = 64 / sizeof(Element);
constexpr int STAGES = 3;
constexpr int OPERAND_BYTES = TILE * TILE_K * sizeof(Element);
constexpr int STAGE_BYTES = 2 * OPERAND_BYTES;  // three of them are the 48 KB that every kernel may take
constexpr int STAGED_PITCH = TILE + 8;          // floats; the 8 spread the rows of a warp's fragments over the banks

union Pack {
    Chunk16 chunk;
    Element values[VEC];
};

__device__ __forceinline__ int divide_up(int a, int b) {
    return (a + b - 1) / b;
}

// ---------------------------------------------------------------------------------------------------------------------
// Chunks of a row: whole ones, or by element where rows do not begin and end at 16 bytes.
// `left` is the number of elements from the chunk's first to the end of the row; it may be negative.

__device__ __forceinline__ void copy_to_shared(unsigned char* shared, const Element* global, int left) {
#if SPLICE_VECTOR
    cp_async16(shared, global, left > 0);
#else
    Pack pack;
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack.values[i] = i < left ? global[i] : from_float(0.f);
    store16(shared, pack.chunk);
#endif
}

__device__ __forceinline__ void load_floats(float (&values)[VEC], const Element* global, int left) {
#if SPLICE_VECTOR
    Pack pack;
    pack.chunk = Chunk16{0, 0, 0, 0};
    if (left > 0) pack.chunk = load16(global);
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[i] = to_float(pack.values[i]);
#else
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[i] = i < left ? to_float(global[i]) : 0.f;
#endif
}

__device__ __forceinline__ void store_floats(Element* global, const float (&values)[VEC], int left) {
#if SPLICE_VECTOR
    Pack pack;
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack.values[i] = from_float(values[i]);
    if (left > 0) store16(global, pack.chunk);
#else
#pragma unroll
    for (int i = 0; i < VEC; ++i)
        if (i < left) global[i] = from_float(values[i]);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// An operand of a matrix product: 128 lines (rows of A, columns of B) by K. Stored by line, each contiguous over k, or
// by k, each contiguous over the lines. The stored rows may be gathered: row r stands at `gather[r]`.

struct Operand {
    const Element* base;
    const Index* gather;
    int num_lines;
    int width;  // elements of a stored row
};

__device__ __forceinline__ Index stored_row(const Operand& operand, int row) {
    return operand.gather ? operand.gather[row] : row;
}

// Chunks are permuted within a tile so that the eight rows that ldmatrix reads lie in different banks.
template <bool BY_LINE>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
    if (BY_LINE) return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
    return row * (TILE * static_cast<int>(sizeof(Element))) + ((chunk ^ (row & 7)) << 4);
}

template <bool BY_LINE>
__device__ __forceinline__ void load_tile(unsigned char* tile, const Operand& operand, int line0, int k0, int K) {
    constexpr int CHUNKS = BY_LINE ? TILE_K / VEC : TILE / VEC;  // of a stored row
#pragma unroll
    for (int i = 0; i < OPERAND_BYTES / 16 / THREADS; ++i) {
        const int index = threadIdx.x + i * THREADS;
        const int row = index / CHUNKS, chunk = index % CHUNKS;
        const int stored = (BY_LINE ? line0 : k0) + row;
        const int column = (BY_LINE ? k0 : line0) + chunk * VEC;
        const bool exists = stored < (BY_LINE ? operand.num_lines : K);
        const int left = exists ? (BY_LINE ? K : operand.num_lines) - column : 0;
        // Where nothing is read the address is still one of the array's.
        const Element* source = operand.base;
        if (left > 0) source += stored_row(operand, stored) * operand.width + column;
        copy_to_shared(tile + chunk_offset<BY_LINE>(row, chunk), source, left);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Accumulators of a block's 128 x 128 outputs, and the product of two tiles in shared memory.

#if SPLICE_DTYPE == 0

// Thread (ty, tx) of 16 x 16 holds rows ty + 16 i and columns tx + 16 j; plain FMA keeps fp32's error.
struct Accumulators {
    float values[8][8];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) values[i][j] = 0.f;
    }

    template <bool BY_LINE>
    static __device__ __forceinline__ void read(float (&k_values)[4], const unsigned char* tile, int line, int chunk) {
        if (BY_LINE) {
            Pack pack;
            pack.chunk = load16(tile + chunk_offset<true>(line, chunk));
#pragma unroll
            for (int k = 0; k < 4; ++k) k_values[k] = pack.values[k];
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                k_values[k] = reinterpret_cast<const float*>(tile + chunk_offset<false>(4 * chunk + k, line / 4))[line % 4];
        }
    }

    template <bool A_BY_LINE, bool B_BY_LINE>
    __device__ __forceinline__ void multiply(const unsigned char* a_tile, const unsigned char* b_tile) {
        const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 1  // the registers of one round are all there are
        for (int chunk = 0; chunk < TILE_K / 4; ++chunk) {
            float b[8][4];
#pragma unroll
            for (int j = 0; j < 8; ++j) read<B_BY_LINE>(b[j], b_tile, tx + 16 * j, chunk);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float a[4];
                read<A_BY_LINE>(a, a_tile, ty + 16 * i, chunk);
#pragma unroll
                for (int k = 0; k < 4; ++k)
#pragma unroll
                    for (int j = 0; j < 8; ++j) values[i][j] += a[k] * b[j][k];
            }
        }
    }

    // Writes rows 64 half .. 64 half + 63.
    __device__ __forceinline__ void stage(float* staged, int half) const {
        const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j)
                staged[(ty + 16 * i) * STAGED_PITCH + tx + 16 * j] = half ? values[4 + i][j] : values[i][j];
    }
};

#else

// Eight warps as 2 x 4, each 64 x 32 outputs: 4 x 4 products of 16 x 8.
struct Accumulators {
    float values[4][4][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) values[i][j][c] = 0.f;
    }

    // The 16 x 16 fragment of A whose first row is `line`: matrices (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), ...
    template <bool BY_LINE>
    static __device__ __forceinline__ void read_a(unsigned (&a)[4], const unsigned char* tile, int line, int k0) {
        const int lane = threadIdx.x % 32;
        if (BY_LINE)
            ldmatrix_x4(a, tile + chunk_offset<true>(line + lane % 16, k0 / VEC + lane / 16));
        else
            ldmatrix_x4_trans(a, tile + chunk_offset<false>(k0 + lane / 16 * 8 + lane % 8, line / VEC + lane / 8 % 2));
    }

    // Two 16 x 8 fragments of B whose first column is `line`: matrices (columns 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), ...
    template <bool BY_LINE>
    static __device__ __forceinline__ void read_b(unsigned (&b)[4], const unsigned char* tile, int line, int k0) {
        const int lane = threadIdx.x % 32;
        if (BY_LINE)
            ldmatrix_x4(b, tile + chunk_offset<true>(line + lane / 16 * 8 + lane % 8, k0 / VEC + lane / 8 % 2));
        else
            ldmatrix_x4_trans(b, tile + chunk_offset<false>(k0 + lane % 16, line / VEC + lane / 16));
    }

    template <bool A_BY_LINE, bool B_BY_LINE>
    __device__ __forceinline__ void multiply(const unsigned char* a_tile, const unsigned char* b_tile) {
        const int warp = threadIdx.x / 32;
        const int row0 = warp / 4 * 64, column0 = warp % 4 * 32;
#pragma unroll
        for (int k0 = 0; k0 < TILE_K; k0 += 16) {
            unsigned b[4][2];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                unsigned two[4];
                read_b<B_BY_LINE>(two, b_tile, column0 + 16 * pair, k0);
                b[2 * pair][0] = two[0];
                b[2 * pair][1] = two[1];
                b[2 * pair + 1][0] = two[2];
                b[2 * pair + 1][1] = two[3];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                unsigned a[4];
                read_a<A_BY_LINE>(a, a_tile, row0 + 16 * i, k0);
#pragma unroll
                for (int j = 0; j < 4; ++j) mma_16816(values[i][j], a, b[j]);
            }
        }
    }

    // Writes rows 64 half .. 64 half + 63: those of the upper or the lower four warps.
    __device__ __forceinline__ void stage(float* staged, int half) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (warp / 4 != half) return;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    staged[(16 * i + c / 2 * 8 + lane / 4) * STAGED_PITCH + warp % 4 * 32 + 8 * j + lane % 4 * 2 + c % 2] =
                        values[i][j][c];
    }
};

#endif  // SPLICE_DTYPE

// ---------------------------------------------------------------------------------------------------------------------
// One 128 x 128 tile of A B^T (+ bias), stored to rows of `out` that may be scattered.

struct Output {
    Element* base;
    const Index* scatter;  // null: row r goes to row r
    const Element* bias;   // null: none
    int num_rows;
    int num_columns;
    Index limit;  // rows of `base`
};

__device__ __forceinline__ void store_tile(const Accumulators& sums, const Output& output, int row0, int column0) {
    constexpr int CHUNKS = TILE / VEC;
    float* staged = reinterpret_cast<float*>(shared_memory());
    const int column = column0 + threadIdx.x % CHUNKS * VEC;  // the same in every round
    const int left = output.num_columns - column;
    float bias[VEC];
    load_floats(bias, output.bias + column, output.bias ? left : 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        barrier();  // every warp has read what stands in shared memory
        sums.stage(staged, half);
        barrier();
#pragma unroll
        for (int first = 0; first < TILE / 2; first += THREADS / CHUNKS) {
            const int staged_row = first + threadIdx.x / CHUNKS;
            const int row = row0 + half * (TILE / 2) + staged_row;
            if (row >= output.num_rows || left <= 0) continue;
            const Index target = output.scatter ? output.scatter[row] : row;
            if (target < 0 || target >= output.limit) trap();
            float values[VEC];
#pragma unroll
            for (int i = 0; i < VEC; ++i)
                values[i] = staged[staged_row * STAGED_PITCH + threadIdx.x % CHUNKS * VEC + i] + bias[i];
            store_floats(output.base + target * output.num_columns + column, values, left);
        }
    }
}

template <bool A_BY_LINE, bool B_BY_LINE>
__device__ __forceinline__ void multiply_tile(const Operand& a, const Operand& b, const Output& output, int K, int tile) {
    const int num_column_tiles = divide_up(output.num_columns, TILE);
    const int row0 = tile / num_column_tiles * TILE, column0 = tile % num_column_tiles * TILE;
    unsigned char* const shared = shared_memory();
    const int num_k_tiles = divide_up(K, TILE_K);

    const auto load_stage = [&](int k_tile) {
        if (k_tile < num_k_tiles) {
            unsigned char* const stage = shared + k_tile % STAGES * STAGE_BYTES;
            load_tile<A_BY_LINE>(stage, a, row0, k_tile * TILE_K, K);
            load_tile<B_BY_LINE>(stage + OPERAND_BYTES, b, column0, k_tile * TILE_K, K);
        }
        cp_async_commit();  // an empty group keeps the count of the waits right
    };

    Accumulators sums;
    sums.clear();
#pragma unroll
    for (int k_tile = 0; k_tile < STAGES - 1; ++k_tile) load_stage(k_tile);
    for (int k_tile = 0; k_tile < num_k_tiles; ++k_tile) {
        cp_async_wait<STAGES - 2>();  // this thread's part of the tile is there,
        barrier();                    // everyone's is; and all have read the tile that is replaced now
        load_stage(k_tile + STAGES - 1);
        const unsigned char* const stage = shared + k_tile % STAGES * STAGE_BYTES;
        sums.multiply<A_BY_LINE, B_BY_LINE>(stage, stage + OPERAND_BYTES);
    }
    store_tile(sums, output, row0, column0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of text and padding: a warp copies one row.

__device__ __forceinline__ void copy_text_rows(const Element* table, const Index* src, Element* out, int R, int D, Index V,
                                               int group) {
    const int row = group * (THREADS / 32) + threadIdx.x / 32;
    if (row >= R) return;
    const Index token = src[row];
    if (token == IMAGE_ROW) return;
    if (token != PAD_ROW && (token < 0 || token >= V)) trap();
    Element* const target = out + static_cast<Index>(row) * D;
    const Element* const source = table + token * D;
#if SPLICE_VECTOR
#pragma unroll 4
    for (int column = threadIdx.x % 32 * VEC; column < D; column += 32 * VEC)
        store16(target + column, token == PAD_ROW ? Chunk16{0, 0, 0, 0} : load16(source + column));
#else
    for (int column = threadIdx.x % 32; column < D; column += 32)
        target[column] = token == PAD_ROW ? from_float(0.f) : source[column];
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Entry points.

#if SPLICE_DTYPE == 0
#define SPLICE_BOUNDS __launch_bounds__(256, 1)
#else
#define SPLICE_BOUNDS __launch_bounds__(256, 2)
#endif

// out [R, D]: the first blocks multiply features [M, C] with weight [D, C]; the others copy text rows, eight a block.
extern "C" __global__ void SPLICE_BOUNDS splice_forward(const Element* features, const Element* weight,
                                                        const Element* bias, const Element* table, const Index* src,
                                                        const Index* image_rows, Element* out, int M, int R, int C, int D,
                                                        Index V) {
    const int num_tiles = divide_up(M, TILE) * divide_up(D, TILE);
    const int block = blockIdx.x;
    if (block < num_tiles)
        multiply_tile<true, true>(Operand{features, nullptr, M, C}, Operand{weight, nullptr, D, C},
                                  Output{out, image_rows, bias, M, D, R}, C, block);
    else
        copy_text_rows(table, src, out, R, D, V, block - num_tiles);
}

// grad_features [M, C]: the image rows of grad [R, D] times weight [D, C].
extern "C" __global__ void SPLICE_BOUNDS splice_grad_features(const Element* grad, const Element* weight,
                                                              const Index* image_rows, Element* grad_features, int M,
                                                              int C, int D) {
    multiply_tile<true, false>(Operand{grad, image_rows, M, D}, Operand{weight, nullptr, C, C},
                               Output{grad_features, nullptr, nullptr, M, C, M}, D, blockIdx.x);
}

// grad_weight [D, C]: the image rows of grad [R, D], transposed, times features [M, C]; zeros when M is 0.
extern "C" __global__ void SPLICE_BOUNDS splice_grad_weight(const Element* grad, const Element* features,
                                                            const Index* image_rows, Element* grad_weight, int M, int C,
                                                            int D) {
    multiply_tile<false, false>(Operand{grad, image_rows, D, D}, Operand{features, nullptr, C, C},
                                Output{grad_weight, nullptr, nullptr, D, C, D}, M, blockIdx.x);
}

__device__ __forceinline__ void add_chunk(float (&total)[VEC], const Element* global, int left) {
    float values[VEC];
    load_floats(values, global, left);
#pragma unroll
    for (int i = 0; i < VEC; ++i) total[i] += values[i];
}

// Adds the totals of the threads of each column, in pairs of rows through shared memory; row 0 gets the sum.
__device__ __forceinline__ void sum_rows(float (&total)[VEC], int num_rows, int columns, int row, int column) {
    float* const sums = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[row * columns + column + i] = total[i];
    for (int half = num_rows / 2; half > 0; half /= 2) {
        barrier();
        if (row < half)
#pragma unroll
            for (int i = 0; i < VEC; ++i) sums[row * columns + column + i] += sums[(row + half) * columns + column + i];
    }
    if (row) return;
#pragma unroll
    for (int i = 0; i < VEC; ++i) total[i] = sums[column + i];
}

// grad_bias [D]: the sum of the image rows of grad [R, D]. A block sums 4 chunks of columns, 64 rows at a time.
extern "C" __global__ void __launch_bounds__(256) splice_grad_bias(const Element* grad, const Index* image_rows,
                                                                   Element* grad_bias, int M, int D) {
    constexpr int COLUMNS = 4 * VEC, LANES = THREADS / 4;
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * VEC;
    const int first = blockIdx.x * COLUMNS + column;
    float total[VEC] = {};
    for (int m = row; m < M; m += LANES) add_chunk(total, grad + image_rows[m] * D + first, D - first);
    sum_rows(total, LANES, COLUMNS, row, column);
    if (row == 0) store_floats(grad_bias + first, total, D - first);
}

// grad_table [V, D], zeros before: row token_ids[u] is the sum of the rows of grad that hold that token. Block (u, slice)
// sums 32 chunks of columns, eight rows at a time.
extern "C" __global__ void __launch_bounds__(256) splice_grad_table(const Element* grad, const Index* token_ids,
                                                                    const Index* token_starts, const Index* token_rows,
                                                                    Element* grad_table, int D) {
    constexpr int COLUMNS = 32 * VEC, LANES = THREADS / 32;
    const int row = threadIdx.x / 32, column = threadIdx.x % 32 * VEC;
    const int first = blockIdx.y * COLUMNS + column;
    const Index start = token_starts[blockIdx.x], end = token_starts[blockIdx.x + 1];
    float total[VEC] = {};
    for (Index n = start + row; n < end; n += LANES) add_chunk(total, grad + token_rows[n] * D + first, D - first);
    if (end - start > 1) sum_rows(total, LANES, COLUMNS, row, column);  // most tokens stand in one row
    if (row == 0) store_floats(grad_table + token_ids[blockIdx.x] * D + first, total, D - first);
}
