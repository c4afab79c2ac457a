// Attention of many query tokens at once, in tiles: the queries of one page (64 positions, one head) against one page of keys at a time,
// over the pages that the tile's mask lets through. Dao et al. 2022 (FlashAttention), arXiv:2205.14135.
//
// A query sees earlier pages as the near tier has them (or exact, as the table says) and its own page exact and causally, as decoding
// does. Each of the 4 warps has 16 queries; queries are the left operand, pages the right one, in halves, summed in f32.
#pragma once

#include "attention_tile.cuh"

constexpr int PREFILL_WARPS = 4;
constexpr float PREFILL_SHIFT = 8;
constexpr float LOG2_E = 1.4426950408889634f;

struct PrefillArguments {
    const float *queries;      // [rows, heads, head_dim], of consecutive positions from first_position
    const uint8_t *exact_pages, *near_pages;
    const uint32_t *table;     // [kv_heads, table_stride] entries of pages 0, 1, ...
    const uint32_t *own;       // [kv_heads, own_stride] exact slots of the pages of these rows, from the page of the first row
    const uint32_t *masks;     // [kv_heads, tiles, mask_words] bit p: some row of the tile reads page p; null: all read all pages
    const uint32_t *row_masks; // [rows, kv_heads, mask_words] bit p: the row reads page p; null: what its tile reads
    float *output;             // [rows, heads, head_dim]
    uint32_t rows, first_position, table_stride, own_stride, mask_words, group, head_dim;
};

template <int W> struct PrefillShapes {
    static constexpr int QUERY_BYTES = 128 * W;
    static constexpr int KEY_BYTES = HEADER_BYTES + NORMS_BYTES + 128 * W;
    static constexpr int VALUE_BYTES = 128 * W;
    static constexpr int SHARED_BYTES = QUERY_BYTES + KEY_BYTES + VALUE_BYTES;
};

// How pages of each kind lie in their two copies, and how 16 x 16 tiles of them become operands (registers in the order of page.cuh).
struct ExactPages {
    static __device__ size_t page_bytes(int width) { return exact_page_bytes(width); }
    static __device__ uint32_t key_bytes(int width) { return NORMS_BYTES + 128 * width; }
    static __device__ uint32_t value_bytes(int width) { return 128 * width; }
    static __device__ float key_factor(Shared<uint8_t>) { return 1; }
    static __device__ float value_factor(Shared<uint8_t>) { return 1; }

    // Channels 16 step ..: four registers for tokens r and r + 8 of each of the 4 token tiles.
    template <int W> static __device__ void keys(Shared<uint8_t> page, int step, uint32_t (&tiles)[4][4]) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            uint4 bits = page.read<uint4>(NORMS_BYTES + ((tile * (W / 16) + step) * 32 + lane) * 16);
            tiles[tile][0] = bits.x, tiles[tile][1] = bits.y, tiles[tile][2] = bits.z, tiles[tile][3] = bits.w;
        }
    }
    template <int W> static __device__ void values(Shared<uint8_t> page, int step, uint32_t (&tiles)[4][4]) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            uint4 bits = page.read<uint4>(((tile * (W / 16) + step) * 32 + lane) * 16);
            tiles[tile][0] = bits.x, tiles[tile][1] = bits.y, tiles[tile][2] = bits.z, tiles[tile][3] = bits.w;
        }
    }
};

struct Int8Int4Pages {
    static __device__ size_t page_bytes(int width) { return int8_int4_page_bytes(width); }
    static __device__ uint32_t key_bytes(int width) { return HEADER_BYTES + NORMS_BYTES + 68 * width; }
    static __device__ uint32_t value_bytes(int width) { return 32 * width + 4 * PAGE * num_groups(width); }
    static __device__ float key_factor(Shared<uint8_t>) { return 1; }
    static __device__ float value_factor(Shared<uint8_t>) { return 1; }

