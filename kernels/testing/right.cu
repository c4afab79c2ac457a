// Kernels that use each feature of the harness as it is meant.

#include "../common.cuh"

// sums [blocks] of values [count], by warp shuffles and one shared array
extern "C" __global__ void test_block_sum_f32(const float *__restrict__ values, float *__restrict__ sums, unsigned count) {
    SHARED_ARRAY(float, partial, 32);
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum = i < count ? values[i] : 0.0f;
    for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(all_lanes, sum, half);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (warp != 0) return;
    sum = lane < blockDim.x / 32 ? static_cast<float>(partial[lane]) : 0.0f;
    for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(all_lanes, sum, half);
    if (lane == 0) sums[blockIdx.x] = sum;
}
KERNEL(test_block_sum_f32);

// Two neighbouring halves of a row-major matrix of `width` columns.
__device__ __forceinline__ unsigned pair(const __half *matrix, unsigned width, unsigned row, unsigned column) {
    const unsigned low = __half_as_ushort(matrix[row * width + column]), high = __half_as_ushort(matrix[row * width + column + 1]);
    return low | high << 16;
}

// d [16, 8] = a [16, 16] b [8, 16]^T + c [16, 8], fragments gathered by their definition
extern "C" __global__ void test_mma_f16(const __half *a, const __half *b, const float *c, float *d) {
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const unsigned left[4] = {pair(a, 16, g, 2 * t), pair(a, 16, g + 8, 2 * t), pair(a, 16, g, 2 * t + 8), pair(a, 16, g + 8, 2 * t + 8)};
    const unsigned right[2] = {pair(b, 16, g, 2 * t), pair(b, 16, g, 2 * t + 8)};
    float sum[4];
    for (unsigned i = 0; i < 4; ++i) sum[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    mma_m16n8k16_f16(sum, left, right, sum);
    for (unsigned i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}
KERNEL(test_mma_f16);

// The same through shared memory, asynchronous copies and ldmatrix, with b [16, 8] not transposed.
extern "C" __global__ void test_mma_f16_through_shared(const __half *a, const __half *b, const float *c, float *d) {
    const Shared<__half> left_tile = dynamic_shared<__half>(0, 256), right_tile = dynamic_shared<__half>(512, 128);
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    cp_async_16(left_tile, 8 * lane, a + 8 * lane);
    cp_async_commit();
    if (lane < 16) cp_async_16(right_tile, 8 * lane, b + 8 * lane);
    cp_async_commit();
    cp_async_wait<1>();
    __syncwarp();
    unsigned left[4], right[2];
    ldmatrix_x4(left, left_tile, lane % 16 * 16 + lane / 16 * 8);
    cp_async_wait<0>();
    __syncwarp();
    ldmatrix_x2_trans(right, right_tile, lane % 16 * 8);
    float sum[4];
    for (unsigned i = 0; i < 4; ++i) sum[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    mma_m16n8k16_f16(sum, left, right, sum);
    for (unsigned i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}
KERNEL(test_mma_f16_through_shared);

// d [16, 8] = a [16, 32] b [8, 32]^T + c [16, 8] in bytes
extern "C" __global__ void test_mma_s8(const signed char *a, const signed char *b, const int *c, int *d) {
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const unsigned *rows = reinterpret_cast<const unsigned *>(a), *columns = reinterpret_cast<const unsigned *>(b);
    const unsigned left[4] = {rows[g * 8 + t], rows[(g + 8) * 8 + t], rows[g * 8 + t + 4], rows[(g + 8) * 8 + t + 4]};
    const unsigned right[2] = {columns[g * 8 + t], columns[g * 8 + t + 4]};
    int sum[4];
    for (unsigned i = 0; i < 4; ++i) sum[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    mma_m16n8k32_s8(sum, left, right, sum);
    for (unsigned i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}
KERNEL(test_mma_s8);

// What ldmatrix gives each lane of tiles [4][8][8]: x2, x2 transposed, x4, x4 transposed; out [12, 32]
extern "C" __global__ void test_ldmatrix(const uint4 *tiles, unsigned *out) {
    SHARED_ARRAY(__half, rows, 256);
    const unsigned lane = threadIdx.x;
    rows.write(8 * lane, tiles[lane]);
    __syncwarp();
    unsigned two[2], four[4];
    ldmatrix_x2(two, rows, lane % 16 * 8);
    for (unsigned i = 0; i < 2; ++i) out[i * 32 + lane] = two[i];
    ldmatrix_x2_trans(two, rows, lane % 16 * 8);
    for (unsigned i = 0; i < 2; ++i) out[(2 + i) * 32 + lane] = two[i];
    ldmatrix_x4(four, rows, lane * 8);
    for (unsigned i = 0; i < 4; ++i) out[(4 + i) * 32 + lane] = four[i];
    ldmatrix_x4_trans(four, rows, lane * 8);
    for (unsigned i = 0; i < 4; ++i) out[(8 + i) * 32 + lane] = four[i];
}
KERNEL(test_ldmatrix);

// Warp-wide operations on values [32]; out [14, 32]
extern "C" __global__ void test_warp(const int *values, unsigned *out) {
    const unsigned lane = threadIdx.x;
    const int value = values[lane];
    unsigned row = 0;
    const auto put = [&](unsigned found) { out[row++ * 32 + lane] = found; };
    put(static_cast<unsigned>(__shfl_sync(all_lanes, value, static_cast<int>((lane * 7 + 3) % 32))));
    put(static_cast<unsigned>(__shfl_sync(all_lanes, value, 5, 8)));
    put(static_cast<unsigned>(__shfl_xor_sync(all_lanes, value, 6)));
    put(static_cast<unsigned>(__shfl_up_sync(all_lanes, value, 3)));
    put(static_cast<unsigned>(__shfl_up_sync(all_lanes, value, 3, 8)));
    put(static_cast<unsigned>(__shfl_down_sync(all_lanes, value, 5)));
    put(static_cast<unsigned>(__shfl_down_sync(all_lanes, value, 5, 16)));
    put(__ballot_sync(all_lanes, value > 0));
    put(static_cast<unsigned>(__any_sync(all_lanes, value == 3)));
    put(static_cast<unsigned>(__all_sync(all_lanes, value > -100)));
    put(static_cast<unsigned>(__reduce_add_sync(all_lanes, value)));
    put(static_cast<unsigned>(__reduce_max_sync(all_lanes, value)));
    put(static_cast<unsigned>(__reduce_min_sync(all_lanes, value)));
    // halves of the warp go ways of their own
    if (lane < 16) put(static_cast<unsigned>(__shfl_xor_sync(0x0000ffffu, value, 1)));
    else put(__ballot_sync(0xffff0000u, value > 0));
}
KERNEL(test_warp);

// counts [16] of values [count] modulo 16, with atomics in shared memory; the first counter also gets the block's votes
extern "C" __global__ void test_histogram(const unsigned *values, unsigned *counts, unsigned *votes, unsigned count) {
    SHARED_ARRAY(unsigned, bins, 16);
    if (threadIdx.x < 16) bins[threadIdx.x] = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) atomicAdd(bins.address(values[i] % 16), 1u);
    const int odd = threadIdx.x % 2 == 1;
    const unsigned counted = static_cast<unsigned>(__syncthreads_count(odd)), some = static_cast<unsigned>(__syncthreads_or(odd));
    const unsigned all = static_cast<unsigned>(__syncthreads_and(odd));
    if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], static_cast<unsigned>(bins[threadIdx.x]));
    if (threadIdx.x == 0) atomicMax(votes, counted * 4 + some * 2 + all);
}
KERNEL(test_histogram);

// Every thread writes its own place in a grid of blocks, all three ways.
extern "C" __global__ void test_places(unsigned *out) {
    const unsigned x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    const unsigned z = blockIdx.z * blockDim.z + threadIdx.z, width = gridDim.x * blockDim.x, height = gridDim.y * blockDim.y;
    out[(z * height + y) * width + x] = z * 10000 + y * 100 + x;
}
KERNEL(test_places);

// Neighbours exchange through shared memory, ordered by the warp's barrier alone.
extern "C" __global__ void test_exchange(float *out) {
    SHARED_ARRAY(float, tile, 64);
    for (unsigned round = 0; round < 3; ++round) {
        tile[threadIdx.x] = static_cast<float>(threadIdx.x + round);
        __syncwarp();
        out[round * 64 + threadIdx.x] = tile[threadIdx.x ^ 1];
        __syncwarp();
    }
}
KERNEL(test_exchange);

// wide [65536] of every half, and back, which must change nothing but the bits of a NaN
extern "C" __global__ void test_halves(float *wide, unsigned short *back) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const __half value = __ushort_as_half(static_cast<unsigned short>(i));
    wide[i] = __half2float(value);
    back[i] = __half_as_ushort(__float2half_rn(wide[i]));
}
KERNEL(test_halves);

// values [count] as halves to nearest, up and down, and as bfloat16; out [4, count]
extern "C" __global__ void test_rounding(const float *values, unsigned short *out, unsigned count) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    out[i] = __half_as_ushort(__float2half_rn(values[i]));
    out[count + i] = __half_as_ushort(__float2half_ru(values[i]));
    out[2 * count + i] = __half_as_ushort(__float2half_rd(values[i]));
    out[3 * count + i] = __bfloat16_as_ushort(__float2bfloat16_rn(values[i]));
}
KERNEL(test_rounding);

// out [4, count]: a + b, a * b, a / b and a * b + c in halves of three neighbours
extern "C" __global__ void test_half_arithmetic(const __half *values, unsigned short *out, unsigned count) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const __half a = values[i], b = values[(i + 1) % count], c = values[(i + 2) % count];
    out[i] = __half_as_ushort(__hadd(a, b));
    out[count + i] = __half_as_ushort(__hmul(a, b));
    out[2 * count + i] = __half_as_ushort(__hdiv(a, b));
    out[3 * count + i] = __half_as_ushort(__hfma(a, b, c));
}
KERNEL(test_half_arithmetic);

