// Kernels that try the harness itself: right ones that use each feature, and wrong ones that must be caught.

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

// Reads its neighbour's element without a barrier.
extern "C" __global__ void test_race(float *__restrict__ out) {
    SHARED_ARRAY(float, tile, 64);
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    out[threadIdx.x] = tile[(threadIdx.x + 1) % 64];
}
KERNEL(test_race);
