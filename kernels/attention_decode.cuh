// One query token against the pages of a list, with the certificate of the answer gathered in the same pass.
//
// A block reads a part of one key-value head's list for up to 8 of the query heads that share it; its 4 warps take pages in turn, each with
// a softmax state of its own, copying the next piece of a page while it works on the last. Products run on the tensor cores with the pages
// as the left operand and the query heads as the 8 columns. Queries and weights go in as two halves (high + low), so that the result is
// that of f32 arithmetic; codes are exact in halves; only decoded INT4 values round to 11 bits, which their error bound includes.
//
// Softmax weights p = 2^(s - m), s in bits, with m below the running maximum by SHIFT so that small weights keep their bits in halves.
//
// Per page b, query by query: rho_b = sum p, Delta_b >= |s_true - s| (in natural units), eta_b >= norm(v - vhat). Gathered over a part:
//   mass_low = sum_b rho_b e^-Delta_b, value_term = sum_b rho_b e^Delta_b eta_b, key_squares = sum_b rho_b (e^Delta_b - 1)^2,
//   norm_squares = sum_t p_t norm(vhat_t)^2.  attention_merge.cu turns these into the bound.
// For the estimate that is no bound, with v_b the variance of the page's score errors and e_b the mean of norm(v - vhat)^2:
//   meter_values = sum_t p_t^2 e_b, meter_keys = sum_t p_t^2 v_b.
#pragma once

#include "attention_tile.cuh"

constexpr int DECODE_WARPS = 4;
constexpr int QUERIES = 8;
constexpr int PARTIAL_HEAD = 8;  // m, l, norm_squares, mass_low, value_term, key_squares, meter_values, meter_keys; then the output [width]
// ln rho_b, Delta_b, mean of norm(vhat)^2 under the weights, eta_b; sum p^2 / (sum p)^2, v_b, e_b, 0 (the last four: 0 for exact pages)
constexpr int PAGE_FACTS = 8;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// Relative rounding of a product of two halves' pairs and of its f32 sum, per term.
constexpr float EPSILON = 1.0f / 8388608;

// Blocks on a multiprocessor that registers shall suffice for. Compilers for newer GPUs load further ahead, and would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int decode_blocks(int width) { return width > 128 ? 1 : width > 96 ? 2 : 3; }
#else
constexpr int decode_blocks(int width) { return width > 128 ? 1 : 3; }
#endif

struct DecodeArguments {
    const float *queries;         // [kv_heads * group, head_dim]
    const uint8_t *exact_pages, *near_pages;
    const uint32_t *lists;        // [kv_heads, list_stride] page entries; the page of the query's own token last
    const uint32_t *list_lengths; // [kv_heads]
    float *partials;              // [kv_heads * group, splits, PARTIAL_HEAD + W]
    float *page_facts;            // [kv_heads * group, list_stride, PAGE_FACTS]; null: nobody asks
    uint32_t last_tokens;         // tokens in the last page of every list
    uint32_t list_stride, group, head_dim;
};

// The running softmax of one warp: queries 2j and 2j + 1, sums over the lane's own tokens, output channels r and r + 8 of every 16.
template <int W> struct DecodeState {
    float maximum[2], mass[2], norm_squares[2], mass_low[2], value_term[2], key_squares[2], meter_values[2], meter_keys[2];
    float output[W / 16][4];

    __device__ void clear() {
#pragma unroll
        for (int q = 0; q < 2; q++) {
            maximum[q] = -INFINITY;
            mass[q] = norm_squares[q] = mass_low[q] = value_term[q] = key_squares[q] = meter_values[q] = meter_keys[q] = 0;
        }
#pragma unroll
        for (int tile = 0; tile < W / 16; tile++) output[tile][0] = output[tile][1] = output[tile][2] = output[tile][3] = 0;
    }
};

// What a page says about its own error, for the lane's two queries.
struct PageError {
    float delta_bits[2], variance[2], value_error, value_mean_square, value_factor;
};

// What a piece weighs, for the lane's two queries: sums of p, of p norm(vhat)^2 and of p^2.
struct PieceSums {
    float mass[2], norms[2], squares[2];
};

// The weights of 16 tokens as right operands.
struct WeightTile {
    uint32_t high[2], low[2];
};