// out [6, count] of neighbours a and b: a + b, a - b, a * b, a / b, fma(a, b, a) and sqrt |a|, rounded up, each as f32 bits
extern "C" __global__ void test_directed(const float *values, float *up, float *down, unsigned count) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float a = values[i], b = values[(i + 1) % count];
    up[i] = __fadd_ru(a, b), down[i] = __fadd_rd(a, b);
    up[count + i] = __fsub_ru(a, b), down[count + i] = __fsub_rd(a, b);
    up[2 * count + i] = __fmul_ru(a, b), down[2 * count + i] = __fmul_rd(a, b);
    up[3 * count + i] = __fdiv_ru(a, b), down[3 * count + i] = __fdiv_rd(a, b);
    up[4 * count + i] = __fmaf_ru(a, b, a), down[4 * count + i] = __fmaf_rd(a, b, a);
    up[5 * count + i] = __fsqrt_ru(fabsf(a)), down[5 * count + i] = __fsqrt_rd(fabsf(a));
}
KERNEL(test_directed);

// out [6, count] of words a, b and c: bytes picked from both, dot product of bytes, and friends
extern "C" __global__ void test_words(const unsigned *values, unsigned *out, unsigned count) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const unsigned a = values[i], b = values[(i + 1) % count], c = values[(i + 2) % count];
    out[i] = __byte_perm(a, b, c & 0x7777);
    out[count + i] = static_cast<unsigned>(__dp4a(static_cast<int>(a), static_cast<int>(b), 17));
    out[2 * count + i] = static_cast<unsigned>(__popc(a) * 100 + __clz(static_cast<int>(a)));
    out[3 * count + i] = __umulhi(a, b);
    out[4 * count + i] = __funnelshift_r(a, b, c);
    out[5 * count + i] = __brev(a);
}
KERNEL(test_words);

// A copy of which only `valid` bytes are there; the rest of out [16] is zero.
extern "C" __global__ void test_partial_copy(const unsigned char *from, unsigned char *out, unsigned valid) {
    SHARED_ARRAY(unsigned char, tile, 16);
    cp_async_16(tile, 0, from, valid);
    cp_async_commit();
    cp_async_wait<0>();
    store_16(out, tile.read<uint4>(0));
}
KERNEL(test_partial_copy);
