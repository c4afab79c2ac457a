// Products with dense weights. y = x W^T
// W: [outputs, stride] f16, the first `inputs` of each row, then zeros up to `stride`, a multiple of 32
// x: [rows, inputs] f32   y: [rows, outputs] f32
// One row: weights stream past f32 activations, f32 sums; bound by the bytes of W.
// Many rows: each row of x is rounded once to f16 under a power of two of its own, so that no activation overflows, and the tensor cores
// multiply 16 x 8 x 16 tiles into f32 sums; bound by arithmetic.

#include "block.cuh"

namespace {

// Outputs of one warp in a product with one row, and loads of each in flight: 8 x 16 bytes per lane hide the latency of memory.
constexpr unsigned row_outputs = 4, row_loads = 2;
constexpr unsigned lane_weights = 8, warp_weights = 32 * lane_weights;

// Eight activations from `at` on, zeros beyond the end. `x` and `at` are multiples of 32 bytes.
__device__ __forceinline__ void load_eight(const float *x, unsigned at, unsigned inputs, float (&values)[8]) {
    if (at + 8 <= inputs) {
        const float4 low = *reinterpret_cast<const float4 *>(x + at), high = *reinterpret_cast<const float4 *>(x + at + 4);
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
        return;
    }
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) values[i] = at + i < inputs ? x[at + i] : 0.0f;
}

__device__ __forceinline__ float2 widened(unsigned both) {
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(both & 0xffffu))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(both >> 16))));
}

__device__ __forceinline__ float multiply_eight(uint4 weights, const float (&x)[8], float sum) {
    const float2 a = widened(weights.x), b = widened(weights.y), c = widened(weights.z), d = widened(weights.w);
    sum = fmaf(x[1], a.y, fmaf(x[0], a.x, sum));
    sum = fmaf(x[3], b.y, fmaf(x[2], b.x, sum));
    sum = fmaf(x[5], c.y, fmaf(x[4], c.x, sum));
    return fmaf(x[7], d.y, fmaf(x[6], d.x, sum));
}

// Product with many rows: a block makes block_rows x block_outputs results, each of its 8 warps warp_rows x warp_outputs of them.
constexpr unsigned threads = 256;
constexpr unsigned block_rows = 128, block_outputs = 128, depth = 32, stages = 2;
constexpr unsigned warp_rows = 64, warp_outputs = 32, warps_across = block_outputs / warp_outputs;
// Halves from row to row in shared memory: 20 words, so that eight successive rows start in different banks.
constexpr unsigned pitch = depth + 8;
constexpr unsigned tile_halves = 128 * pitch, stage_halves = 2 * tile_halves;

// Copies 128 rows of `depth` halves. Rows beyond the last are taken from the last; nobody stores what they give.
__device__ __forceinline__ void load_tile(const Shared<__half> &tile, const __half *source, unsigned stride, unsigned first, unsigned rows, unsigned at) {
    constexpr unsigned pieces = depth / 8;
    for (unsigned piece = threadIdx.x; piece < 128 * pieces; piece += threads) {
        const unsigned row = piece / pieces, column = piece % pieces * 8;
        cp_async_16(tile, row * pitch + column, source + size_t(min(first + row, rows - 1)) * stride + at + column);
    }
}

// The sums of one warp over one stage. Activations are the left operand, weights the right one.
__device__ __forceinline__ void multiply_stage(const Shared<__half> &stage, unsigned warp_row, unsigned warp_output,
                                               float (&sums)[warp_rows / 16][warp_outputs / 8][4]) {
    const unsigned lane = threadIdx.x % 32, tile = lane / 8, line = lane % 8;
#pragma unroll
    for (unsigned step = 0; step < depth; step += 16) {
        unsigned right[warp_outputs / 16][4];
#pragma unroll
        for (unsigned n = 0; n < warp_outputs / 16; ++n) {
            ldmatrix_x4(right[n], stage, tile_halves + (warp_output + 16 * n + tile / 2 * 8 + line) * pitch + step + tile % 2 * 8);
        }
#pragma unroll
        for (unsigned m = 0; m < warp_rows / 16; ++m) {
            unsigned left[4];
            ldmatrix_x4(left, stage, (warp_row + 16 * m + tile % 2 * 8 + line) * pitch + step + tile / 2 * 8);
#pragma unroll
            for (unsigned n = 0; n < warp_outputs / 8; ++n) {
                const unsigned pair[2] = {right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]};
                mma_m16n8k16_f16(sums[m][n], left, pair, sums[m][n]);
            }
        }
    }
}

}  // namespace