template <int W> struct Shapes {
    static constexpr int KEY_BYTES = HEADER_BYTES + NORMS_BYTES + 68 * W;
    static constexpr int VALUE_BYTES = 64 * W;
    static constexpr int WARP_BYTES = KEY_BYTES + VALUE_BYTES;
    static constexpr int FACTS_OFFSET = 64 * W;                 // after the two forms of the queries
    static constexpr int WARPS_OFFSET = FACTS_OFFSET + 128;
    static constexpr int SHARED_BYTES = WARPS_OFFSET + DECODE_WARPS * WARP_BYTES;
    static constexpr int FLOATS = PARTIAL_HEAD + W;
};

// Near tiers. Each says how its pages are cut in two copies and how they become scores and outputs.
struct NoNear {
    static constexpr bool near = false;
    static constexpr float shift = 14;
};
struct Int8Int4 {
    static constexpr bool near = true;
    static constexpr bool affine = true;
    static constexpr float shift = 14;
    static __device__ size_t page_bytes(int width) { return int8_int4_page_bytes(width); }
    static __device__ uint32_t key_bytes(int width) { return HEADER_BYTES + NORMS_BYTES + 68 * width; }
    static __device__ uint32_t value_bytes(int width) { return 32 * width + 4 * PAGE * num_groups(width); }
    static constexpr uint32_t norms_offset = HEADER_BYTES;
};
struct Fp8 {
    static constexpr bool near = true;
    static constexpr bool affine = false;
    static constexpr float shift = 8;
    static __device__ size_t page_bytes(int width) { return fp8_page_bytes(width); }
    static __device__ uint32_t key_bytes(int width) { return 2 * HEADER_BYTES + NORMS_BYTES + 64 * width; }
    static __device__ uint32_t value_bytes(int width) { return 64 * width; }
    static constexpr uint32_t norms_offset = 2 * HEADER_BYTES;
};

// What is fixed for a warp's walk through its pages.
template <int W> struct Walk {
    Shared<uint8_t> keys, values;         // this warp's buffers
    Shared<float> query;                  // [W/16][32 lanes][4 channels] query / 2^e, largest in [1, 2)
    Shared<uint32_t> query_halves;        // [W/16][32 lanes][high 2, low 2] the same times 2^12
    Shared<float> facts;                  // [8] 2^e log2(e) / sqrt(d), [8] norm of the scaled query
    uint32_t first_query, num_queries;
};

// A piece of work: a near page, or 32 tokens of an exact one.
struct Piece {
    uint32_t place, entry, half;  // place in the list, what stands there, and which 32 tokens
};

// Largest power of two not above `x`; 1 for 0.
static __device__ inline float power_below(float x) {
    uint32_t bits = __float_as_uint(x) & 0x7f800000u;
    return bits == 0 ? 1.0f : __uint_as_float(bits);
}

// Puts this block's queries into shared memory in both forms.
template <int W> static __device__ void load_queries(const DecodeArguments &arguments, const Walk<W> &walk, uint32_t kv_head) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t n = warp; n < QUERIES; n += DECODE_WARPS) {
        bool real = n < walk.num_queries;
        const float *query = arguments.queries + ((size_t)kv_head * arguments.group + walk.first_query + n) * arguments.head_dim;
        float largest = 0;
        for (uint32_t c = lane; real && c < arguments.head_dim; c += 32) largest = fmaxf(largest, fabsf(query[c]));
        float power = power_below(warp_max(largest));
        float squares = 0;
        for (uint32_t c = lane; c < W; c += 32) {
            float x = real && c < arguments.head_dim ? query[c] / power : 0.0f;
            squares = fmaf(x, x, squares);
            uint32_t at = c / 16 * 32 + n * 4 + c % 16 / 4;
            walk.query[at * 4 + c % 4] = x;
        }
        squares = warp_sum(squares);
        if (lane == 0) {
            walk.facts[n] = power * LOG2_E / sqrtf((float)arguments.head_dim);
            walk.facts[QUERIES + n] = sqrtf(squares) * ROUNDED_UP;
        }
    }
    __syncthreads();
    for (uint32_t at = threadIdx.x; at < W / 16 * 32; at += blockDim.x) {
        float4 x = walk.query.template read<float4>(at * 4);
        uint4 halves;
        split_pair(x.x * 4096.0f, x.y * 4096.0f, halves.x, halves.z);
        split_pair(x.z * 4096.0f, x.w * 4096.0f, halves.y, halves.w);
        walk.query_halves.template write<uint4>(at * 4, halves);
    }
    __syncthreads();
}

