// The parts of a decode become its answer: output, log-sum-exp and how far the output can be from the one of exact pages.
//
// Hard bound. With u the weights used, a the exact ones, s_t = shat_t + delta_t, |delta_t| <= Delta_b on page b, w_t = e^delta_t,
// W = sum_t u_t w_t >= W_low = sum_b rho_b e^-Delta_b, Ohat = sum u_t vhat_t: since a_t = u_t w_t / W and sum_t u_t (vhat_t - Ohat) = 0,
//   O - Ohat = sum_t a_t (v_t - vhat_t) + (1/W) sum_t u_t (w_t - 1) (vhat_t - Ohat).
// The first sum is at most (1/W_low) sum_b rho_b e^Delta_b eta_b. In the second |w_t - 1| <= e^Delta_b - 1, and for the pages b of part p
//   sum_b (e^Delta_b - 1) sum_{t in b} u_t norm(vhat_t - Ohat)
//     <= sum_b (e^Delta_b - 1) sqrt(rho_b S_b)                                (Cauchy-Schwarz within b; S_b = sum u_t norm(vhat_t - Ohat)^2)
//     <= sqrt(sum_b (e^Delta_b - 1)^2 rho_b) sqrt(sum_b S_b) <= sqrt(key_squares_p) sqrt(S_p)             (Cauchy-Schwarz over b),
// the last since S_p also counts the exact pages of p. So
//   norm(O - Ohat) <= (1/W_low) [ value_term + sum_p sqrt(key_squares_p S_p) ],
//   S_p = norm_squares_p - 2 Ohat . o_p + rho_p norm(Ohat)^2.
// The meter, no bound: errors of scores and values as independent with known variances give
//   E norm(O - Ohat)^2 = sum_t u_t^2 [v_b norm(vhat_t - Ohat)^2 + e_b], here as if distances were independent of weights within a part:
//   sum_p [ S_p / rho_p sum_{t in p} u_t^2 v_b + sum_{t in p} u_t^2 e_b ].
// Nothing was rounded away from pages that are exact: when all are, Delta and eta are 0 and so is the bound.

#include "numbers.cuh"

constexpr int PARTIAL_HEAD = 8;
constexpr int MAX_SPLITS = 1024;
constexpr int SUMMARY = 12;  // lse, bound, norm of the output, W_low, sqrt(S), value and key terms of the bound, unread, meter, 0, 0, 0
constexpr float LN_2 = 0.6931471805599453f;

// Rounding of S_p as computed, relative to the sum of its terms' sizes; and of what is summed in f32 over a context. Tensor cores cut off
// where others round: up to 2^-23 of a sum for each 16 tokens that a warp adds, always downwards.
constexpr float DISPERSION_ROUNDING = 2e-5f;
constexpr float SUM_ROUNDING = 1e-4f;

// Grid [heads], block of 128.
//   partials: [heads, splits, 8 + width]   output: [heads, head_dim]   summaries: [heads, SUMMARY]
extern "C" __global__ void __launch_bounds__(128)
    attention_merge(const float *partials, float *output, float *summaries, uint32_t splits, uint32_t head_dim, uint32_t width) {
    SHARED_ARRAY(float, factors, MAX_SPLITS);
    SHARED_ARRAY(float, merged, 256);
    SHARED_ARRAY(float, shared, 32);
    const uint32_t floats = PARTIAL_HEAD + width;
    const float *parts = partials + (size_t)blockIdx.x * splits * floats;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    float maximum = -INFINITY;
    for (uint32_t split = threadIdx.x; split < splits; split += blockDim.x) maximum = fmaxf(maximum, parts[split * floats]);
    maximum = block_max(maximum, shared);
    // The scalars, a thread per part; then the output, a thread per channel.
    float mass = 0, norm_squares = 0, mass_low = 0, value_term = 0, meter = 0;
    for (uint32_t split = threadIdx.x; split < splits; split += blockDim.x) {
        const float *part = parts + split * floats;
        float factor = part[0] == -INFINITY ? 0.0f : exp2f(part[0] - maximum);
        factors[split] = factor;
        mass = fmaf(factor, part[1], mass);
        norm_squares = fmaf(factor, part[2], norm_squares);
        mass_low = fmaf(factor, part[3], mass_low);
        value_term = fmaf(factor, part[4], value_term);
        meter = fmaf(factor * factor, part[6], meter);
    }
    mass = block_sum(mass, shared);
    norm_squares = block_sum(norm_squares, shared);
    mass_low = block_sum(mass_low, shared);
    value_term = block_sum(value_term, shared);
    meter = block_sum(meter, shared);
    float inverse = mass > 0 ? 1.0f / mass : 0.0f, squares = 0;
    for (uint32_t c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0;
#pragma unroll 4
        for (uint32_t split = 0; split < splits; split++) sum = fmaf(factors[split], parts[split * floats + PARTIAL_HEAD + c], sum);
        float value = c < head_dim ? sum * inverse : 0.0f;
        merged[c] = value;
        squares = fmaf(value, value, squares);
        if (c < head_dim) output[(size_t)blockIdx.x * head_dim + c] = value;
    }
    squares = block_sum(squares, shared);
    float norm = sqrtf(squares);

    float key_term = 0, key_meter = 0;
    for (uint32_t split = warp; split < splits; split += blockDim.x / 32) {
        const float *part = parts + split * floats;
        float product = 0, sizes = 0;
        for (uint32_t c = lane; c < head_dim; c += 32) {
            float term = merged[c] * part[PARTIAL_HEAD + c];
            product += term;
            sizes += fabsf(term);
        }
        product = warp_sum(product);
        sizes = warp_sum(sizes);
        float total = part[2] + part[1] * squares;
        float likely = fmaxf(total - 2 * product, 0.0f), dispersion = likely + DISPERSION_ROUNDING * (total + 2 * sizes);
        if (lane == 0) {
            key_term += factors[split] * sqrtf(part[5] * dispersion);
            key_meter += part[1] > 0 ? factors[split] * factors[split] * part[7] * likely / part[1] : 0.0f;
        }
    }
    key_term = block_sum(key_term, shared);
    meter += block_sum(key_meter, shared);
    if (threadIdx.x != 0) return;
    float bound = mass_low > 0 ? (value_term + key_term) / mass_low * (1.0f + 1e-4f) : 0.0f;
    // Both this output and the exact one it is compared with were summed in f32.
    if (bound > 0) bound += SUM_ROUNDING * sqrtf(norm_squares * inverse);
    float *summary = summaries + (size_t)blockIdx.x * SUMMARY;
    summary[0] = mass > 0 ? (maximum + log2f(mass)) * LN_2 : -INFINITY;
    summary[1] = bound;
    summary[2] = norm;
    summary[3] = mass > 0 ? mass_low / mass : 1.0f;
    summary[4] = sqrtf(fmaxf(norm_squares * inverse - squares, 0.0f));
    summary[5] = value_term;
    summary[6] = key_term;
    summary[7] = 0;
    summary[8] = sqrtf(meter) * inverse;
    summary[9] = summary[10] = summary[11] = 0;
}
KERNEL(attention_merge);
