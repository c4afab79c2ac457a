// Which pages a query reads: bounds of the scores in a page, and the selection of the pages with the largest.
// Bounds: Tang et al. 2024 (Quest), arXiv:2406.10774.

#include "numbers.cuh"
#include "page.cuh"

// Box of a page for formats whose pages have none: f32 largest norm of a value, 0, 0, 0; f16 low[W], high[W].
static __device__ inline size_t box_bytes(uint32_t width) { return HEADER_BYTES + 4 * (size_t)width; }

// One block per page, of at least `width` threads in whole warps: job i makes box `targets[i]` of exact page `sources[i]`.
extern "C" __global__ void kv_page_box(const uint8_t *exact_pages, uint8_t *boxes, const uint32_t *sources, const uint32_t *targets,
                                       uint32_t width) {
    SHARED_ARRAY(float, shared, 32);
    const uint8_t *page = exact_pages + sources[blockIdx.x] * exact_page_bytes(width);
    const __half *norms = (const __half *)page, *keys = norms + PAGE;
    uint8_t *box = boxes + targets[blockIdx.x] * box_bytes(width);
    __half *low_out = (__half *)(box + HEADER_BYTES), *high_out = low_out + width;
    float norm = threadIdx.x < PAGE ? __half2float(norms[threadIdx.x]) : 0.0f;
    if (threadIdx.x < PAGE && !is_number(norms[threadIdx.x])) norm = INFINITY;
    norm = block_max(norm, shared);
    if (threadIdx.x < width) {
        float low = INFINITY, high = -INFINITY;
        bool numbers = true;
        for (int token = 0; token < PAGE; token++) {
            __half key = keys[exact_key_index(token, threadIdx.x, width)];
            numbers = numbers && is_number(key);
            low = fminf(low, number(key));
            high = fmaxf(high, number(key));
        }
        low_out[threadIdx.x] = __float2half_rn(numbers ? low : -INFINITY);
        high_out[threadIdx.x] = __float2half_rn(numbers ? high : INFINITY);
    }
    if (threadIdx.x == 0) {
        float *header = (float *)box;
        header[0] = norm;
        header[1] = header[2] = header[3] = 0;
    }
}
KERNEL(kv_page_box);

struct Interval {
    float low, high;
};

struct CodedBox {
    static __device__ size_t bytes(uint32_t width) { return int8_int4_page_bytes(width); }
    // The scale was rounded up from a range that was rounded to f32.
    static __device__ Interval channel(const uint8_t *page, uint32_t channel, uint32_t width) {
        const __half *scale = (const __half *)(page + HEADER_BYTES + NORMS_BYTES), *zero = scale + width;
        float low = __half2float(zero[channel]);
        if (!(((const float *)page)[0] < 3e38f)) return {-INFINITY, INFINITY};
        return {low, fmaf(255.0f * (1.0f + 1e-6f), __half2float(scale[channel]), low)};
    }
    static __device__ float value_norm(const uint8_t *page, uint32_t lane) {
        const __half *norms = (const __half *)(page + HEADER_BYTES);
        return warp_max(fmaxf(__half2float(norms[lane]), __half2float(norms[lane + 32]))) + ((const float *)page)[1];
    }
};

struct StoredBox {
    static __device__ size_t bytes(uint32_t width) { return box_bytes(width); }
    static __device__ Interval channel(const uint8_t *box, uint32_t channel, uint32_t width) {
        const __half *low = (const __half *)(box + HEADER_BYTES), *high = low + width;
        return {__half2float(low[channel]), __half2float(high[channel])};
    }
    static __device__ float value_norm(const uint8_t *box, uint32_t) { return ((const float *)box)[0]; }
};