// Scores of 32 tokens of an exact page.
template <int W> static __device__ void exact_scores(const Walk<W> &walk, float (&scores)[2][4]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < W / 16; step++) {
        uint4 query = walk.query_halves.template read<uint4>((step * 32 + lane) * 4);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint4 keys = walk.keys.template read<uint4>(NORMS_BYTES + ((tile * (W / 16) + step) * 32 + lane) * 16);
            const unsigned left[4] = {keys.x, keys.z, keys.y, keys.w};
            multiply_add(scores[tile], left, query.x, query.y);
            multiply_add(scores[tile], left, query.z, query.w);
        }
    }
    float factors[2] = {walk.facts[lane % 4 * 2], walk.facts[lane % 4 * 2 + 1]};
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[tile][i] *= factors[i % 2] / 4096.0f;
}

// Value of query `n` = lane / 4, complete in every j, for the lane's queries 2j and 2j + 1.
static __device__ inline void to_columns(float value, float (&columns)[2]) {
    int j = threadIdx.x % 4;
    columns[0] = __shfl_sync(all_lanes, value, j * 8);
    columns[1] = __shfl_sync(all_lanes, value, j * 8 + 4);
}
static __device__ inline float sum_over_j(float value) {
    value += __shfl_xor_sync(all_lanes, value, 1);
    return value + __shfl_xor_sync(all_lanes, value, 2);
}

// Scores of a page of INT8 keys and Delta, the lesser of
//   (1/2) sum_c |q_c| scale_c / sqrt(d)   and   norm(q) max_t norm(k_t - khat_t) / sqrt(d),
// and the rounding of these scores and of the exact page's beside it: both sum products of at most |q_c| (|zero_c| + 255 scale_c).
template <int W> static __device__ void near_scores(const Walk<W> &walk, float (&scores)[4][4], PageError &error, float, Int8Int4) {
    int lane = threadIdx.x % 32;
    float4 header = walk.keys.template read<float4>(0);
    float power = 4096.0f / power_below(header.z);
    float scales = 0, offset = 0, zeros = 0, squares = 0;
    constexpr uint32_t scale_at = HEADER_BYTES + NORMS_BYTES, zero_at = scale_at + 2 * W, codes_at = zero_at + 2 * W;
    // Wide heads keep most registers for the output.
#pragma unroll(W > 128 ? 2 : 4)
    for (int step = 0; step < W / 16; step++) {
        float4 query = walk.query.template read<float4>((step * 32 + lane) * 4);
        uint2 scale_bits = walk.keys.template read<uint2>(scale_at + step * 32 + lane % 4 * 8);
        uint2 zero_bits = walk.keys.template read<uint2>(zero_at + step * 32 + lane % 4 * 8);
        float2 scale0 = __half22float2(bits_half2(scale_bits.x)), scale1 = __half22float2(bits_half2(scale_bits.y));
        float2 zero0 = __half22float2(bits_half2(zero_bits.x)), zero1 = __half22float2(bits_half2(zero_bits.y));
        float scaled[4] = {query.x * scale0.x, query.y * scale0.y, query.z * scale1.x, query.w * scale1.y};
        float zeroed[4] = {query.x * zero0.x, query.y * zero0.y, query.z * zero1.x, query.w * zero1.y};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            scales += fabsf(scaled[c]);
            squares = fmaf(scaled[c], scaled[c], squares);
            zeros += fabsf(zeroed[c]);
            offset += fmaf(128.0f, scaled[c], zeroed[c]);
        }
        uint32_t high0, low0, high1, low1;
        split_pair(scaled[0] * power, scaled[1] * power, high0, low0);
        split_pair(scaled[2] * power, scaled[3] * power, high1, low1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 codes = walk.keys.template read<uint4>(codes_at + ((half * (W / 16) + step) * 32 + lane) * 16);
            unsigned left[4];
            unpack_bytes(codes.x, left[0], left[2]);
            unpack_bytes(codes.y, left[1], left[3]);
            multiply_add(scores[2 * half], left, high0, high1);
            multiply_add(scores[2 * half], left, low0, low1);
            unpack_bytes(codes.z, left[0], left[2]);
            unpack_bytes(codes.w, left[1], left[3]);
            multiply_add(scores[2 * half + 1], left, high0, high1);
            multiply_add(scores[2 * half + 1], left, low0, low1);
        }
    }
    scales = sum_over_j(scales);
    offset = sum_over_j(offset);
    zeros = sum_over_j(zeros);
    // The ball alone knows of numbers that were not finite.
    float ball = walk.facts[QUERIES + lane / 4] * header.x;
    float delta = ball < 3e38f ? fminf(0.501f * scales, ball) : INFINITY;
    float rounding = (W + 16) * EPSILON * (2.0f * zeros + 512.0f * scales) + W * header.z * (1.0f / (1 << 30));
    to_columns(delta + rounding, error.delta_bits);
    to_columns(sum_over_j(squares) / 12.0f, error.variance);
    float offsets[2];
    to_columns(offset, offsets);
    float unscale = 1.0f / power;
