// Sums and maxima over a warp or a block, in a fixed order; where results of stacked matrices go.
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

// The results of one row of activations with up to three matrices, one below the other, each in an array of its own.
struct Stacked {
    float *first, *second, *third;
    unsigned first_end, second_end;

    __device__ __forceinline__ float &operator[](unsigned output) const {
        return output < first_end ? first[output] : output < second_end ? second[output - first_end] : third[output - second_end];
    }
};