// A warp per page; see the kernels below.
template <class Box>
static __device__ void page_bounds(const float *queries, const uint8_t *boxes, const uint32_t *table, float *bounds, float *value_norms,
                                   uint32_t pages, uint32_t stride, uint32_t group, uint32_t head_dim, uint32_t width) {
    uint32_t lane = threadIdx.x % 32, page = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, kv_head = blockIdx.y;
    if (page >= pages) return;
    const uint8_t *box = boxes + (size_t)table[kv_head * stride + page] * Box::bytes(width);
    float norm = Box::value_norm(box, lane);
    if (lane == 0) value_norms[kv_head * stride + page] = norm;
    for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        float sum = 0, sizes = 0;
        for (uint32_t channel = lane; channel < head_dim; channel += 32) {
            float query = queries[(size_t)head * head_dim + channel];
            Interval box_side = Box::channel(box, channel, width);
            // A channel that the query does not look at cannot add anything, not even an infinity.
            float most = query == 0 ? 0.0f : fmaxf(query * box_side.low, query * box_side.high);
            float size = query == 0 ? 0.0f : fabsf(query) * fmaxf(fabsf(box_side.low), fabsf(box_side.high));
            sum += most;
            sizes += size;
        }
        sum = warp_sum(sum);
        sizes = warp_sum(sizes);
        // Rounding of this sum and of the scores it bounds.
        float slack = sizes * (float)(head_dim + 16) * (1.0f / 4194304);
        if (lane == 0) bounds[(size_t)head * stride + page] = (sum + slack) / sqrtf((float)head_dim);
    }
}

// bounds[head][page] >= the largest score of the page's tokens; value_norms[kv_head][page] >= the largest norm of its values.
// Grid [ceil(pages / 4), kv_heads], block of 128.   queries: [heads, head_dim]   table: [kv_heads, stride] near slots (or slots of boxes)
extern "C" __global__ void page_bounds_int8_int4(const float *queries, const uint8_t *near_pages, const uint32_t *table, float *bounds,
                                                 float *value_norms, uint32_t pages, uint32_t stride, uint32_t group, uint32_t head_dim,
                                                 uint32_t width) {
    page_bounds<CodedBox>(queries, near_pages, table, bounds, value_norms, pages, stride, group, head_dim, width);
}
KERNEL(page_bounds_int8_int4);

extern "C" __global__ void page_bounds_box(const float *queries, const uint8_t *boxes, const uint32_t *table, float *bounds, float *value_norms,
                                           uint32_t pages, uint32_t stride, uint32_t group, uint32_t head_dim, uint32_t width) {
    page_bounds<StoredBox>(queries, boxes, table, bounds, value_norms, pages, stride, group, head_dim, width);
}
KERNEL(page_bounds_box);

constexpr int SELECT_THREADS = 256;

// Unsigned integers in the order of floats; NaN above all, so that what cannot be bounded is read.
static __device__ inline uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return 0xffffffffu;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// How many threads before this one in the block have `flag`, and how many have it at all. `counts` holds a number per warp.
static __device__ inline uint32_t rank_in_block(bool flag, Shared<uint32_t> counts, uint32_t &total) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, votes = __ballot_sync(all_lanes, flag);
    __syncthreads();
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    uint32_t before = __popc(votes & ((1u << lane) - 1));
    total = 0;
    for (uint32_t other = 0; other < SELECT_THREADS / 32; other++) {
        uint32_t count = counts[other];
        before += other < warp ? count : 0;
        total += count;
    }
    return before;
}

