// Gated activations. SwiGLU: Shazeer 2020, arXiv:2002.05202; squared ReLU: So et al. 2021, arXiv:2109.08668.
// y = f(gate) * up,  f = SiLU, or max(x, 0)^2
// gate, up, y: [count] f32; y may be gate
// The exponential is the CPU's polynomial, so y has the CPU's bits.

#include "common.cuh"

namespace {

// e^x; Cephes mathematical library (S. Moshier), `expf.c`, as in src/ops/cpu/math.rs.
__device__ __forceinline__ float exponential(float x) {
    constexpr float largest = 88.37626f, smallest = -87.33654f;
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23
    float bounded = x > largest ? largest : x;
    bounded = bounded < smallest ? smallest : bounded;
    const float shifted = fmaf(bounded, 1.44269504f, rounder);
    const float exponent = shifted - rounder;
    const float r = fmaf(exponent, 2.1219444e-4f, fmaf(exponent, -0.6933594f, bounded));
    float q = 1.9875692e-4f;
    q = fmaf(q, r, 1.3982e-3f);
    q = fmaf(q, r, 8.333452e-3f);
    q = fmaf(q, r, 4.1665796e-2f);
    q = fmaf(q, r, 1.6666665e-1f);
    q = fmaf(q, r, 5e-1f);
    const float mantissa = __fadd_rn(fmaf(q, __fmul_rn(r, r), r), 1.0f);
    const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
    return x < smallest ? 0.0f : __fmul_rn(mantissa, power);
}

struct Silu {
    __device__ __forceinline__ static float of(float x) { return __fmul_rn(x, 1.0f / __fadd_rn(1.0f, exponential(-x))); }
};

struct SquaredRelu {
    __device__ __forceinline__ static float of(float x) {
        const float positive = x > 0.0f ? x : 0.0f * x;
        return __fmul_rn(positive, positive);
    }
};

template <class Activation> __device__ __forceinline__ void gate_all(const float *gate, const float *up, float *y, unsigned count) {
    const unsigned i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 4 <= count) {
        const float4 g = *reinterpret_cast<const float4 *>(gate + i), u = *reinterpret_cast<const float4 *>(up + i);
        *reinterpret_cast<float4 *>(y + i) =
            make_float4(Activation::of(g.x) * u.x, Activation::of(g.y) * u.y, Activation::of(g.z) * u.z, Activation::of(g.w) * u.w);
    } else {
        for (unsigned k = i; k < count; ++k) y[k] = Activation::of(gate[k]) * up[k];
    }
}

}  // namespace

// Block: any; grid: count / (4 * block), rounded up. All three are aligned to 16 bytes.
extern "C" __global__ void silu_gate_f32(const float *gate, const float *up, float *y, unsigned count) { gate_all<Silu>(gate, up, y, count); }
KERNEL(silu_gate_f32);

extern "C" __global__ void squared_relu_gate_f32(const float *gate, const float *up, float *y, unsigned count) {
    gate_all<SquaredRelu>(gate, up, y, count);
}
KERNEL(squared_relu_gate_f32);
