// Norm over each head of q and k (QK-norm), where the model has one, then rotary position embedding. Su et al. 2021, arXiv:2104.09864;
// the half-split pairing of GPT-NeoX and Hugging Face Llama.
// (x_i, x_{i+h/2}) -> (x_i cos a - x_{i+h/2} sin a, x_{i+h/2} cos a + x_i sin a)
// q: [rows, heads * h] f32   k: [rows, kv_heads * h] f32   cosines, sines: [positions, h/2] f32, the CPU's own table
// One warp per head of a row; a lane keeps its pairs in registers between the two steps. Without a norm the result has the CPU's bits.

#include "block.cuh"

namespace {

// Pairs of one lane: heads are at most 2 * 32 * pairs = 256 wide.
constexpr unsigned pairs = 4;

struct Heads {
    float *q;
    float *k;
    unsigned rows, heads, kv_heads, head_dim, first_position;
};

template <bool with_norm>
__device__ __forceinline__ void rotate(const Heads &all, const float *q_gain, const float *k_gain, const float *cosines, const float *sines, float epsilon) {
    const unsigned lane = threadIdx.x % 32, item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, per_row = all.heads + all.kv_heads;
    if (item >= all.rows * per_row) return;
    const unsigned row = item / per_row, head = item % per_row, half = all.head_dim / 2;
    const bool is_query = head < all.heads;
    float *x = is_query ? all.q + (size_t(row) * all.heads + head) * all.head_dim : all.k + (size_t(row) * all.kv_heads + head - all.heads) * all.head_dim;
    float first[pairs], second[pairs], squares = 0.0f;
#pragma unroll
    for (unsigned p = 0; p < pairs; ++p) {
        const unsigned i = lane + 32 * p;
        first[p] = i < half ? x[i] : 0.0f;
        second[p] = i < half ? x[i + half] : 0.0f;
        squares = fmaf(first[p], first[p], fmaf(second[p], second[p], squares));
    }
    if (with_norm) {
        const float *gain = is_query ? q_gain : k_gain;
        const float scale = 1.0f / sqrtf(warp_total(squares) / static_cast<float>(all.head_dim) + epsilon);
#pragma unroll
        for (unsigned p = 0; p < pairs; ++p) {
            const unsigned i = lane + 32 * p;
            if (i < half) {
                first[p] = first[p] * scale * gain[i];
                second[p] = second[p] * scale * gain[i + half];
            }
        }
    }
    const size_t table = size_t(all.first_position + row) * half;
#pragma unroll
    for (unsigned p = 0; p < pairs; ++p) {
        const unsigned i = lane + 32 * p;
        if (i < half) {
            const float cosine = cosines[table + i], sine = sines[table + i];
            // One product rounded, the other fused.
            x[i] = fmaf(first[p], cosine, -__fmul_rn(second[p], sine));
            x[i + half] = fmaf(second[p], cosine, __fmul_rn(first[p], sine));
        }
    }
}

}  // namespace

// Row t of q and k, in place, at position first_position + t. Block: 32 * warps; grid: (heads + kv_heads) * rows / warps, rounded up.
extern "C" __global__ void rope_f32(float *__restrict__ q, float *__restrict__ k, const float *__restrict__ cosines, const float *__restrict__ sines,
                                    unsigned rows, unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned first_position) {
    rotate<false>({q, k, rows, heads, kv_heads, head_dim, first_position}, nullptr, nullptr, cosines, sines, 0.0f);
}
KERNEL(rope_f32);

// The same after a norm over each head with gains [head_dim].
extern "C" __global__ void head_norm_rope_f32(float *__restrict__ q, float *__restrict__ k, const float *__restrict__ q_gain,
                                              const float *__restrict__ k_gain, const float *__restrict__ cosines, const float *__restrict__ sines,
                                              unsigned rows, unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned first_position, float epsilon) {
    rotate<true>({q, k, rows, heads, kv_heads, head_dim, first_position}, q_gain, k_gain, cosines, sines, epsilon);
}
KERNEL(head_norm_rope_f32);
