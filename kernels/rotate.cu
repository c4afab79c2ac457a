// Rotations of rows: random signs, then the Walsh-Hadamard transform of a power-of-two width. Ailon & Chazelle 2006,
// doi:10.1145/1132516.1132597. Sums are made in the order of the transform on the CPU, so the bits are the same.

#include "numbers.cuh"

constexpr int WIDEST_ROTATION = 1024;

// row = H row without the factor 1 / sqrt(width), by the whole block.
static __device__ void hadamard(Shared<float> row, uint32_t width) {
    for (uint32_t half = 1; half < width; half *= 2) {
        __syncthreads();
        for (uint32_t pair = threadIdx.x; pair < width / 2; pair += blockDim.x) {
            uint32_t first = pair / half * 2 * half + pair % half;
            float x = row[first], y = row[first + half];
            row[first] = x + y;
            row[first + half] = x - y;
        }
    }
    __syncthreads();
}

// out [rows, width] = in [rows, width] rotated; scales [width]: signs over sqrt(width). One block per row; in and out may be the same.
extern "C" __global__ void rotate_forward_f32(const float *in, float *out, const float *scales, uint32_t width) {
    SHARED_ARRAY(float, row, WIDEST_ROTATION);
    size_t start = (size_t)blockIdx.x * width;
    for (uint32_t channel = threadIdx.x; channel < width; channel += blockDim.x) row[channel] = in[start + channel] * scales[channel];
    hadamard(row, width);
    for (uint32_t channel = threadIdx.x; channel < width; channel += blockDim.x) out[start + channel] = row[channel];
}
KERNEL(rotate_forward_f32);

// Undoes rotate_forward_f32.
extern "C" __global__ void rotate_backward_f32(const float *in, float *out, const float *scales, uint32_t width) {
    SHARED_ARRAY(float, row, WIDEST_ROTATION);
    size_t start = (size_t)blockIdx.x * width;
    for (uint32_t channel = threadIdx.x; channel < width; channel += blockDim.x) row[channel] = in[start + channel];
    hadamard(row, width);
    for (uint32_t channel = threadIdx.x; channel < width; channel += blockDim.x) out[start + channel] = row[channel] * scales[channel];
}
KERNEL(rotate_backward_f32);