// scales[t] = a power of two near max|x_t| / 2^14, halves[t] = x_t / scales[t]. A row with a NaN or an infinity gets that as its scale.
// halves: [rows, stride], zeros beyond `width`. Block: 256; grid: rows.
extern "C" __global__ void half_rows_f32(const float *__restrict__ x, __half *__restrict__ halves, float *__restrict__ scales, unsigned width, unsigned stride) {
    SHARED_ARRAY(unsigned, partial, threads / 32);
    const float *row = x + size_t(blockIdx.x) * width;
    __half *out = halves + size_t(blockIdx.x) * stride;
    // As unsigned integers, magnitudes order as floats do, with infinity and NaN above them all.
    unsigned largest = 0;
    for (unsigned i = threadIdx.x; i < width; i += threads) largest = max(largest, __float_as_uint(row[i]) & 0x7fffffffu);
    largest = block_largest(largest, partial);
    const unsigned exponent = min(max(largest >> 23, 15u), 254u);
    const float factor = __uint_as_float((268 - exponent) << 23);
    for (unsigned i = threadIdx.x; i < stride; i += threads) out[i] = __float2half_rn(i < width ? row[i] * factor : 0.0f);
    if (threadIdx.x == 0) scales[blockIdx.x] = largest >> 23 == 255 ? __uint_as_float(largest) : __uint_as_float((exponent - 14) << 23);
}
KERNEL(half_rows_f32);

// One row; outputs below first_end go to `first`, those below second_end to `second`, the others to `third`.
// Block: 32 * warps; grid: outputs / (4 * warps), rounded up.
extern "C" __global__ void dense_row_f16(const __half *__restrict__ weights, const float *__restrict__ x, float *first, float *second, float *third,
                                         unsigned first_end, unsigned second_end, unsigned outputs, unsigned inputs, unsigned stride) {
    const Stacked y = {first, second, third, first_end, second_end};
    const unsigned lane = threadIdx.x % 32, output = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * row_outputs;
    if (output >= outputs) return;
    float sums[row_outputs] = {};
    for (unsigned start = lane_weights * lane; start < inputs; start += row_loads * warp_weights) {
        uint4 loaded[row_loads][row_outputs];
#pragma unroll
        for (unsigned step = 0; step < row_loads; ++step) {
            const unsigned at = start + step * warp_weights;
#pragma unroll
            for (unsigned o = 0; o < row_outputs; ++o) {
                const __half *row = weights + size_t(min(output + o, outputs - 1)) * stride;
                loaded[step][o] = at < inputs ? load_16_streaming(row + at) : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (unsigned step = 0; step < row_loads; ++step) {
            float values[8];
            load_eight(x, start + step * warp_weights, inputs, values);
#pragma unroll
            for (unsigned o = 0; o < row_outputs; ++o) sums[o] = multiply_eight(loaded[step][o], values, sums[o]);
        }
    }
#pragma unroll
    for (unsigned o = 0; o < row_outputs; ++o) {
        const float sum = warp_total(sums[o]);
        if (lane == 0 && output + o < outputs) y[output + o] = sum;
    }
}
KERNEL(dense_row_f16);

// Many rows, out of half_rows_f32. Block: 256; grid: (outputs / 128, rows / 128), both rounded up.
extern "C" __global__ void __launch_bounds__(threads)
    dense_rows_f16(const __half *__restrict__ weights, const __half *__restrict__ halves, const float *__restrict__ scales, float *__restrict__ y,
                   unsigned rows, unsigned outputs, unsigned stride) {
    SHARED_ARRAY(__half, shared, stages * stage_halves);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned first_row = blockIdx.y * block_rows, first_output = blockIdx.x * block_outputs;
    const unsigned warp_row = warp / warps_across * warp_rows, warp_output = warp % warps_across * warp_outputs;
    // Warps whose results all lie outside only help to copy.
    const bool has_work = first_row + warp_row < rows && first_output + warp_output < outputs;
    float sums[warp_rows / 16][warp_outputs / 8][4] = {};

    load_tile(shared, halves, stride, first_row, rows, 0);
    load_tile(shared + tile_halves, weights, stride, first_output, outputs, 0);
    cp_async_commit();
    unsigned stage = 0;
    for (unsigned at = 0; at < stride; at += depth) {
        if (at + depth < stride) {
            const Shared<__half> next = shared + (1 - stage) * stage_halves;
            load_tile(next, halves, stride, first_row, rows, at + depth);
            load_tile(next + tile_halves, weights, stride, first_output, outputs, at + depth);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        if (has_work) multiply_stage(shared + stage * stage_halves, warp_row, warp_output, sums);
        __syncthreads();
        stage = 1 - stage;
    }

#pragma unroll
    for (unsigned i = 0; i < warp_rows / 8; ++i) {
        const unsigned row = first_row + warp_row + 8 * i + lane / 4;
        if (row < rows) {
            const float scale = scales[row];
#pragma unroll
            for (unsigned n = 0; n < warp_outputs / 8; ++n) {
                const unsigned output = first_output + warp_output + 8 * n + 2 * (lane % 4);
                float *out = y + size_t(row) * outputs + output;
                if (output < outputs) out[0] = sums[i / 2][n][i % 2 * 2] * scale;
                if (output + 1 < outputs) out[1] = sums[i / 2][n][i % 2 * 2 + 1] * scale;
            }
        }
    }
}
KERNEL(dense_rows_f16);
