// Products of 8-bit activations with ternary weights. Ma et al. 2024 (BitNet b1.58), arXiv:2402.17764; the rule of src/ops/cpu/ternary.rs.
// x ~ (gamma / 127) q, gamma = max(max|x|, 1e-5), q = clamp(round(x 127 / gamma), -128, 127);  y = (q . T) ((gamma / 127) alpha)
// x: [rows, width] f32   q: [rows, 64 * pieces] i8, zeros beyond `width`   y: [rows, outputs] f32
// T: [outputs, pieces] of 16 bytes; byte j of word w of a row holds the codes, each plus one, of inputs 16 w + j, + 4, + 8 and + 12 from its
// lowest bits up, so that (word >> 2 i) & 0x03030303 is four successive inputs: an operand of dp4a and of the tensor cores.
// alphas: [outputs] f32, the scale of the matrix that an output belongs to. The dot products are exact in i32: y has the CPU's bits.

#include "block.cuh"

namespace {

constexpr unsigned codes_mask = 0x03030303u;
constexpr unsigned piece_inputs = 64;

// Outputs of one warp in a product with one row, and pieces of each in flight.
constexpr unsigned row_outputs = 4, row_loads = 2;

// Adds q (code + 1) over the 16 inputs of a word. Codes in bits 2 and 3 of a byte count fourfold, into a sum of their own: a shift saved.
__device__ __forceinline__ void multiply_word(unsigned word, uint4 q, int &sum, int &fourfold) {
    const unsigned upper = word >> 4;
    sum = __dp4a(static_cast<int>(word & codes_mask), static_cast<int>(q.x), sum);
    fourfold = __dp4a(static_cast<int>(word & (codes_mask << 2)), static_cast<int>(q.y), fourfold);
    sum = __dp4a(static_cast<int>(upper & codes_mask), static_cast<int>(q.z), sum);
    fourfold = __dp4a(static_cast<int>(upper & (codes_mask << 2)), static_cast<int>(q.w), fourfold);
}

// Product with many rows: as in dense.cu.
constexpr unsigned threads = 256;
constexpr unsigned block_rows = 128, block_outputs = 128, depth = piece_inputs, stages = 2;
constexpr unsigned warp_rows = 64, warp_outputs = 32, warps_across = block_outputs / warp_outputs;
// Bytes from row to row of activations in shared memory: 20 words, so that eight successive rows start in different banks.
constexpr unsigned pitch = depth + 16;
constexpr unsigned tile_bytes = block_rows * pitch, stage_bytes = tile_bytes + 16 * block_outputs;

struct Matrices {
    const uint4 *weights;
    const signed char *codes;
    unsigned rows, outputs, pieces;
};

// Copies one piece of every row and output. Those beyond the last are taken from the last; nobody stores what they give.
__device__ __forceinline__ void load_stage(const Shared<signed char> &stage, const Matrices &all, unsigned first_row, unsigned first_output, unsigned piece) {
    for (unsigned i = threadIdx.x; i < block_rows * (depth / 16); i += threads) {
        const unsigned row = i / (depth / 16), column = i % (depth / 16) * 16;
        cp_async_16(stage, row * pitch + column, all.codes + (size_t(min(first_row + row, all.rows - 1)) * all.pieces + piece) * depth + column);
    }
    for (unsigned i = threadIdx.x; i < block_outputs; i += threads) {
        cp_async_16(stage, tile_bytes + 16 * i, all.weights + size_t(min(first_output + i, all.outputs - 1)) * all.pieces + piece);
    }
}

// The dot products of one warp over one stage. Activations are the left operand, weights, expanded in registers, the right one.
__device__ __forceinline__ void multiply_stage(const Shared<signed char> &stage, unsigned warp_row, unsigned warp_output,
                                               int (&dots)[warp_rows / 16][warp_outputs / 8][4]) {
    const unsigned lane = threadIdx.x % 32, tile = lane / 8, line = lane % 8, shift = 2 * (lane % 4);
    unsigned right[warp_outputs / 8][4];
#pragma unroll
    for (unsigned n = 0; n < warp_outputs / 8; ++n) {
        const uint4 words = stage.read<uint4>(tile_bytes + 16 * (warp_output + 8 * n + lane / 4));
        right[n][0] = words.x >> shift & codes_mask;
        right[n][1] = words.y >> shift & codes_mask;
        right[n][2] = words.z >> shift & codes_mask;
        right[n][3] = words.w >> shift & codes_mask;
    }
#pragma unroll
    for (unsigned step = 0; step < depth / 32; ++step) {
#pragma unroll
        for (unsigned m = 0; m < warp_rows / 16; ++m) {
            unsigned left[4];
            ldmatrix_x4(left, stage, (warp_row + 16 * m + tile % 2 * 8 + line) * pitch + 32 * step + tile / 2 * 16);
#pragma unroll
            for (unsigned n = 0; n < warp_outputs / 8; ++n) {
                const unsigned pair[2] = {right[n][2 * step], right[n][2 * step + 1]};
                mma_m16n8k32_s8(dots[m][n], left, pair, dots[m][n]);
            }
        }
    }
}

}  // namespace

