// Kernels with one mistake each, which must be caught.

#include "../common.cuh"

extern "C" __global__ void wrong_race(float *out) {
    SHARED_ARRAY(float, tile, 64);
    tile[threadIdx.x] = 0;
    __syncthreads();
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    out[threadIdx.x] = tile[(threadIdx.x + 1) % 64];
}
KERNEL(wrong_race);

// The barrier before the next round's writes is missing.
extern "C" __global__ void wrong_write_after_read(float *out) {
    SHARED_ARRAY(float, tile, 64);
    for (unsigned round = 0; round < 2; ++round) {
        tile[threadIdx.x] = static_cast<float>(threadIdx.x + round);
        __syncthreads();
        out[threadIdx.x] = tile[63 - threadIdx.x];
    }
}
KERNEL(wrong_write_after_read);

extern "C" __global__ void wrong_two_writers(float *out) {
    SHARED_ARRAY(float, tile, 1);
    tile[0] = static_cast<float>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = tile[0];
}
KERNEL(wrong_two_writers);

// A shuffle is no barrier for memory.
extern "C" __global__ void wrong_shuffle_as_barrier(float *out) {
    SHARED_ARRAY(float, tile, 64);
    tile[threadIdx.x] = 0;
    __syncthreads();
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    const float other = __shfl_xor_sync(all_lanes, 1.0f, 1);
    out[threadIdx.x] = other + tile[threadIdx.x ^ 1];
}
KERNEL(wrong_shuffle_as_barrier);

extern "C" __global__ void wrong_exit_before_barrier(float *out) {
    if (threadIdx.x > 40) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}
KERNEL(wrong_exit_before_barrier);

extern "C" __global__ void wrong_two_barriers(float *out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}
KERNEL(wrong_two_barriers);

extern "C" __global__ void wrong_barrier_and_shuffle(float *out) {
    float value = 1;
    if (threadIdx.x % 2 == 0) value = __shfl_xor_sync(all_lanes, value, 1);
    else __syncthreads();
    out[threadIdx.x] = value;
}
KERNEL(wrong_barrier_and_shuffle);

extern "C" __global__ void wrong_lane(float *out) {
    float value = 1;
    if (threadIdx.x % 32 < 16) value = __shfl_sync(0x0000ffffu, value, 20);
    out[threadIdx.x] = value;
}
KERNEL(wrong_lane);

extern "C" __global__ void wrong_mask(float *out) {
    const unsigned mask = threadIdx.x % 32 < 16 ? all_lanes : 0xffff0000u;
    out[threadIdx.x] = __shfl_sync(mask, 1.0f, 16);
}
KERNEL(wrong_mask);

extern "C" __global__ void wrong_no_wait(const float *from, float *out) {
    SHARED_ARRAY(float, tile, 256);
    cp_async_16(tile, 4 * threadIdx.x, from + 4 * threadIdx.x);
    cp_async_commit();
    __syncthreads();
    out[threadIdx.x] = tile[4 * threadIdx.x];
}
KERNEL(wrong_no_wait);

// Waits for all groups but one, and reads that one.
extern "C" __global__ void wrong_short_wait(const float *from, float *out) {
    SHARED_ARRAY(float, tile, 512);
    for (unsigned part = 0; part < 2; ++part) {
        cp_async_16(tile, 256 * part + 4 * threadIdx.x, from + 4 * threadIdx.x);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    out[threadIdx.x] = tile[256 + 4 * threadIdx.x];
}
KERNEL(wrong_short_wait);

// What a thread waited for is not there for another before a barrier.
extern "C" __global__ void wrong_wait_without_barrier(const float *from, float *out) {
    SHARED_ARRAY(float, tile, 256);
    tile.write(4 * threadIdx.x, float4{0, 0, 0, 0});
    __syncthreads();
    cp_async_16(tile, 4 * threadIdx.x, from + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = tile[(4 * threadIdx.x + 4) % 256];
}
KERNEL(wrong_wait_without_barrier);

extern "C" __global__ void wrong_unwritten(float *out) {
    SHARED_ARRAY(float, tile, 64);
    if (threadIdx.x < 63) tile[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
}
KERNEL(wrong_unwritten);

extern "C" __global__ void wrong_index(float *out) {
    SHARED_ARRAY(float, tile, 64);
    tile[threadIdx.x + 1] = 1;
    out[threadIdx.x] = 1;
}
KERNEL(wrong_index);

extern "C" __global__ void wrong_alignment(float *out) {
    const Shared<float> tile = dynamic_shared<float>(0, 128);
    tile.write(threadIdx.x, uint4{0, 0, 0, 0});
    out[threadIdx.x] = 1;
}
KERNEL(wrong_alignment);

extern "C" __global__ void wrong_dynamic_size(float *out) {
    const Shared<float> tile = dynamic_shared<float>(0, 129);
    tile[threadIdx.x] = 1;
    out[threadIdx.x] = tile[threadIdx.x];
}
KERNEL(wrong_dynamic_size);

extern "C" __global__ void wrong_overrun(float *out) { out[threadIdx.x + 1] = 1; }
KERNEL(wrong_overrun);

// The last thread to come decides.
extern "C" __global__ void wrong_order(float *out) {
    if (threadIdx.x < 64) out[0] = static_cast<float>(threadIdx.x);
}
KERNEL(wrong_order);

extern "C" __global__ void wrong_half_warp_mma(float *out) {
    if (threadIdx.x >= 48) return;
    const unsigned a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
    float sum[4] = {0, 0, 0, 0};
    mma_m16n8k16_f16(sum, a, b, sum);
    out[threadIdx.x] = sum[0];
}
KERNEL(wrong_half_warp_mma);
