// Small kernels for the emulation's own test: they hand bytes to other threads, or touch memory, in ways that are right
// or wrong. The wrapper functions are those of project_splice.cu.

__device__ int hand_over(int distance) { return (threadIdx.x + distance) % blockDim.x; }

extern "C" __global__ void indices(int* out) {
    const int block = blockIdx.y * gridDim.x + blockIdx.x;
    out[block * blockDim.x + threadIdx.x] = block * 1000 + threadIdx.x;
}

extern "C" __global__ void order(int* out, int* next) {
    out[(*next)++] = threadIdx.x;
}

extern "C" __global__ void exchange(const float* in, float* out, int distance, int with_barrier) {
    unsigned char* shared = shared_memory();
    store16(shared + threadIdx.x * 16, load16(in + threadIdx.x * 4));
    if (with_barrier) barrier();
    store16(out + threadIdx.x * 4, load16(shared + hand_over(distance) * 16));
}

extern "C" __global__ void exchange_raw(const float* in, float* out, int distance, int with_barrier) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = in[threadIdx.x];
    if (with_barrier) barrier();
    out[threadIdx.x] = shared[hand_over(distance)];
}

extern "C" __global__ void overwrite(float* out, int with_barrier) {
    unsigned char* shared = shared_memory();
    const Chunk16 chunk = {threadIdx.x, 0, 0, 0};
    store16(shared + threadIdx.x * 16, chunk);
    barrier();
    const Chunk16 other = load16(shared + hand_over(1) * 16);
    if (with_barrier) barrier();
    store16(shared + threadIdx.x * 16, chunk);
    store16(out + threadIdx.x * 4, other);
}

// mode 0: right; 1: the wait leaves a group pending; 2: no barrier after the wait; 3: never waits;
// 4: looks at the bytes before the wait; 5: right, of nothing valid; 6: no commit
extern "C" __global__ void asynchronous(const float* in, float* out, int distance, int mode) {
    unsigned char* shared = shared_memory();
    unsigned char* own = shared + threadIdx.x * 16;
    cp_async16(own, mode == 5 ? nullptr : in + threadIdx.x * 4, mode != 5);
    if (mode != 6) cp_async_commit();
    const float early = *reinterpret_cast<float*>(own);
    if (mode == 1) cp_async_wait<1>();
    if (mode != 1 && mode != 3) cp_async_wait<0>();
    if (mode != 2) barrier();
    Chunk16 chunk = {0, 0, 0, 0};
    if (mode != 3) chunk = load16(shared + hand_over(distance) * 16);
    if (mode == 4) out[threadIdx.x * 4] = early;
    else store16(out + threadIdx.x * 4, chunk);
}

extern "C" __global__ void groups(const float* in, float* out) {
    unsigned char* shared = shared_memory() + threadIdx.x * 16;
    for (int group = 0; group < 3; ++group) {
        cp_async16(shared + group * 1024, in + group * 256 + threadIdx.x * 4, true);
        cp_async_commit();
    }
    cp_async_wait<2>();
    store16(out + threadIdx.x * 4, load16(shared));
    cp_async_wait<1>();
    store16(out + 256 + threadIdx.x * 4, load16(shared + 1024));
    cp_async_wait<0>();
    store16(out + 512 + threadIdx.x * 4, load16(shared + 2048));
}

extern "C" __global__ void copy_over_readers(const float* in, float* out) {
    unsigned char* shared = shared_memory();
    store16(shared + threadIdx.x * 16, load16(in + threadIdx.x * 4));
    barrier();
    store16(out + threadIdx.x * 4, load16(shared + hand_over(1) * 16));
    cp_async16(shared + threadIdx.x * 16, in + threadIdx.x * 4, true);
    cp_async_commit();
    cp_async_wait<0>();
}