#pragma unroll
    for (int q = 0; q < 2; q++) {
        float factor = walk.facts[lane % 4 * 2 + q];
        error.delta_bits[q] = fmaf(error.delta_bits[q], factor * ROUNDED_UP, 1e-6f);
        error.variance[q] *= factor * LN_2 * factor * LN_2;
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            scores[tile][q] = fmaf(scores[tile][q], unscale, offsets[q]) * factor;
            scores[tile][q + 2] = fmaf(scores[tile][q + 2], unscale, offsets[q]) * factor;
        }
    }
    error.value_error = header.y;
    error.value_mean_square = header.w;
    error.value_factor = 1;
}

// Scores of a page of FP8 keys; Delta from the norm of the key error alone. Rounding: |khat_c| <= 448 scale, |q_c| sum <= sqrt(W) norm(q).
template <int W> static __device__ void near_scores(const Walk<W> &walk, float (&scores)[4][4], PageError &error, float head_dim, Fp8) {
    int lane = threadIdx.x % 32;
    float4 header = walk.keys.template read<float4>(0);
    constexpr uint32_t codes_at = 2 * HEADER_BYTES + NORMS_BYTES;
#pragma unroll
    for (int step = 0; step < W / 16; step++) {
        uint4 query = walk.query_halves.template read<uint4>((step * 32 + lane) * 4);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 codes = walk.keys.template read<uint4>(codes_at + ((half * (W / 16) + step) * 32 + lane) * 16);
            unsigned left[4];
            unpack_e4m3(codes.x, left[0], left[2]);
            unpack_e4m3(codes.y, left[1], left[3]);
            multiply_add(scores[2 * half], left, query.x, query.y);
            multiply_add(scores[2 * half], left, query.z, query.w);
            unpack_e4m3(codes.z, left[0], left[2]);
            unpack_e4m3(codes.w, left[1], left[3]);
            multiply_add(scores[2 * half + 1], left, query.x, query.y);
            multiply_add(scores[2 * half + 1], left, query.z, query.w);
        }
    }
    float scale = header.z * (256.0f / 4096.0f);
    float rounding = 2 * (W + 16) * EPSILON * 450.0f * header.z * 16.0f;
#pragma unroll
    for (int q = 0; q < 2; q++) {
        float factor = walk.facts[lane % 4 * 2 + q], norm = walk.facts[QUERIES + lane % 4 * 2 + q];
        error.delta_bits[q] = fmaf(norm * (header.x + rounding), factor * ROUNDED_UP, 1e-6f);
        // Errors without a direction of their own.
        error.variance[q] = norm * factor * LN_2 * norm * factor * LN_2 * walk.keys.template read<float>(20) / head_dim;
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            scores[tile][q] *= scale * factor;
            scores[tile][q + 2] *= scale * factor;
        }
    }
    error.value_error = header.y;
    error.value_mean_square = header.w;
    error.value_factor = walk.keys.template read<float>(16);
}