// Codes, gamma and the sum of the codes of each row. A row with a NaN or an infinity gets that as its gamma. Block: 256; grid: rows.
extern "C" __global__ void quantize_rows_i8(const float *__restrict__ x, signed char *__restrict__ codes, float *__restrict__ gammas,
                                            int *__restrict__ sums, unsigned width, unsigned pieces) {
    SHARED_ARRAY(unsigned, partial, threads / 32);
    SHARED_ARRAY(int, partial_sums, threads / 32);
    const float *row = x + size_t(blockIdx.x) * width;
    signed char *out = codes + size_t(blockIdx.x) * pieces * piece_inputs;
    // As unsigned integers, magnitudes order as floats do, with infinity and NaN above them all.
    unsigned largest = 0;
    for (unsigned i = threadIdx.x; i < width; i += threads) largest = max(largest, __float_as_uint(row[i]) & 0x7fffffffu);
    const float found = __uint_as_float(block_largest(largest, partial));
    const float gamma = found < 1e-5f ? 1e-5f : found;
    const float factor = 127.0f / gamma;
    int sum = 0;
    for (unsigned i = threadIdx.x; i < pieces * piece_inputs; i += threads) {
        float bounded = i < width ? __fmul_rn(row[i], factor) : 0.0f;
        bounded = bounded < -128.0f ? -128.0f : bounded;
        bounded = bounded > 127.0f ? 127.0f : bounded;
        // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves that integer in the low bits.
        const signed char code = static_cast<signed char>(__float_as_uint(__fadd_rn(bounded, 12582912.0f)) & 0xffu);
        out[i] = code;
        sum += code;
    }
    sum = block_total(sum, partial_sums);
    if (threadIdx.x == 0) {
        gammas[blockIdx.x] = gamma;
        sums[blockIdx.x] = sum;
    }
}
KERNEL(quantize_rows_i8);