    template <int W> static __device__ void keys(Shared<uint8_t> page, int step, uint32_t (&tiles)[4][4]) {
        int lane = threadIdx.x % 32;
        uint2 scales = page.read<uint2>(HEADER_BYTES + NORMS_BYTES + step * 32 + lane % 4 * 8);
        uint2 zeros = page.read<uint2>(HEADER_BYTES + NORMS_BYTES + 2 * W + step * 32 + lane % 4 * 8);
        const __half2 scale[2] = {bits_half2(scales.x), bits_half2(scales.y)}, zero[2] = {bits_half2(zeros.x), bits_half2(zeros.y)};
        const __half2 bias = __float2half2_rn(1024.0f);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 packed = page.read<uint4>(HEADER_BYTES + NORMS_BYTES + 4 * W + ((half * (W / 16) + step) * 32 + lane) * 16);
            const uint32_t codes[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
            for (int row = 0; row < 4; row++) {
                __half2 first = __hsub2(bits_half2(__byte_perm(codes[row], 0x64646464u, 0x4140)), bias);
                __half2 second = __hsub2(bits_half2(__byte_perm(codes[row], 0x64646464u, 0x4342)), bias);
                tiles[2 * half + row / 2][row % 2 * 2] = half2_bits(__hfma2(first, scale[0], zero[0]));
                tiles[2 * half + row / 2][row % 2 * 2 + 1] = half2_bits(__hfma2(second, scale[1], zero[1]));
            }
        }
    }
    template <int W> static __device__ void values(Shared<uint8_t> page, int step, uint32_t (&tiles)[4][4]) {
        int lane = threadIdx.x % 32, j = lane % 4;
        __half2 scale[8], zero[8];
        uint32_t at = 32 * W + step / 2 * 4 * PAGE + j * 32;
#pragma unroll
        for (int eight = 0; eight < 8; eight++) {
            scale[eight] = bits_half2(page.read<uint32_t>(at + 4 * eight));
            zero[eight] = bits_half2(page.read<uint32_t>(at + 2 * PAGE + 4 * eight));
        }
        uint4 packed = page.read<uint4>((step * 32 + lane) * 16);
        const uint32_t codes[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int tile = 0; tile < 4; tile++) value_operand(tiles[tile], codes[tile], scale, zero, tile);
    }
};

struct Fp8Pages {
    static __device__ size_t page_bytes(int width) { return fp8_page_bytes(width); }
    static __device__ uint32_t key_bytes(int width) { return 2 * HEADER_BYTES + NORMS_BYTES + 64 * width; }
    static __device__ uint32_t value_bytes(int width) { return 64 * width; }
    static __device__ float key_factor(Shared<uint8_t> page) { return page.read<float>(8) * 256.0f; }
    static __device__ float value_factor(Shared<uint8_t> page) { return page.read<float>(16); }

    template <int W> static __device__ void keys(Shared<uint8_t> page, int step, uint32_t (&tiles)[4][4]) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 packed = page.read<uint4>(2 * HEADER_BYTES + NORMS_BYTES + ((half * (W / 16) + step) * 32 + lane) * 16);
            const uint32_t codes[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
            for (int row = 0; row < 4; row++) {
                uint32_t(&tile)[4] = tiles[2 * half + row / 2];
                unpack_e4m3(codes[row], tile[row % 2 * 2], tile[row % 2 * 2 + 1]);
            }
        }
    }
    template <int W> static __device__ void values(Shared<uint8_t> page, int step, uint32_t (&tiles)[4][4]) {
        int lane = threadIdx.x % 32;
        const __half2 whole = __float2half2_rn(256.0f);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 packed = page.read<uint4>(((half * (W / 16) + step) * 32 + lane) * 16);
            const uint32_t codes[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                uint32_t(&tile)[4] = tiles[2 * half + pair / 2];
                uint32_t first, second;
                unpack_e4m3(codes[pair], first, second);
                tile[pair % 2 * 2] = half2_bits(__hmul2(bits_half2(first), whole));
                tile[pair % 2 * 2 + 1] = half2_bits(__hmul2(bits_half2(second), whole));
            }
        }
    }
};

// The softmax of 16 queries in one warp: rows r and r + 8, channels 8 tile + 2j, 2j + 1.
template <int W> struct PrefillState {
    float maximum[2], mass[2], output[W / 8][4];
};

// One page against the warp's queries. `own`: rows see tokens up to their own only, and later tokens may hold anything.
template <int W, class Pages>
static __device__ void prefill_scores(Shared<uint8_t> queries, Shared<uint8_t> keys, float (&scores)[8][4], float scale) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < 8; tile++) scores[tile][0] = scores[tile][1] = scores[tile][2] = scores[tile][3] = 0;
#pragma unroll
    for (int step = 0; step < W / 16; step++) {
        uint4 bits = queries.read<uint4>((step * 32 + lane) * 16);
        const unsigned left[4] = {bits.x, bits.y, bits.z, bits.w};
        uint32_t tiles[4][4];
        Pages::template keys<W>(keys, step, tiles);
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            multiply_add(scores[2 * tile], left, tiles[tile][0], tiles[tile][1]);
            multiply_add(scores[2 * tile + 1], left, tiles[tile][2], tiles[tile][3]);
        }
    }
    float factor = scale * Pages::key_factor(keys);
#pragma unroll
    for (int tile = 0; tile < 8; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[tile][i] *= factor;
}