extern "C" __global__ void touch(float* in, float* out, int what, int place) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    if (threadIdx.x != 3) return;
    const int local[4] = {1, 2, 3, 4};
    switch (what) {
    case 0: store16(out, load16(in + place)); break;
    case 1: store16(out + place, load16(in)); break;
    case 2: out[0] = in[place]; break;
    case 3: out[place] = 1.f; break;
    case 4: in[place] = 1.f; break;
    case 5: store16(in + place, Chunk16{0, 0, 0, 0}); break;
    case 6: out[0] = shared[place]; break;
    case 7: store16(out, load16(shared + place)); break;
    case 8: cp_async16(shared + place, in, true); break;
    case 9: cp_async16(shared, in + place, true); break;
    case 10: shared[place] = 1.f; break;
    case 11: trap(); break;
    case 12: out[0] = 7 / place; break;
    case 13: out[0] = static_cast<int>(threadIdx.x) + place + 2147483000; break;
    case 14: out[0] = local[place]; break;
    }
}

// mode 0: right; 1: a block writes what another one writes; 2: a thread reads what it wrote; 3: what nobody writes
extern "C" __global__ void write_once(float* out, int mode) {
    const int block = mode == 1 ? 0 : blockIdx.x;
    float* own = out + (block * blockDim.x + threadIdx.x) * 4;
    if (mode != 3) store16(own, Chunk16{1, 2, 3, 4});
    if (mode >= 2) load16(own);
}

// mode 0: a thread does not end; 1: the block does not, from barrier to barrier
extern "C" __global__ void endless(int mode) {
    for (volatile unsigned i = 0; i < 10 || mode < 2; i = i + 1)
        if (mode == 1) barrier();
}

// mode 0: right; 1: a thread ends; 2: a warp waits at another barrier; 3: lanes of a warp do
extern "C" __global__ void meet(float* out, int mode) {
    if (mode == 1 && threadIdx.x == 77) return;
    const bool elsewhere = mode == 2 ? threadIdx.x / 32 == 1 : mode == 3 && threadIdx.x % 2;
    if (elsewhere)
        barrier();
    else
        barrier();
    out[threadIdx.x] = 1.f;
}

extern "C" __global__ void read_rows(int pitch) {
    unsigned char* row = shared_memory() + threadIdx.x * pitch;
    store16(row, Chunk16{0, 0, 0, 0});
    barrier();
    unsigned r[4];
    ldmatrix_x4(r, row);
}

// mode 0: right; 1: a lane stays away; 2: lanes at two places; 3: a lane at a barrier; 4: a misaligned row;
// 5: nothing written before
extern "C" __global__ void read_matrices(const float* in, int* out, int transposed, int mode) {
    unsigned char* shared = shared_memory();
    unsigned r[4] = {};
    if (mode != 5) store16(shared + threadIdx.x * 16, load16(in + threadIdx.x * 4));
    barrier();
    const unsigned char* row = shared + threadIdx.x * 16 + (mode == 4 && threadIdx.x == 9 ? 8 : 0);
    if (mode == 3 && threadIdx.x == 9) barrier();
    if (mode != 1 || threadIdx.x != 9) {
        if (mode == 2 && threadIdx.x == 9)
            ldmatrix_x4(r, row);
        else if (transposed)
            ldmatrix_x4_trans(r, row);
        else
            ldmatrix_x4(r, row);
    }
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

extern "C" __global__ void multiply(const int* a_parts, const int* b_parts, float* c_parts) {
    unsigned a[4], b[2];
    float c[4];
    for (int i = 0; i < 4; ++i) a[i] = a_parts[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = b_parts[threadIdx.x * 2 + i];
    for (int i = 0; i < 4; ++i) c[i] = c_parts[threadIdx.x * 4 + i];
    mma_16816(c, a, b);
    for (int i = 0; i < 4; ++i) c_parts[threadIdx.x * 4 + i] = c[i];
}

extern "C" __global__ void narrow(const float* in, Half* out, long long count) {
    for (long long i = threadIdx.x; i < count; i += blockDim.x) out[i] = from_float(in[i]);
}

extern "C" __global__ void widen(const Half* in, float* out, long long count) {
    for (long long i = threadIdx.x; i < count; i += blockDim.x) out[i] = to_float(in[i]);
}