// One row; outputs below first_end go to `first`, those below second_end to `second`, the others to `third`.
// Block: 32 * warps; grid: outputs / (4 * warps), rounded up.
extern "C" __global__ void ternary_row_i8(const uint4 *__restrict__ weights, const float *__restrict__ alphas, const signed char *__restrict__ codes,
                                          const float *__restrict__ gammas, const int *__restrict__ sums, float *first, float *second, float *third,
                                          unsigned first_end, unsigned second_end, unsigned outputs, unsigned pieces) {
    const Stacked y = {first, second, third, first_end, second_end};
    const unsigned lane = threadIdx.x % 32, output = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * row_outputs;
    if (output >= outputs) return;
    int plain[row_outputs] = {}, fourfold[row_outputs] = {};
    for (unsigned start = lane; start < pieces; start += 32 * row_loads) {
        uint4 loaded[row_loads][row_outputs];
#pragma unroll
        for (unsigned step = 0; step < row_loads; ++step) {
            const unsigned piece = start + 32 * step;
#pragma unroll
            for (unsigned o = 0; o < row_outputs; ++o) {
                const uint4 *row = weights + size_t(min(output + o, outputs - 1)) * pieces;
                loaded[step][o] = piece < pieces ? load_16_streaming(row + piece) : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (unsigned step = 0; step < row_loads; ++step) {
            const unsigned piece = start + 32 * step;
            if (piece < pieces) {
                const signed char *q = codes + size_t(piece) * piece_inputs;
                const uint4 q0 = load_16(q), q1 = load_16(q + 16), q2 = load_16(q + 32), q3 = load_16(q + 48);
#pragma unroll
                for (unsigned o = 0; o < row_outputs; ++o) {
                    multiply_word(loaded[step][o].x, q0, plain[o], fourfold[o]);
                    multiply_word(loaded[step][o].y, q1, plain[o], fourfold[o]);
                    multiply_word(loaded[step][o].z, q2, plain[o], fourfold[o]);
                    multiply_word(loaded[step][o].w, q3, plain[o], fourfold[o]);
                }
            }
        }
    }
#pragma unroll
    for (unsigned o = 0; o < row_outputs; ++o) {
        // What stands for zero is stored as one.
        const int dot = warp_total(plain[o] + fourfold[o] / 4) - sums[0];
        if (lane == 0 && output + o < outputs) y[output + o] = static_cast<float>(dot) * __fmul_rn(gammas[0] / 127.0f, alphas[output + o]);
    }
}
KERNEL(ternary_row_i8);

// Many rows. Block: 256; grid: (outputs / 128, rows / 128), both rounded up.
extern "C" __global__ void __launch_bounds__(threads)
    ternary_rows_i8(const uint4 *__restrict__ weights, const float *__restrict__ alphas, const signed char *__restrict__ codes,
                    const float *__restrict__ gammas, const int *__restrict__ sums, float *__restrict__ y, unsigned rows, unsigned outputs, unsigned pieces) {
    SHARED_ARRAY(signed char, shared, stages * stage_bytes);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned first_row = blockIdx.y * block_rows, first_output = blockIdx.x * block_outputs;
    const unsigned warp_row = warp / warps_across * warp_rows, warp_output = warp % warps_across * warp_outputs;
    // Warps whose results all lie outside only help to copy.
    const bool has_work = first_row + warp_row < rows && first_output + warp_output < outputs;
    const Matrices all = {weights, codes, rows, outputs, pieces};
    int dots[warp_rows / 16][warp_outputs / 8][4] = {};

    load_stage(shared, all, first_row, first_output, 0);
    cp_async_commit();
    unsigned stage = 0;
    for (unsigned piece = 0; piece < pieces; ++piece) {
        if (piece + 1 < pieces) load_stage(shared + (1 - stage) * stage_bytes, all, first_row, first_output, piece + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        if (has_work) multiply_stage(shared + stage * stage_bytes, warp_row, warp_output, dots);
        __syncthreads();
        stage = 1 - stage;
    }

#pragma unroll
    for (unsigned i = 0; i < warp_rows / 8; ++i) {
        const unsigned row = first_row + warp_row + 8 * i + lane / 4;
        if (row < rows) {
            const float scale = gammas[row] / 127.0f;
            const int sum = sums[row];
#pragma unroll
            for (unsigned n = 0; n < warp_outputs / 8; ++n) {
#pragma unroll
                for (unsigned k = 0; k < 2; ++k) {
                    const unsigned output = first_output + warp_output + 8 * n + 2 * (lane % 4) + k;
                    const int dot = dots[i / 2][n][i % 2 * 2 + k] - sum;
                    if (output < outputs) y[size_t(row) * outputs + output] = static_cast<float>(dot) * __fmul_rn(scale, alphas[output]);
                }
            }
        }
    }
}
KERNEL(ternary_rows_i8);