// Takes a page's scores into the state; the weights come back as left operands of the four token tiles.
template <int W>
static __device__ void prefill_soften(PrefillState<W> &state, float (&scores)[8][4], uint32_t (&weights)[4][4], float value_factor, bool own,
                                      const bool (&reads)[2]) {
    int lane = threadIdx.x % 32, r = lane / 4, j = lane % 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        int row = warp * 16 + lower * 8 + r;
        float largest = -INFINITY;
#pragma unroll
        for (int tile = 0; tile < 8; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &score = scores[tile][2 * lower + i];
                if (!reads[lower] || (own && tile * 8 + 2 * j + i > row)) score = -INFINITY;
                largest = fmaxf(largest, score);
            }
        largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, 2));
        float maximum = fmaxf(state.maximum[lower], largest - PREFILL_SHIFT), mass = 0;
        // A row that has not read anything yet has no maximum.
        float origin = maximum == -INFINITY ? 0.0f : maximum;
        float factor = fast_exp2(state.maximum[lower] - origin);
        state.maximum[lower] = maximum;
#pragma unroll
        for (int tile = 0; tile < 8; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float weight = fast_exp2(scores[tile][2 * lower + i] - origin);
                scores[tile][2 * lower + i] = weight * value_factor;
                mass += weight;
            }
        state.mass[lower] = fmaf(state.mass[lower], factor, mass);
#pragma unroll
        for (int tile = 0; tile < W / 8; tile++) {
            state.output[tile][2 * lower] *= factor;
            state.output[tile][2 * lower + 1] *= factor;
        }
    }
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const float(&from)[4] = scores[2 * tile + part / 2];
            weights[tile][part] = half2_bits(__floats2half2_rn(from[part % 2 * 2], from[part % 2 * 2 + 1]));
        }
}

template <int W, class Pages>
static __device__ void prefill_output(PrefillState<W> &state, const uint32_t (&weights)[4][4], Shared<uint8_t> values, uint32_t tokens) {
    int j = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < W / 16; step++) {
        uint32_t tiles[4][4];
        Pages::template values<W>(values, step, tiles);
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            if (tokens < PAGE) {
                // What lies behind the last token may be anything: blotted out.
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    uint32_t token = tile * 16 + part / 2 * 8 + 2 * j;
                    tiles[tile][part] &= token + 1 < tokens ? 0xffffffffu : token < tokens ? 0xffffu : 0;
                }
            }
            multiply_add(state.output[2 * step], weights[tile], tiles[tile][0], tiles[tile][2]);
            multiply_add(state.output[2 * step + 1], weights[tile], tiles[tile][1], tiles[tile][3]);
        }
    }
}

// Queries as left operands: channels in the order that pages have them.
template <int W> static __device__ void load_prefill_queries(const PrefillArguments &arguments, Shared<uint8_t> queries, uint32_t first_row) {
    Shared<__half> halves = queries.as<__half>();
    for (uint32_t at = threadIdx.x; at < PAGE * W; at += blockDim.x) {
        uint32_t row = at / W, channel = at % W, real_row = first_row + row;
        // Rows before the first wrap around to beyond the last.
        bool real = real_row < arguments.rows && channel < arguments.head_dim;
        size_t from = ((size_t)real_row * gridDim.y + blockIdx.y) * arguments.head_dim + channel;
        float query = real ? arguments.queries[from] : 0.0f;
        uint32_t lane = row % 8 * 4 + channel % 16 / 4, part = channel % 4 / 2 * 2 + row / 8 % 2;
        halves[(((row / 16 * (W / 16) + channel / 16) * 32 + lane) * 4 + part) * 2 + channel % 2] = finite_half(query);
    }
}

template <int W> static __device__ void store_prefill(const PrefillArguments &arguments, PrefillState<W> &state, uint32_t first_row) {
    int lane = threadIdx.x % 32, r = lane / 4, j = lane % 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        float mass = state.mass[lower];
        mass += __shfl_xor_sync(all_lanes, mass, 1);
        mass += __shfl_xor_sync(all_lanes, mass, 2);
        float inverse = 1.0f / mass;
        uint32_t row = first_row + warp * 16 + lower * 8 + r;
        if (row >= arguments.rows) continue;
        float *out = arguments.output + ((size_t)row * gridDim.y + blockIdx.y) * arguments.head_dim;
#pragma unroll
        for (int tile = 0; tile < W / 8; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t channel = tile * 8 + 2 * j + i;
                if (channel < arguments.head_dim) out[channel] = state.output[tile][2 * lower + i] * inverse;
            }
    }
}