// Takes the scores of a piece (16 TILES tokens, of which `tokens` are there) into the state and gives the weights as operands.
// Shared by all lanes of a column (equal j): maximum, PageError. Near pages are whole; pieces of exact ones have 2 tiles.
template <int TILES, int W>
static __device__ PieceSums soften(const Walk<W> &walk, DecodeState<W> &state, float (&scores)[TILES][4], WeightTile (&weights)[TILES],
                                   const PageError &error, uint32_t norms_at, uint32_t tokens, float shift) {
    constexpr bool exact = TILES == 2;
    PieceSums sums;
    int lane = threadIdx.x % 32, r = lane / 4;
    float norms[TILES][2], factor[2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            uint32_t token = tile * 16 + lower * 8 + r;
            bool there = !exact || token < tokens;
            norms[tile][lower] = there ? __half2float(walk.keys.template read<__half>(norms_at + 2 * token)) : 0.0f;
            if (!there) scores[tile][2 * lower] = scores[tile][2 * lower + 1] = -INFINITY;
        }
#pragma unroll
    for (int q = 0; q < 2; q++) {
        float largest = -INFINITY;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) largest = fmaxf(largest, fmaxf(scores[tile][q], scores[tile][q + 2]));
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, offset));
        float maximum = fmaxf(state.maximum[q], largest - shift);
        factor[q] = fast_exp2(state.maximum[q] - maximum);
        state.maximum[q] = maximum;
        float mass = 0, squares = 0, second = 0;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int lower = 0; lower < 2; lower++) {
                float weight = fast_exp2(scores[tile][q + 2 * lower] - maximum);
                float norm = norms[tile][lower];
                scores[tile][q + 2 * lower] = weight;
                mass += weight;
                squares = fmaf(weight * norm, norm, squares);
                second = fmaf(weight, weight, second);
            }
        state.mass[q] = fmaf(state.mass[q], factor[q], mass);
        state.norm_squares[q] = fmaf(state.norm_squares[q], factor[q], squares);
        sums.mass[q] = mass;
        sums.norms[q] = squares;
        sums.squares[q] = second;
        float low = mass, value_term = 0, key_squares = 0, meter_values = 0, meter_keys = 0;
        if constexpr (!exact) {
            float raised = fast_exp2(error.delta_bits[q]) * (1.0f + 1e-6f), excess = raised - 1.0f;
            low = mass * fast_exp2(-error.delta_bits[q]) * (1.0f - 1e-6f);
            // Decoded values round to halves: 2^-11 of each, norm by norm at most sqrt(mass * squares), and 2^-25 near zero.
            float rounded = fmaf(error.value_error + 5e-7f, mass, 4.9e-4f * sqrtf(mass * squares));
            value_term = raised * rounded;
            key_squares = excess * excess * mass;
            meter_values = error.value_mean_square * second;
            meter_keys = error.variance[q] * second;
        }
        state.mass_low[q] = fmaf(state.mass_low[q], factor[q], low);
        state.value_term[q] = fmaf(state.value_term[q], factor[q], value_term);
        state.key_squares[q] = fmaf(state.key_squares[q], factor[q], key_squares);
        state.meter_values[q] = fmaf(state.meter_values[q], factor[q] * factor[q], meter_values);
        state.meter_keys[q] = fmaf(state.meter_keys[q], factor[q] * factor[q], meter_keys);
    }
    if (__any_sync(all_lanes, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int tile = 0; tile < W / 16; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) state.output[tile][i] *= factor[i % 2];
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            uint32_t high, low;
            split_pair(scores[tile][2 * lower] * error.value_factor, scores[tile][2 * lower + 1] * error.value_factor, high, low);
            weights[tile].high[lower] = transpose_tile(high);
            weights[tile].low[lower] = transpose_tile(low);
        }
    return sums;
}

// Adds 32 tokens of exact values; what lies behind the last token may be anything, so it is blotted out.
template <int W>
static __device__ void exact_output(const Walk<W> &walk, DecodeState<W> &state, const WeightTile (&weights)[2], uint32_t tokens) {
    int lane = threadIdx.x % 32, j = lane % 4;
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        uint32_t mask[2];
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t token = tile * 16 + pair * 8 + 2 * j;
            mask[pair] = token + 1 < tokens ? 0xffffffffu : token < tokens ? 0xffffu : 0;
        }
#pragma unroll
        for (int step = 0; step < W / 16; step++) {
            uint4 values = walk.values.template read<uint4>(((tile * (W / 16) + step) * 32 + lane) * 16);
            const unsigned left[4] = {values.x & mask[0], values.y & mask[0], values.z & mask[1], values.w & mask[1]};
            multiply_add(state.output[step], left, weights[tile].high[0], weights[tile].high[1]);
            multiply_add(state.output[step], left, weights[tile].low[0], weights[tile].low[1]);
        }
    }
}

