// Root-mean-square normalization with the residual add before it. Zhang & Sennrich 2019, arXiv:1910.07467.
// s = x + residual,  y = g * s / sqrt(mean(s^2) + eps)
// x, residual, s, y: [rows, width] f32   g: [width], or [1] for a scalar gain
// One block per row. The sum of squares is a tree over the block's threads, so y differs from the CPU's in the last bits.

#include "block.cuh"

namespace {

constexpr unsigned threads = 256;

__device__ __forceinline__ float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

__device__ __forceinline__ float4 scaled(float4 s, float scale, float4 g) {
    return make_float4(s.x * scale * g.x, s.y * scale * g.y, s.z * scale * g.z, s.w * scale * g.w);
}

// Adds `addend` to the row where there is one and returns the thread's share of the sum of squares. Rows whose width is a multiple of 4
// are aligned to 16 bytes.
template <bool with_addend> __device__ __forceinline__ float add_and_square(float *row, const float *addend, unsigned width) {
    float squares = 0.0f;
    if (width % 4 == 0) {
        for (unsigned i = 4 * threadIdx.x; i < width; i += 4 * threads) {
            float4 s = *reinterpret_cast<const float4 *>(row + i);
            if (with_addend) {
                s = add(*reinterpret_cast<const float4 *>(addend + i), s);
                *reinterpret_cast<float4 *>(row + i) = s;
            }
            squares = fmaf(s.x, s.x, fmaf(s.y, s.y, fmaf(s.z, s.z, fmaf(s.w, s.w, squares))));
        }
        return squares;
    }
    for (unsigned i = threadIdx.x; i < width; i += threads) {
        float s = row[i];
        if (with_addend) {
            s = addend[i] + s;
            row[i] = s;
        }
        squares = fmaf(s, s, squares);
    }
    return squares;
}

// Every thread reads back what it wrote itself.
__device__ __forceinline__ void scale_row(const float *row, const float *gain, unsigned gain_width, float scale, float *y, unsigned width) {
    if (width % 4 == 0) {
        for (unsigned i = 4 * threadIdx.x; i < width; i += 4 * threads) {
            const float4 g = gain_width == 1 ? make_float4(gain[0], gain[0], gain[0], gain[0]) : *reinterpret_cast<const float4 *>(gain + i);
            *reinterpret_cast<float4 *>(y + i) = scaled(*reinterpret_cast<const float4 *>(row + i), scale, g);
        }
        return;
    }
    for (unsigned i = threadIdx.x; i < width; i += threads) y[i] = row[i] * scale * gain[gain_width == 1 ? 0 : i];
}

template <bool with_addend>
__device__ __forceinline__ void normalize(float *stream, const float *addend, const float *gain, float *y, unsigned width, unsigned gain_width, float epsilon) {
    SHARED_ARRAY(float, partial, threads / 32);
    const size_t start = size_t(blockIdx.x) * width;
    const float squares = add_and_square<with_addend>(stream + start, with_addend ? addend + start : addend, width);
    const float scale = 1.0f / sqrtf(block_total(squares, partial) / static_cast<float>(width) + epsilon);
    scale_row(stream + start, gain, gain_width, scale, y + start, width);
}

}  // namespace

// y = norm(stream). Block: 256; grid: rows.
extern "C" __global__ void rms_norm_f32(float *__restrict__ stream, const float *__restrict__ gain, float *__restrict__ y, unsigned width,
                                        unsigned gain_width, float epsilon) {
    normalize<false>(stream, nullptr, gain, y, width, gain_width, epsilon);
}
KERNEL(rms_norm_f32);

// stream += addend, y = norm(stream). Block: 256; grid: rows.
extern "C" __global__ void add_rms_norm_f32(float *__restrict__ stream, const float *__restrict__ addend, const float *__restrict__ gain,
                                            float *__restrict__ y, unsigned width, unsigned gain_width, float epsilon) {
    normalize<true>(stream, addend, gain, y, width, gain_width, epsilon);
}
KERNEL(add_rms_norm_f32);