// Grid [tiles, heads], block of 128. Tile i has the queries of page first_position / 64 + i.
template <int W, class Near> static __device__ void prefill_attention(const PrefillArguments &arguments) {
    using S = PrefillShapes<W>;
    int warp = threadIdx.x / 32;
    Shared<uint8_t> queries = dynamic_shared<uint8_t>(0, S::SHARED_BYTES), keys = queries + S::QUERY_BYTES, values = keys + S::KEY_BYTES;
    Shared<uint8_t> own_queries = queries + warp * 32 * W;
    uint32_t kv_head = blockIdx.y / arguments.group, first_page = arguments.first_position / PAGE, own_page = first_page + blockIdx.x;
    // Of the tile's 64 positions; wraps around when the rows start within the page.
    uint32_t first_row = own_page * PAGE - arguments.first_position;
    const uint32_t *table = arguments.table + (size_t)kv_head * arguments.table_stride;
    const uint32_t *mask = arguments.masks ? arguments.masks + ((size_t)kv_head * gridDim.x + blockIdx.x) * arguments.mask_words : nullptr;
    float scale = LOG2_E / sqrtf((float)arguments.head_dim);
    // Tokens of the own page that are there: up to the last row.
    uint32_t own_tokens = min(arguments.first_position + arguments.rows - own_page * PAGE, (uint32_t)PAGE);

    auto entry_of = [&](uint32_t page) {
        return page == own_page ? arguments.own[(size_t)kv_head * arguments.own_stride + blockIdx.x] | EXACT : table[page];
    };
    auto next = [&](uint32_t page) {
        while (page < own_page && mask && !(mask[page / 32] >> page % 32 & 1)) page++;
        return page;
    };
    // Of the lane's two rows; those that are not there may read what they like.
    auto row_reads = [&](uint32_t page, int lower) {
        uint32_t row = first_row + warp * 16 + lower * 8 + threadIdx.x % 32 / 4;
        if (!arguments.row_masks || page == own_page || row >= arguments.rows) return true;
        size_t line = (size_t)row * (gridDim.y / arguments.group) + kv_head;
        return (arguments.row_masks[line * arguments.mask_words + page / 32] >> page % 32 & 1) != 0;
    };
    auto copy = [&](uint32_t page, bool to_values) {
        if (page <= own_page) {
            uint32_t entry = entry_of(page), slot = entry & ~EXACT, bytes, offset;
            const uint8_t *from;
            if (entry & EXACT) {
                from = arguments.exact_pages + slot * ExactPages::page_bytes(W);
                offset = ExactPages::key_bytes(W), bytes = ExactPages::value_bytes(W);
            } else {
                from = arguments.near_pages + slot * Near::page_bytes(W);
                offset = Near::key_bytes(W), bytes = Near::value_bytes(W);
            }
            if (to_values) from += offset;
            if (!to_values) bytes = offset;
            for (uint32_t at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) cp_async_16(to_values ? values : keys, at, from + at);
        }
        cp_async_commit();
    };

    uint32_t page = next(0);
    copy(page, false);
    load_prefill_queries<W>(arguments, queries, first_row);
    PrefillState<W> state;
    state.maximum[0] = state.maximum[1] = -INFINITY;
    state.mass[0] = state.mass[1] = 0;
#pragma unroll
    for (int tile = 0; tile < W / 8; tile++) state.output[tile][0] = state.output[tile][1] = state.output[tile][2] = state.output[tile][3] = 0;
    while (page <= own_page) {
        bool exact = entry_of(page) & EXACT, own = page == own_page;
        uint32_t following = next(page + 1);
        const bool reads[2] = {row_reads(page, 0), row_reads(page, 1)};
        float scores[8][4], value_factor = 1;
        uint32_t weights[4][4];
        copy(page, true);
        cp_async_wait<1>();
        __syncthreads();
        if (exact) {
            prefill_scores<W, ExactPages>(own_queries, keys, scores, scale);
        } else {
            prefill_scores<W, Near>(own_queries, keys, scores, scale);
            value_factor = Near::value_factor(keys);
        }
        prefill_soften<W>(state, scores, weights, value_factor, own, reads);
        __syncthreads();
        copy(following, false);
        cp_async_wait<1>();
        __syncthreads();
        if (exact) {
            prefill_output<W, ExactPages>(state, weights, values, own ? own_tokens : PAGE);
        } else {
            prefill_output<W, Near>(state, weights, values, PAGE);
        }
        __syncthreads();
        page = following;
    }
    cp_async_wait<0>();
    store_prefill<W>(arguments, state, first_row);
}

// A kernel of this kind; the line after it registers it.
#define PREFILL(name, width, near)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * PREFILL_WARPS)                                                                        \
        name(const float *queries, const uint8_t *exact_pages, const uint8_t *near_pages, const uint32_t *table, const uint32_t *own,        \
             const uint32_t *masks, const uint32_t *row_masks, float *output, uint32_t rows, uint32_t first_position,                       \
             uint32_t table_stride, uint32_t own_stride, uint32_t mask_words, uint32_t group, uint32_t head_dim) {                          \
        prefill_attention<width, near>({queries, exact_pages, near_pages, table, own, masks, row_masks, output, rows, first_position,        \
                                        table_stride, own_stride, mask_words, group, head_dim});                                            \
    }
