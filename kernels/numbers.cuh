// Rounding and small reductions that the cache's kernels share. Codes and scales have the bits of the codecs that run on the CPU.
#pragma once

#include "common.cuh"

// Factor that covers the rounding of a sum of at most 256 squares and of its root.
constexpr float ROUNDED_UP = 1.0f + 1.0f / 16384;

// The nearest half that is finite: an overflow to infinity would spoil every later token. NaN stays.
static __device__ inline __half finite_half(float value) {
    return __float2half_rn(value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value);
}

static __device__ inline bool is_number(__half value) { return (__half_as_ushort(value) & 0x7fff) <= 0x7c00; }

// What is encoded for a half: 0 for NaN.
static __device__ inline float number(__half value) { return is_number(value) ? __half2float(value) : 0.0f; }

// The smallest half not below a value >= 0 (infinity beyond the largest).
static __device__ inline __half half_up(float value) {
    __half nearest = __float2half_rn(value);
    return __half2float(nearest) < value ? __ushort_as_half(__half_as_ushort(nearest) + 1) : nearest;
}

static __device__ inline int affine_code(float value, float zero, float scale, int most) {
    if (!(scale > 0)) return 0;
    return (int)fminf(fmaxf(rintf((value - zero) / scale), 0.0f), (float)most);
}

// Sign, four exponent bits (bias 7), three mantissa bits, largest 448; ties to even, no infinities.
static __device__ inline uint8_t e4m3_code(float value) {
    float magnitude = fminf(fabsf(value), 448.0f);
    uint32_t sign = value < 0 ? 0x80 : 0;
    // Below 2^-6 the step is 2^-9; above, three bits follow the leading one.
    if (magnitude < 0.015625f) return sign | (uint32_t)rintf(magnitude * 512.0f);
    uint32_t bits = __float_as_uint(magnitude);
    bits += 0x7ffff + (bits >> 20 & 1);
    return sign | ((bits >> 20) - (120 << 3));
}

static __device__ inline float e4m3_value(uint8_t code) {
    // The bits of the code are those of a half 2^8 times smaller.
    uint32_t half_bits = (code & 0x80) << 8 | (code & 0x7f) << 7;
    return __half2float(__ushort_as_half((unsigned short)half_bits)) * 256.0f;
}

template <typename Combine> static __device__ inline float warp_combine(float value, Combine combine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

static __device__ inline float warp_sum(float value) {
    return warp_combine(value, [](float a, float b) { return a + b; });
}
static __device__ inline float warp_max(float value) {
    return warp_combine(value, [](float a, float b) { return fmaxf(a, b); });
}
static __device__ inline float warp_min(float value) {
    return warp_combine(value, [](float a, float b) { return fminf(a, b); });
}

// Over a block of whole warps, the result in every thread; `shared` holds a float per warp.
template <typename Combine> static __device__ inline float block_combine(float value, Shared<float> shared, Combine combine) {
    value = warp_combine(value, combine);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    float result = shared[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) result = combine(result, shared[warp]);
    return result;
}

static __device__ inline float block_sum(float value, Shared<float> shared) {
    return block_combine(value, shared, [](float a, float b) { return a + b; });
}
static __device__ inline float block_max(float value, Shared<float> shared) {
    return block_combine(value, shared, [](float a, float b) { return fmaxf(a, b); });
}