// Chooses pages for one key-value head per block of 256: the first `sinks`, the last `window`, and of the rest those with the largest
// bound over the group, ties to the earlier page, until `budget` pages are chosen (no fewer than sinks and window). The list gets their
// entries in the order of pages and then the entry behind the last page, which is the page under way. Bounds of chosen pages become
// -infinity: what is left bounds what is not read.
//   bounds: [heads, stride]   entries: [kv_heads, stride]   lists: [kv_heads, list_stride]   lengths: [kv_heads]
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    select_pages(float *bounds, const uint32_t *entries, uint32_t *lists, uint32_t *lengths, uint32_t pages, uint32_t stride,
                 uint32_t list_stride, uint32_t group, uint32_t budget, uint32_t sinks, uint32_t window) {
    SHARED_ARRAY(uint32_t, counts, SELECT_THREADS / 32);
    uint32_t kv_head = blockIdx.x;
    float *own = bounds + (size_t)kv_head * group * stride;
    auto forced = [&](uint32_t page) { return page < sinks || page + window >= pages; };
    auto key = [&](uint32_t page) {
        uint32_t most = 0;
        for (uint32_t head = 0; head < group; head++) most = max(most, ordered(own[(size_t)head * stride + page]));
        return most;
    };
    uint32_t always = min(min(sinks, pages) + min(window, pages), pages);
    uint32_t wanted = budget > always ? min(budget, pages) - min(always, budget) : 0;

    // The largest threshold that `wanted` of the free pages reach, a bit at a time.
    uint32_t threshold = 0, above = 0;
    for (int bit = 31; wanted > 0 && bit >= 0; bit--) {
        uint32_t candidate = threshold | 1u << bit, count = 0, total;
        for (uint32_t first = 0; first < pages; first += SELECT_THREADS) {
            uint32_t page = first + threadIdx.x;
            rank_in_block(page < pages && !forced(page) && key(page) >= candidate, counts, total);
            count += total;
        }
        if (count >= wanted) threshold = candidate;
    }
    for (uint32_t first = 0; wanted > 0 && first < pages; first += SELECT_THREADS) {
        uint32_t page = first + threadIdx.x, total;
        rank_in_block(page < pages && !forced(page) && key(page) > threshold, counts, total);
        above += total;
    }
    uint32_t ties = 0, chosen = 0;
    for (uint32_t first = 0; first < pages; first += SELECT_THREADS) {
        uint32_t page = first + threadIdx.x, total;
        bool there = page < pages, free = there && !forced(page) && wanted > 0;
        uint32_t order = free ? key(page) : 0;
        bool tie = free && order == threshold;
        uint32_t rank = ties + rank_in_block(tie, counts, total);
        ties += total;
        bool take = there && (forced(page) || (free && order > threshold) || (tie && rank < wanted - above));
        rank = chosen + rank_in_block(take, counts, total);
        chosen += total;
        if (!take) continue;
        lists[(size_t)kv_head * list_stride + rank] = entries[(size_t)kv_head * stride + page];
        for (uint32_t head = 0; head < group; head++) own[(size_t)head * stride + page] = -INFINITY;
    }
    if (threadIdx.x == 0) {
        lists[(size_t)kv_head * list_stride + chosen] = entries[(size_t)kv_head * stride + pages];
        lengths[kv_head] = chosen + 1;
    }
}
KERNEL(select_pages);

constexpr int SUMMARY = 12;

// How far the output of one head is from the one with all pages read, for what was skipped. With T = sum over unread pages of
// 64 e^{U - lse} the unread pages hold at most tau = T / (mass_low + T) of the mass (mass_low lowers the read mass by its own error), and
//   norm(O - O_read) = tau norm(mean of unread values - O_read) <= tau (largest norm of an unread value + norm(O_read)),
// where norm(O_read) <= norm(output) + bound. Written to place 7 of the summary; to be added to the bound.
// Grid [heads], block of 128.
extern "C" __global__ void unread_bound(const float *bounds, const float *value_norms, float *summaries, uint32_t pages, uint32_t stride,
                                        uint32_t group) {
    SHARED_ARRAY(float, shared, 32);
    float *summary = summaries + (size_t)blockIdx.x * SUMMARY;
    const float *own = bounds + (size_t)blockIdx.x * stride, *norms = value_norms + (size_t)(blockIdx.x / group) * stride;
    float lse = summary[0], mass = 0, norm = 0;
    for (uint32_t page = threadIdx.x; page < pages; page += blockDim.x) {
        float bound = own[page];
        if (bound == -INFINITY) continue;
        mass += PAGE * expf(bound - lse);
        norm = fmaxf(norm, norms[page]);
    }
    mass = block_sum(mass, shared);
    norm = block_max(norm, shared);
    if (threadIdx.x != 0) return;
    float share = mass < 3e38f ? mass / (summary[3] + mass) : 1.0f;
    summary[7] = mass == 0 ? 0.0f : share * (norm + summary[2] + summary[1]) * (1.0f + 1e-4f);
}
KERNEL(unread_bound);