template <int W> static __device__ void near_output(const Walk<W> &walk, DecodeState<W> &state, const WeightTile (&weights)[4], Int8Int4) {
    int lane = threadIdx.x % 32, j = lane % 4;
#pragma unroll
    for (int group = 0; group < num_groups(W); group++) {
        __half2 scale[8], zero[8];
        uint32_t at = 32 * W + group * 4 * PAGE + j * 32;
        // Keeps the compiler from loading far ahead, which spills.
        if (W > 128) __syncwarp();
#pragma unroll
        for (int part = 0; part < 2; part++) {
            uint4 scales = walk.values.template read<uint4>(at + part * 16), zeros = walk.values.template read<uint4>(at + 2 * PAGE + part * 16);
            scale[4 * part] = bits_half2(scales.x), scale[4 * part + 1] = bits_half2(scales.y);
            scale[4 * part + 2] = bits_half2(scales.z), scale[4 * part + 3] = bits_half2(scales.w);
            zero[4 * part] = bits_half2(zeros.x), zero[4 * part + 1] = bits_half2(zeros.y);
            zero[4 * part + 2] = bits_half2(zeros.z), zero[4 * part + 3] = bits_half2(zeros.w);
        }
#pragma unroll
        for (int step = 2 * group; step < W / 16 && step < 2 * group + 2; step++) {
            uint4 packed = walk.values.template read<uint4>((step * 32 + lane) * 16);
            const uint32_t codes[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                unsigned left[4];
                value_operand(left, codes[tile], scale, zero, tile);
                multiply_add(state.output[step], left, weights[tile].high[0], weights[tile].high[1]);
                multiply_add(state.output[step], left, weights[tile].low[0], weights[tile].low[1]);
            }
        }
    }
}

template <int W> static __device__ void near_output(const Walk<W> &walk, DecodeState<W> &state, const WeightTile (&weights)[4], Fp8) {
    int lane = threadIdx.x % 32;
    const __half2 whole = __float2half2_rn(256.0f);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int step = 0; step < W / 16; step++) {
            uint4 packed = walk.values.template read<uint4>(((half * (W / 16) + step) * 32 + lane) * 16);
            const uint32_t codes[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
            for (int part = 0; part < 2; part++) {
                unsigned left[4];
                unpack_e4m3(codes[2 * part], left[0], left[1]);
                unpack_e4m3(codes[2 * part + 1], left[2], left[3]);
#pragma unroll
                for (int i = 0; i < 4; i++) left[i] = half2_bits(__hmul2(bits_half2(left[i]), whole));
                const WeightTile &weight = weights[2 * half + part];
                multiply_add(state.output[step], left, weight.high[0], weight.high[1]);
                multiply_add(state.output[step], left, weight.low[0], weight.low[1]);
            }
        }
}

// Sum over the lanes of a column.
static __device__ inline float sum_over_r(float value) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) value += __shfl_xor_sync(all_lanes, value, offset);
    return value;
}

// Writes what recovery wants to know of a page; the second piece of an exact one adds to what this lane wrote for the first.
template <int W>
static __device__ void write_page_facts(const DecodeArguments &arguments, const Walk<W> &walk, const DecodeState<W> &state,
                                        const PieceSums &sums, const PageError &error, uint32_t kv_head, Piece piece) {
    if (!arguments.page_facts) return;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int q = 0; q < 2; q++) {
        float mass = sum_over_r(sums.mass[q]), norms = sum_over_r(sums.norms[q]), squares = sum_over_r(sums.squares[q]);
        uint32_t query = lane % 4 * 2 + q;
        if (lane >= 4 || query >= walk.num_queries) continue;
        size_t head = (size_t)kv_head * arguments.group + walk.first_query + query;
        float4 *facts = (float4 *)(arguments.page_facts + (head * arguments.list_stride + piece.place) * PAGE_FACTS);
        if (piece.half == 1) {
            float4 first = facts[0];
            float before = exp2f(first.x * LOG2_E - state.maximum[q]);
            mass += before;
            norms = fmaf(before, first.z, norms);
        }
        facts[0] = {(state.maximum[q] + log2f(mass)) * LN_2, error.delta_bits[q] * LN_2, mass > 0 ? norms / mass : 0.0f, error.value_error};
        bool near = !(piece.entry & EXACT);
        facts[1] = {near && mass > 0 ? squares / (mass * mass) : 0.0f, error.variance[q], error.value_mean_square, 0.0f};
    }
}

