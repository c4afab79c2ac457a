// What the attention kernels share: how the bytes of a page become operands of the tensor cores.
#pragma once

#include "numbers.cuh"
#include "page.cuh"

// Two halves as the register that holds them, the first in the low half.
static __device__ inline uint32_t half2_bits(__half2 pair) {
    return (uint32_t)__half_as_ushort(__low2half(pair)) | (uint32_t)__half_as_ushort(__high2half(pair)) << 16;
}
static __device__ inline __half2 bits_half2(uint32_t bits) {
    return __halves2half2(__ushort_as_half((unsigned short)(bits & 0xffff)), __ushort_as_half((unsigned short)(bits >> 16)));
}

// x = high + low to 2^-22 of x, or 2^-25 where that is more.
static __device__ inline void split_pair(float x, float y, uint32_t &high, uint32_t &low) {
    __half2 top = __floats2half2_rn(x, y);
    high = half2_bits(top);
    low = half2_bits(__floats2half2_rn(x - __low2float(top), y - __high2float(top)));
}

// Transposes an 8 x 8 tile of halves: lane (r, j) gives elements (r, 2j), (r, 2j + 1) and gets (2j, r), (2j + 1, r).
static __device__ inline uint32_t transpose_tile(uint32_t pair) {
#if defined(__CUDA_ARCH__)
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
#else
    uint32_t lane = threadIdx.x % 32, from = lane % 4 * 8 + lane / 8, odd = lane / 4 % 2 * 16;
    uint32_t first = __shfl_sync(all_lanes, pair, from), second = __shfl_sync(all_lanes, pair, from + 4);
    return (first >> odd & 0xffff) | (second >> odd & 0xffff) << 16;
#endif
}

// sum += left right on 16 x 16 by 16 x 8.
static __device__ inline void multiply_add(float (&sum)[4], const unsigned (&left)[4], uint32_t right0, uint32_t right1) {
    const unsigned right[2] = {right0, right1};
    mma_m16n8k16_f16(sum, left, right, sum);
}

// Four INT8 codes less 128: halves 1024 + code come from placing the byte below 0x64.
static __device__ inline void unpack_bytes(uint32_t codes, uint32_t &first, uint32_t &second) {
    const __half2 bias = __float2half2_rn(1152.0f);
    first = half2_bits(__hsub2(bits_half2(__byte_perm(codes, 0x64646464u, 0x4140)), bias));
    second = half2_bits(__hsub2(bits_half2(__byte_perm(codes, 0x64646464u, 0x4342)), bias));
}

// Four e4m3 codes, 2^8 times too small: exponent and mantissa move down by one bit below the sign.
static __device__ inline uint32_t widen_e4m3(uint32_t spread) { return (spread & 0x80008000u) | (spread & 0x7f007f00u) >> 1; }
static __device__ inline void unpack_e4m3(uint32_t codes, uint32_t &first, uint32_t &second) {
    first = widen_e4m3(__byte_perm(codes, 0, 0x1404));
    second = widen_e4m3(__byte_perm(codes, 0, 0x3424));
}

// Nibbles p and p + 4 of a word as codes in halves.
static __device__ inline __half2 unpack_nibbles(uint32_t codes, int p) {
    return __hsub2(bits_half2((codes >> 4 * p & 0x000f000fu) | 0x64006400u), __float2half2_rn(1024.0f));
}

// Four INT4 value codes with their scales and zeros, as a left operand: rows are channels, columns tokens.
static __device__ inline void value_operand(unsigned (&left)[4], uint32_t codes, const __half2 (&scale)[8], const __half2 (&zero)[8], int tile) {
#pragma unroll
    for (int p = 0; p < 4; p++) left[p] = half2_bits(__hfma2(unpack_nibbles(codes, p), scale[2 * tile + p / 2], zero[2 * tile + p / 2]));
}

// Starts the copy of `bytes` (a multiple of 16) by one warp.
static __device__ inline void copy_async(Shared<uint8_t> to, uint32_t offset, const uint8_t *from, uint32_t bytes) {
    for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 512) cp_async_16(to, offset + at, from + at);
}

static __device__ inline float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
