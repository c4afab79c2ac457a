// Sums and maxima over a warp or a block, in a fixed order.
#pragma once

#include "common.cuh"

// Sum over the warp, the same in every lane.
template <class T> __device__ __forceinline__ T warp_total(T value) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) value += __shfl_xor_sync(all_lanes, value, half);
    return value;
}

// Sum over the block, the same in every thread. `partial` holds one value per warp and is free again after the next barrier.
template <class T> __device__ __forceinline__ T block_total(T value, const Shared<T> &partial) {
    value = warp_total(value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    T total = partial[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) total += static_cast<T>(partial[warp]);
    return total;
}

// Largest value over the block, the same in every thread.
__device__ __forceinline__ unsigned block_largest(unsigned value, const Shared<unsigned> &partial) {
    value = __reduce_max_sync(all_lanes, value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    unsigned largest = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) largest = max(largest, static_cast<unsigned>(partial[warp]));
    return largest;
}