// The warps' states become the block's: [4 warps][8 queries] rows of FLOATS in shared memory, then one row per query in `partials`.
template <int W>
static __device__ void merge_warps(const DecodeArguments &arguments, const Walk<W> &walk, const DecodeState<W> &state, Shared<float> rows,
                                   uint32_t kv_head) {
    constexpr int FLOATS = Shapes<W>::FLOATS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4;
    __syncthreads();
#pragma unroll
    for (int q = 0; q < 2; q++) {
        Shared<float> row = rows + (warp * QUERIES + lane % 4 * 2 + q) * FLOATS;
        float mass = sum_over_r(state.mass[q]), norm_squares = sum_over_r(state.norm_squares[q]), low = sum_over_r(state.mass_low[q]);
        float value_term = sum_over_r(state.value_term[q]), key_squares = sum_over_r(state.key_squares[q]);
        float meter_values = sum_over_r(state.meter_values[q]), meter_keys = sum_over_r(state.meter_keys[q]);
        if (r == 0) {
            row[0] = state.maximum[q];
            row[1] = mass;
            row[2] = norm_squares;
            row[3] = low;
            row[4] = value_term;
            row[5] = key_squares;
            row[6] = meter_values;
            row[7] = meter_keys;
        }
#pragma unroll
        for (int tile = 0; tile < W / 16; tile++) {
            row[PARTIAL_HEAD + tile * 16 + r] = state.output[tile][q];
            row[PARTIAL_HEAD + tile * 16 + r + 8] = state.output[tile][q + 2];
        }
    }
    __syncthreads();
    for (uint32_t query = warp; query < walk.num_queries; query += DECODE_WARPS) {
        float maximum = -INFINITY, factors[DECODE_WARPS];
#pragma unroll
        for (int other = 0; other < DECODE_WARPS; other++) maximum = fmaxf(maximum, rows[(other * QUERIES + query) * FLOATS]);
#pragma unroll
        for (int other = 0; other < DECODE_WARPS; other++) {
            float own = rows[(other * QUERIES + query) * FLOATS];
            factors[other] = own == -INFINITY ? 0.0f : fast_exp2(own - maximum);
        }
        size_t head = (size_t)kv_head * arguments.group + walk.first_query + query;
        float *partial = arguments.partials + (head * gridDim.x + blockIdx.x) * FLOATS;
        for (int at = lane; at < FLOATS; at += 32) {
            float sum = 0;
            bool squared = at == 6 || at == 7;
#pragma unroll
            for (int other = 0; other < DECODE_WARPS; other++)
                sum = fmaf(squared ? factors[other] * factors[other] : factors[other], (float)rows[(other * QUERIES + query) * FLOATS + at], sum);
            partial[at] = at == 0 ? maximum : sum;
        }
    }
}

