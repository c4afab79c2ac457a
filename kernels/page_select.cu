// Which pages a query reads: bounds of the scores in a page, the order of pages, the selection of the first in it, and a bound of what the
// others could have changed. Everything takes many rows (tokens on the same page) at once; a decode has one.
// Bounds: Tang et al. 2024 (Quest), arXiv:2406.10774.

#include "numbers.cuh"
#include "page.cuh"

// Boxes of a page, for formats whose pages have none and where one for 64 tokens is too coarse: f32 largest norm of a value, 0, 0, 0; then
// for each of `boxes` equal runs of tokens f16 low[W], high[W].
static __device__ inline size_t box_bytes(uint32_t width, uint32_t boxes) { return HEADER_BYTES + 4 * (size_t)width * boxes; }

// One block per page, of at least `width` threads in whole warps: job i makes boxes `targets[i]` of exact page `sources[i]`.
// `boxes` divides 64.
extern "C" __global__ void kv_page_box(const uint8_t *exact_pages, uint8_t *page_boxes, const uint32_t *sources, const uint32_t *targets,
                                       uint32_t width, uint32_t boxes) {
    SHARED_ARRAY(float, shared, 32);
    const uint8_t *page = exact_pages + sources[blockIdx.x] * exact_page_bytes(width);
    const __half *norms = (const __half *)page, *keys = norms + PAGE;
    uint8_t *box = page_boxes + targets[blockIdx.x] * box_bytes(width, boxes);
    float norm = threadIdx.x < PAGE ? __half2float(norms[threadIdx.x]) : 0.0f;
    if (threadIdx.x < PAGE && !is_number(norms[threadIdx.x])) norm = INFINITY;
    norm = block_max(norm, shared);
    for (uint32_t run = 0; threadIdx.x < width && run < boxes; run++) {
        __half *low_out = (__half *)(box + HEADER_BYTES) + 2 * run * width, *high_out = low_out + width;
        float low = INFINITY, high = -INFINITY;
        bool numbers = true;
        for (uint32_t token = run * (PAGE / boxes); token < (run + 1) * (PAGE / boxes); token++) {
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

// The steps of a page's channels: one box.
struct CodedBox {
    static __device__ size_t bytes(uint32_t width, uint32_t) { return int8_int4_page_bytes(width); }
    // The scale was rounded up from a range that was rounded to f32.
    static __device__ Interval channel(const uint8_t *page, uint32_t, uint32_t channel, uint32_t width) {
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
    static __device__ size_t bytes(uint32_t width, uint32_t boxes) { return box_bytes(width, boxes); }
    static __device__ Interval channel(const uint8_t *box, uint32_t run, uint32_t channel, uint32_t width) {
        const __half *low = (const __half *)(box + HEADER_BYTES) + 2 * run * width, *high = low + width;
        return {__half2float(low[channel]), __half2float(high[channel])};
    }
    static __device__ float value_norm(const uint8_t *box, uint32_t) { return ((const float *)box)[0]; }
};

// At least the product of a query with any key in a box.
struct LargestProduct {
    float sum = 0, sizes = 0;
    __device__ void add(float query, Interval side) {
        // A channel that the query does not look at cannot add anything, not even an infinity.
        if (query == 0) return;
        sum += fmaxf(query * side.low, query * side.high);
        sizes += fabsf(query) * fmaxf(fabsf(side.low), fabsf(side.high));
    }
    __device__ float total(uint32_t head_dim) {
        // Rounding of this sum and of the scores it bounds.
        return warp_sum(sum) + warp_sum(sizes) * (float)(head_dim + 16) * (1.0f / 4194304);
    }
};

// The product with the middle of a box and twice the deviation of a product if the key lies at a corner at random.
struct LikelyProduct {
    float product = 0, square = 0;
    __device__ void add(float query, Interval side) {
        float half = query * ((side.high - side.low) * 0.5f);
        product = fmaf(query, (side.low + side.high) * 0.5f, product);
        square = fmaf(half, half, square);
    }
    __device__ float total(uint32_t) { return warp_sum(product) + 2.0f * sqrtf(warp_sum(square)); }
};

static __device__ inline uint32_t page_of_warp() { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

// What Product says of the boxes of a page, the largest of them. A warp per page; see the kernels below.
template <class Box, class Product>
static __device__ void score_pages(const float *queries, const uint8_t *page_boxes, const uint32_t *table, float *scores, uint32_t pages,
                                   uint32_t stride, uint32_t group, uint32_t head_dim, uint32_t width, uint32_t boxes) {
    uint32_t lane = threadIdx.x % 32, page = page_of_warp(), kv_head = blockIdx.y, row = blockIdx.z;
    if (page >= pages) return;
    const uint8_t *box = page_boxes + (size_t)table[kv_head * stride + page] * Box::bytes(width, boxes);
    for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        size_t line = (size_t)row * gridDim.y * group + head;
        float largest = -INFINITY;
        for (uint32_t run = 0; run < boxes; run++) {
            Product product;
            for (uint32_t channel = lane; channel < head_dim; channel += 32)
                product.add(queries[line * head_dim + channel], Box::channel(box, run, channel, width));
            float found = product.total(head_dim);
            // What is not a number stays.
            largest = found <= largest ? largest : found;
        }
        if (lane == 0) scores[line * stride + page] = largest / sqrtf((float)head_dim);
    }
}

template <class Box>
static __device__ void page_bounds(const float *queries, const uint8_t *page_boxes, const uint32_t *table, float *bounds,
                                   float *value_norms, uint32_t pages, uint32_t stride, uint32_t group, uint32_t head_dim, uint32_t width,
                                   uint32_t boxes) {
    uint32_t lane = threadIdx.x % 32, page = page_of_warp(), place = blockIdx.y * stride + page;
    if (page < pages && blockIdx.z == 0) {
        float norm = Box::value_norm(page_boxes + (size_t)table[place] * Box::bytes(width, boxes), lane);
        if (lane == 0) value_norms[place] = norm;
    }
    score_pages<Box, LargestProduct>(queries, page_boxes, table, bounds, pages, stride, group, head_dim, width, boxes);
}

// bounds[row][head][page] >= the largest score of the page's tokens; value_norms[kv_head][page] >= the largest norm of its values.
// Grid [ceil(pages / 4), kv_heads, rows], block of 128.
//   queries: [rows, heads, head_dim]   table: [kv_heads, stride] near slots (or slots of boxes)   bounds: [rows, heads, stride]
extern "C" __global__ void page_bounds_int8_int4(const float *queries, const uint8_t *near_pages, const uint32_t *table, float *bounds,
                                                 float *value_norms, uint32_t pages, uint32_t stride, uint32_t group, uint32_t head_dim,
                                                 uint32_t width, uint32_t) {
    page_bounds<CodedBox>(queries, near_pages, table, bounds, value_norms, pages, stride, group, head_dim, width, 1);
}
KERNEL(page_bounds_int8_int4);

extern "C" __global__ void page_bounds_box(const float *queries, const uint8_t *page_boxes, const uint32_t *table, float *bounds,
                                           float *value_norms, uint32_t pages, uint32_t stride, uint32_t group, uint32_t head_dim,
                                           uint32_t width, uint32_t boxes) {
    page_bounds<StoredBox>(queries, page_boxes, table, bounds, value_norms, pages, stride, group, head_dim, width, boxes);
}
KERNEL(page_bounds_box);

// How large a head's largest score with a key of a page is likely to be. Grid [ceil(pages / 4), kv_heads, rows], block of 128.
//   queries: [rows, heads, head_dim]   table: [kv_heads, stride] slots of boxes   estimates: [rows, heads, stride]
extern "C" __global__ void page_estimates(const float *queries, const uint8_t *page_boxes, const uint32_t *table, float *estimates,
                                          uint32_t pages, uint32_t stride, uint32_t group, uint32_t head_dim, uint32_t width,
                                          uint32_t boxes) {
    score_pages<StoredBox, LikelyProduct>(queries, page_boxes, table, estimates, pages, stride, group, head_dim, width, boxes);
}
KERNEL(page_estimates);

constexpr int SELECT_THREADS = 256;

// Unsigned integers in the order of floats; NaN above all, so that what cannot be bounded is read.
static __device__ inline uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return 0xffffffffu;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Ranks of pages for the heads of a group together: larger is read first.
//   by_share = 0: the largest score of a head; 1: shares of each head's softmax over the scores of all pages, added up over the heads.
// Grid [kv_heads, rows], block of whole warps.   scores: [rows, heads, stride]   ranks: [rows, kv_heads, stride]
extern "C" __global__ void __launch_bounds__(1024)
    rank_pages(const float *scores, uint32_t *ranks, uint32_t pages, uint32_t stride, uint32_t group, uint32_t by_share) {
    SHARED_ARRAY(float, shared, 32);
    const float *own = scores + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * group * stride;
    uint32_t *out = ranks + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * stride;
    if (!by_share) {
        for (uint32_t page = threadIdx.x; page < pages; page += blockDim.x) {
            uint32_t most = 0;
            for (uint32_t head = 0; head < group; head++) most = max(most, ordered(own[(size_t)head * stride + page]));
            out[page] = most;
        }
        return;
    }
    for (uint32_t head = 0; head < group; head++) {
        const float *score = own + (size_t)head * stride;
        // Of two infinities the difference is none.
        auto weight = [&](float x, float origin) { return x == origin ? 1.0f : expf(x - origin); };
        float highest = -INFINITY, sum = 0;
        for (uint32_t page = threadIdx.x; page < pages; page += blockDim.x) {
            float x = score[page], before = highest;
            highest = fmaxf(highest, x);
            sum = fmaf(sum, weight(before, highest), weight(x, highest));
        }
        float largest = block_max(highest, shared);
        sum = block_sum(sum * weight(highest, largest), shared);
        // Bits of numbers that are not negative have their order; a thread sees its own pages only.
        for (uint32_t page = threadIdx.x; page < pages; page += blockDim.x) {
            float before = head == 0 ? 0.0f : __uint_as_float(out[page]);
            out[page] = __float_as_uint(before + weight(score[page], largest) / sum);
        }
    }
}
KERNEL(rank_pages);

// How many threads of the block before this one have `flag`, and how many have it at all. `counts` holds a number per warp.
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

// Sum of `value` over the threads of the block before this one.
static __device__ inline uint32_t sum_before(uint32_t value, Shared<uint32_t> counts) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        uint32_t other = __shfl_up_sync(all_lanes, sum, distance);
        sum += lane >= distance ? other : 0;
    }
    __syncthreads();
    if (lane == 31) counts[warp] = sum;
    __syncthreads();
    uint32_t before = sum - value;
    for (uint32_t other = 0; other < warp; other++) before += static_cast<uint32_t>(counts[other]);
    return before;
}

// Chooses pages for one key-value head and row per block of 256: the first `sinks`, the last `window`, and of the rest those with the
// largest rank, ties to the earlier page, until `budget` pages are chosen (no fewer than sinks and window; without ranks no others). The
// list gets their entries in the order of pages and then the row's own page, exact. Bit p of `chosen` says that page p is read.
// Grid [kv_heads, rows].
//   ranks: [rows, kv_heads, stride]   entries, slots: [kv_heads, stride] what a page is once it is full, and its exact slot
//   lists: [rows, kv_heads, list_stride]   lengths: [rows, kv_heads]   chosen: [rows, kv_heads, words]; lists may be null
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    select_pages(const uint32_t *ranks, const uint32_t *entries, const uint32_t *slots, uint32_t *lists, uint32_t *lengths,
                 uint32_t *chosen, uint32_t pages, uint32_t stride, uint32_t list_stride, uint32_t words, uint32_t budget, uint32_t sinks,
                 uint32_t window) {
    SHARED_ARRAY(uint32_t, counts, SELECT_THREADS / 32);
    SHARED_ARRAY(uint32_t, histogram, SELECT_THREADS);
    SHARED_ARRAY(uint32_t, found, 2);
    uint32_t kv_head = blockIdx.x, lane = threadIdx.x % 32;
    size_t line = (size_t)blockIdx.y * gridDim.x + kv_head;
    const uint32_t *rank_of = ranks + line * stride;
    auto forced = [&](uint32_t page) { return page < sinks || page + window >= pages; };
    uint32_t always = min(min(sinks, pages) + min(window, pages), pages);
    uint32_t wanted = ranks && budget > always ? min(budget, pages) - always : 0;

    // The rank of the last page wanted, eight bits at a time: of the free pages that share what is known of it, `left` are wanted.
    uint32_t threshold = 0, left = wanted;
    for (int shift = 24; wanted > 0 && shift >= 0; shift -= 8) {
        __syncthreads();
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t page = threadIdx.x; page < pages; page += SELECT_THREADS) {
            uint32_t rank = rank_of[page];
            bool candidate = !forced(page) && (shift == 24 || rank >> (shift + 8) == threshold >> (shift + 8));
            if (candidate) atomicAdd(histogram.address(rank >> shift & 255), 1u);
        }
        __syncthreads();
        // The first thread has the largest digit.
        uint32_t digit = 255 - threadIdx.x, count = histogram[digit], above = sum_before(count, counts);
        if (above < left && above + count >= left) {
            found[0] = digit;
            found[1] = above;
        }
        __syncthreads();
        threshold |= static_cast<uint32_t>(found[0]) << shift;
        left -= static_cast<uint32_t>(found[1]);
    }

    uint32_t ties = 0, taken = 0;
    for (uint32_t first = 0; first < pages; first += SELECT_THREADS) {
        uint32_t page = first + threadIdx.x, total;
        bool there = page < pages, always_read = there && forced(page), free = there && !always_read && wanted > 0;
        uint32_t order = free ? rank_of[page] : 0;
        bool tie = free && order == threshold;
        uint32_t rank = ties + rank_in_block(tie, counts, total);
        ties += total;
        bool take = always_read || (free && order > threshold) || (tie && rank < left);
        uint32_t votes = __ballot_sync(all_lanes, take);
        if (lane == 0 && there) chosen[line * words + page / 32] = votes;
        rank = taken + rank_in_block(take, counts, total);
        taken += total;
        if (take && lists) lists[line * list_stride + rank] = entries[(size_t)kv_head * stride + page];
    }
    if (threadIdx.x == 0 && lists) {
        lists[line * list_stride + taken] = EXACT | slots[(size_t)kv_head * stride + pages];
        lengths[line] = taken + 1;
    }
}
KERNEL(select_pages);

// What the tiles of a prompt read: the pages that any of their rows reads. Grid [tiles, kv_heads].
//   chosen: [rows, kv_heads, words], rows of consecutive positions from first_position on   masks: [kv_heads, tiles, words]
extern "C" __global__ void unite_rows(const uint32_t *chosen, uint32_t *masks, uint32_t rows, uint32_t first_position, uint32_t words) {
    uint32_t own_page = first_position / PAGE + blockIdx.x, kv_head = blockIdx.y;
    uint32_t first = max(own_page * PAGE, first_position) - first_position, end = min((own_page + 1) * PAGE - first_position, rows);
    for (uint32_t word = threadIdx.x; word < (own_page + 31) / 32; word += blockDim.x) {
        uint32_t united = 0;
        for (uint32_t row = first; row < end; row++) united |= chosen[((size_t)row * gridDim.y + kv_head) * words + word];
        masks[((size_t)kv_head * gridDim.x + blockIdx.x) * words + word] = united;
    }
}
KERNEL(unite_rows);

constexpr int SUMMARY = 12;
constexpr int UNREAD_ROUNDS = 4;
// Covers the f32 rounding of a log-sum-exp, as a factor on masses, and of an output beside its exact counterpart, relative to norms.
constexpr float UNREAD_ROUNDING = 1e-4f;

// How far the output of one head is from the one with all pages read, for what was skipped. Page b weighs at most
// mass_b = 64 e^{U_b - lse} and its values lie within radius_b = (largest norm of a value + norm(O_read)) of O_read, so with R at most the
// weight of what was read
//   norm(O - O_read) <= X = max over 0 <= T_b <= mass_b of sum T_b radius_b / (R + sum T_b).
// X is the fixed point of x -> (sum over radius_b > x of mass_b radius_b) / (R + sum of mass_b), which iterates reach from below; and
//   X <= x + (sum mass_b max(radius_b - x, 0) - R x) / R   for every x in between (both sides times the denominator, which is at least R),
// so that stopping early gives a bound as well. Written to place 7 of the summary; to be added to the bound.
// Grid [heads], block of whole warps.   bounds: [heads, stride]   value_norms: [kv_heads, stride]   chosen: [kv_heads, words]
extern "C" __global__ void __launch_bounds__(512)
    unread_bound(const float *bounds, const float *value_norms, const uint32_t *chosen, float *summaries, uint32_t pages, uint32_t stride,
                 uint32_t words, uint32_t group) {
    SHARED_ARRAY(float, shared, 32);
    uint32_t kv_head = blockIdx.x / group;
    float *summary = summaries + (size_t)blockIdx.x * SUMMARY;
    const float *own = bounds + (size_t)blockIdx.x * stride, *norms = value_norms + (size_t)kv_head * stride;
    const uint32_t *read_pages = chosen + (size_t)kv_head * words;
    float lse = summary[0], outreach = summary[1] + summary[2], read = summary[3] * (1.0f - UNREAD_ROUNDING);
    auto is_read = [&](uint32_t page) { return read_pages[page / 32] >> page % 32 & 1; };
    // Large enough to be beyond all that was read; sums stay finite.
    auto mass_of = [&](uint32_t page) { return fminf(PAGE * expf(own[page] - lse) * (1.0f + UNREAD_ROUNDING), 1e25f); };

    float largest = -1;
    for (uint32_t page = threadIdx.x; page < pages; page += blockDim.x)
        if (!is_read(page)) largest = norms[page] <= 1e10f ? fmaxf(largest, norms[page]) : INFINITY;
    largest = block_max(largest, shared);
    float radius = largest + outreach, value = 0;
    for (int round = 0; largest >= 0 && round < UNREAD_ROUNDS; round++) {
        float mass = 0, moment = 0;
        for (uint32_t page = threadIdx.x; page < pages; page += blockDim.x) {
            float reach = norms[page] + outreach;
            if (is_read(page) || !(reach > value)) continue;
            mass += mass_of(page);
            moment = fmaf(mass_of(page), reach, moment);
        }
        mass = block_sum(mass, shared);
        moment = block_sum(moment, shared);
        value = fmaxf(value, moment / (read + mass));
    }
    float excess = 0;
    for (uint32_t page = threadIdx.x; largest >= 0 && page < pages; page += blockDim.x)
        if (!is_read(page)) excess = fmaf(mass_of(page), fmaxf(norms[page] + outreach - value, 0.0f), excess);
    excess = block_sum(excess, shared);
    if (threadIdx.x != 0) return;
    // Not a number where nothing was read for sure: then the radius is all that is known.
    float bound = value + fmaxf(excess - read * value, 0.0f) / read;
    bound = bound < radius ? bound : radius;
    summary[7] = largest < 0 ? 0.0f : bound * (1.0f + UNREAD_ROUNDING) + UNREAD_ROUNDING * radius;
}
KERNEL(unread_bound);
