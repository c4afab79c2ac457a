// Buffers set to one value.

#include "common.cuh"

// values [count] = value
extern "C" __global__ void fill_f32(float *__restrict__ values, float value, unsigned count) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] = value;
}
KERNEL(fill_f32);