// Grid [splits, kv_heads, ceil(group / 8)], block of 128, Shapes<W>::SHARED_BYTES of shared memory.
template <int W, class Near> static __device__ void decode_attention(const DecodeArguments &arguments) {
    using S = Shapes<W>;
    int warp = threadIdx.x / 32;
    uint32_t kv_head = blockIdx.y;
    Shared<uint8_t> buffers = dynamic_shared<uint8_t>(0, S::SHARED_BYTES);
    Walk<W> walk = {buffers + S::WARPS_OFFSET + warp * S::WARP_BYTES,
                    buffers + S::WARPS_OFFSET + warp * S::WARP_BYTES + S::KEY_BYTES,
                    buffers.as<float>(),
                    (buffers + 32 * W).template as<uint32_t>(),
                    (buffers + S::FACTS_OFFSET).template as<float>(),
                    blockIdx.z * QUERIES,
                    min(arguments.group - blockIdx.z * QUERIES, (uint32_t)QUERIES)};
    const uint32_t *list = arguments.lists + (size_t)kv_head * arguments.list_stride;
    uint32_t length = arguments.list_lengths[kv_head];
    uint32_t share = (length + gridDim.x - 1) / gridDim.x;
    uint32_t end = min(length, (blockIdx.x + 1) * share);

    auto tokens_of = [&](Piece piece) {
        uint32_t tokens = piece.place + 1 == length ? arguments.last_tokens : PAGE;
        return min(tokens - 32 * piece.half, 32u);
    };
    auto next = [&](Piece piece) {
        bool second = piece.entry & EXACT && piece.half == 0 && (piece.place + 1 < length || arguments.last_tokens > 32);
        if (second) return Piece{piece.place, piece.entry, 1};
        uint32_t place = piece.place + DECODE_WARPS;
        return Piece{place, place < end ? list[place] : 0, 0};
    };
    auto copy_keys = [&](Piece piece) {
        if (piece.place < end) {
            uint32_t slot = piece.entry & ~EXACT;
            if (!Near::near || piece.entry & EXACT) {
                const uint8_t *page = arguments.exact_pages + slot * exact_page_bytes(W);
                copy_async(walk.keys, 0, page, NORMS_BYTES);
                copy_async(walk.keys, NORMS_BYTES, page + NORMS_BYTES + piece.half * 64 * W, 64 * W);
            } else if constexpr (Near::near) {
                copy_async(walk.keys, 0, arguments.near_pages + slot * Near::page_bytes(W), Near::key_bytes(W));
            }
        }
        cp_async_commit();
    };
    auto copy_values = [&](Piece piece) {
        if (piece.place < end) {
            uint32_t slot = piece.entry & ~EXACT;
            if (!Near::near || piece.entry & EXACT) {
                const uint8_t *page = arguments.exact_pages + slot * exact_page_bytes(W) + NORMS_BYTES + 128 * W;
                copy_async(walk.values, 0, page + piece.half * 64 * W, 64 * W);
            } else if constexpr (Near::near) {
                const uint8_t *page = arguments.near_pages + slot * Near::page_bytes(W) + Near::key_bytes(W);
                copy_async(walk.values, 0, page, Near::value_bytes(W));
            }
        }
        cp_async_commit();
    };

    uint32_t first = blockIdx.x * share + warp;
    Piece piece = {first, first < end ? list[first] : 0, 0};
    copy_keys(piece);
    copy_values(piece);
    load_queries<W>(arguments, walk, kv_head);
    DecodeState<W> state;
    state.clear();
    while (piece.place < end) {
        // Asked for now: the entry is there when the copy needs it.
        Piece following = next(piece);
        PageError error = {{0, 0}, {0, 0}, 0, 0, 1};
        cp_async_wait<1>();
        __syncwarp();
        if (!Near::near || piece.entry & EXACT) {
            float scores[2][4] = {};
            WeightTile weights[2];
            exact_scores<W>(walk, scores);
            PieceSums sums = soften<2, W>(walk, state, scores, weights, error, 64 * piece.half, tokens_of(piece), Near::shift);
            write_page_facts<W>(arguments, walk, state, sums, error, kv_head, piece);
            __syncwarp();
            copy_keys(following);
            cp_async_wait<1>();
            __syncwarp();
            exact_output<W>(walk, state, weights, tokens_of(piece));
        } else if constexpr (Near::near) {
            float scores[4][4] = {};
            WeightTile weights[4];
            near_scores<W>(walk, scores, error, (float)arguments.head_dim, Near{});
            PieceSums sums = soften<4, W>(walk, state, scores, weights, error, Near::norms_offset, PAGE, Near::shift);
            write_page_facts<W>(arguments, walk, state, sums, error, kv_head, piece);
            __syncwarp();
            copy_keys(following);
            cp_async_wait<1>();
            __syncwarp();
            near_output<W>(walk, state, weights, Near{});
        }
        __syncwarp();
        copy_values(following);
        piece = following;
    }
    cp_async_wait<0>();
    merge_warps<W>(arguments, walk, state, (buffers + S::WARPS_OFFSET).template as<float>(), kv_head);
}

// A kernel of this kind; the line after it registers it.
#define DECODE(name, width, near)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * DECODE_WARPS, decode_blocks(width))                                                       \
        name(const float *queries, const uint8_t *exact_pages, const uint8_t *near_pages, const uint32_t *lists,                             \
             const uint32_t *list_lengths, float *partials, float *page_facts, uint32_t last_tokens, uint32_t list_stride, uint32_t group,   \
             uint32_t head_dim) {                                                                                                            \
        decode_attention<width, near>({queries, exact_pages, near_pages, lists, list_lengths, partials, page_facts, last_tokens,             \
                                       list_stride, group, head_dim});                                                                       \
    }
