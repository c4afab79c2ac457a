// New keys (after rotary embedding) and values enter the cache as exact pages; full pages are then encoded once for the near tier.
// A page with a number that is not finite gets codes of finite ones and infinite errors, so that no certificate accepts it.

#include "numbers.cuh"
#include "page.cuh"

// Writes one token of one key-value head: grid [rows, kv_heads], any block of whole warps.
//   keys, values: f32 [rows, kv_heads * head_dim]
//   slots: [kv_heads, slots_stride] slot of the exact page of each position / 64 - first_page
extern "C" __global__ void kv_append_f16(const float *keys, const float *values, uint8_t *exact_pages, const uint32_t *slots, uint32_t slots_stride, uint32_t first_page, uint32_t first_position, uint32_t head_dim, uint32_t width) {
    SHARED_ARRAY(float, partial, 32);
    uint32_t head = blockIdx.y, position = first_position + blockIdx.x;
    uint32_t slot = slots[head * slots_stride + position / PAGE - first_page];
    uint8_t *page = exact_pages + slot * exact_page_bytes(width);
    __half *page_keys = (__half *)(page + NORMS_BYTES), *page_values = page_keys + PAGE * width;
    size_t row = ((size_t)blockIdx.x * gridDim.y + head) * head_dim;
    int token = position % PAGE;
    float squares = 0;
    for (uint32_t channel = threadIdx.x; channel < width; channel += blockDim.x) {
        bool real = channel < head_dim;
        __half key = finite_half(real ? keys[row + channel] : 0.0f);
        __half value = finite_half(real ? values[row + channel] : 0.0f);
        page_keys[exact_key_index(token, channel, width)] = key;
        page_values[exact_value_index(token, channel, width)] = value;
        squares += __half2float(value) * __half2float(value);
    }
    squares = block_sum(squares, partial);
    if (threadIdx.x == 0) ((__half *)page)[token] = half_up(sqrtf(squares) * ROUNDED_UP);
}
KERNEL(kv_append_f16);

// Errors of the tokens of a page while it is encoded.
struct Errors {
    float largest = 0, total = 0;

    __device__ void add(float square) {
        largest = fmaxf(largest, square);
        total += square;
    }
};

// Largest (rounded up) and mean of what the warps of a block saw; valid in thread 0. `shared` holds two floats per warp.
static __device__ Errors block_errors(Errors mine, Shared<float> shared) {
    int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        shared[2 * warp] = mine.largest;
        shared[2 * warp + 1] = mine.total;
    }
    __syncthreads();
    Errors all;
    for (int other = 0; threadIdx.x == 0 && other < (int)blockDim.x / 32; other++) {
        all.largest = fmaxf(all.largest, shared[2 * other]);
        all.total += shared[2 * other + 1];
    }
    all.largest = sqrtf(all.largest) * ROUNDED_UP;
    all.total /= PAGE;
    return all;
}

// One block of 256 threads per page: job i encodes exact page `sources[i]` into near page `targets[i]`.
extern "C" __global__ void kv_encode_int8_int4(const uint8_t *exact_pages, uint8_t *near_pages, const uint32_t *sources, const uint32_t *targets, uint32_t head_dim, uint32_t width) {
    SHARED_ARRAY(float, scale, 256);
    SHARED_ARRAY(float, zero, 256);
    SHARED_ARRAY(float, shared, 32);
    SHARED_ARRAY(uint8_t, codes, PAGE * 256);
    const uint8_t *source = exact_pages + sources[blockIdx.x] * exact_page_bytes(width);
    const __half *keys = (const __half *)(source + NORMS_BYTES), *values = keys + PAGE * width;
    uint8_t *page = near_pages + targets[blockIdx.x] * int8_int4_page_bytes(width);
    __half *norms = (__half *)(page + HEADER_BYTES), *key_scale = norms + PAGE, *key_zero = key_scale + width;
    uint32_t *key_codes = (uint32_t *)(key_zero + width), *value_codes = key_codes + PAGE / 4 * width;
    __half *value_scales = (__half *)(value_codes + PAGE / 8 * width);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;

    float largest_scale = 0;
    for (uint32_t channel = threadIdx.x; channel < width; channel += blockDim.x) {
        float low = INFINITY, high = -INFINITY;
        for (int token = 0; token < PAGE; token++) {
            float key = number(keys[exact_key_index(token, channel, width)]);
            low = fminf(low, key);
            high = fmaxf(high, key);
        }
        __half rounded = half_up((high - low) / 255.0f);
        key_scale[channel] = rounded;
        key_zero[channel] = __float2half_rn(low);
        scale[channel] = __half2float(rounded);
        zero[channel] = low;
        largest_scale = fmaxf(largest_scale, scale[channel]);
    }
    largest_scale = block_max(largest_scale, shared);
    __syncthreads();

    Errors key_errors;
    for (int token = warp; token < PAGE; token += num_warps) {
        float square = 0;
        for (uint32_t channel = 4 * lane; channel < width; channel += 128) {
            uint32_t word = 0;
            for (uint32_t c = channel; c < channel + 4; c++) {
                __half original = keys[exact_key_index(token, c, width)];
                float key = number(original);
                int code = affine_code(key, zero[c], scale[c], 255);
                float error = key - fmaf(scale[c], (float)code, zero[c]);
                square = is_number(original) ? fmaf(error, error, square) : INFINITY;
                word |= (uint32_t)code << 8 * (c - channel);
            }
            key_codes[byte_key_index(token, channel, width) / 4] = word;
        }
        key_errors.add(warp_sum(square));
    }
    key_errors = block_errors(key_errors, shared);

    Errors value_errors;
    for (int token = warp; token < PAGE; token += num_warps) {
        float square = 0, norm = 0;
        for (int group = 0; group < num_groups(width); group++) {
            uint32_t channel = group * GROUP + lane;
            bool real = channel < head_dim;
            __half original = real ? values[exact_value_index(token, channel, width)] : __float2half_rn(0.0f);
            float value = number(original);
            float low = warp_min(real ? value : INFINITY), high = warp_max(real ? value : -INFINITY);
            bool empty = group * GROUP >= (int)head_dim;
            low = empty ? 0.0f : low;
            __half rounded = empty ? __float2half_rn(0.0f) : half_up((high - low) / 15.0f);
            float step = __half2float(rounded);
            int code = real ? affine_code(value, low, step, 15) : 0;
            float decoded = real ? fmaf(step, (float)code, low) : 0.0f;
            float error = real ? value - decoded : 0.0f;
            square = is_number(original) ? fmaf(error, error, square) : INFINITY;
            norm = fmaf(decoded, decoded, norm);
            if (channel < width) codes[nibble_value_index(token, channel)] = code;
            if (lane == 0) {
                value_scales[group * 2 * PAGE + value_scale_index(token)] = rounded;
                value_scales[(group * 2 + 1) * PAGE + value_scale_index(token)] = __float2half_rn(low);
            }
        }
        value_errors.add(warp_sum(square));
        norm = sqrtf(warp_sum(norm)) * ROUNDED_UP;
        if (lane == 0) norms[token] = half_up(norm);
    }
    value_errors = block_errors(value_errors, shared);
    for (uint32_t word = threadIdx.x; word < PAGE / 8 * width; word += blockDim.x) {
        uint32_t packed = 0;
        for (int nibble = 0; nibble < 8; nibble++) packed |= (uint32_t)codes[word * 8 + nibble] << 4 * nibble;
        value_codes[word] = packed;
    }
    if (threadIdx.x == 0) {
        float *header = (float *)page;
        header[0] = key_errors.largest;
        header[1] = value_errors.largest;
        header[2] = largest_scale;
        header[3] = value_errors.total;
    }
}
KERNEL(kv_encode_int8_int4);

// One block of 256 threads per page, jobs as above: e4m3 codes of x / scale, scale = f16 rounded up of max |x| / 448 over the page.
extern "C" __global__ void kv_encode_fp8(const uint8_t *exact_pages, uint8_t *near_pages, const uint32_t *sources, const uint32_t *targets, uint32_t head_dim, uint32_t width) {
    SHARED_ARRAY(float, shared, 32);
    const uint8_t *source = exact_pages + sources[blockIdx.x] * exact_page_bytes(width);
    const __half *keys = (const __half *)(source + NORMS_BYTES), *values = keys + PAGE * width;
    uint8_t *page = near_pages + targets[blockIdx.x] * fp8_page_bytes(width);
    __half *norms = (__half *)(page + 2 * HEADER_BYTES);
    uint8_t *key_codes = (uint8_t *)(norms + PAGE), *value_codes = key_codes + PAGE * width;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;

    float largest_key = 0, largest_value = 0;
    for (uint32_t i = threadIdx.x; i < PAGE * width; i += blockDim.x) {
        int token = i / width, channel = i % width;
        if (channel >= (int)head_dim) continue;
        largest_key = fmaxf(largest_key, fabsf(number(keys[exact_key_index(token, channel, width)])));
        largest_value = fmaxf(largest_value, fabsf(number(values[exact_value_index(token, channel, width)])));
    }
    float key_scale = __half2float(half_up(block_max(largest_key, shared) / 448.0f));
    float value_scale = __half2float(half_up(block_max(largest_value, shared) / 448.0f));

    Errors key_errors, value_errors;
    for (int token = warp; token < PAGE; token += num_warps) {
        float key_square = 0, value_square = 0, norm = 0;
        for (uint32_t channel = lane; channel < width; channel += 32) {
            bool real = channel < head_dim;
            const __half nothing = __float2half_rn(0.0f);
            __half key_original = real ? keys[exact_key_index(token, channel, width)] : nothing;
            __half value_original = real ? values[exact_value_index(token, channel, width)] : nothing;
            float key = number(key_original), value = number(value_original);
            uint8_t key_code = e4m3_code(key_scale > 0 ? key / key_scale : 0.0f);
            uint8_t value_code = e4m3_code(value_scale > 0 ? value / value_scale : 0.0f);
            key_codes[byte_key_index(token, channel, width)] = key_code;
            value_codes[byte_value_index(token, channel, width)] = value_code;
            float key_error = key - key_scale * e4m3_value(key_code), decoded = value_scale * e4m3_value(value_code);
            key_square = is_number(key_original) ? fmaf(key_error, key_error, key_square) : INFINITY;
            value_square = is_number(value_original) ? fmaf(value - decoded, value - decoded, value_square) : INFINITY;
            norm = fmaf(decoded, decoded, norm);
        }
        key_errors.add(warp_sum(key_square));
        value_errors.add(warp_sum(value_square));
        norm = sqrtf(warp_sum(norm)) * ROUNDED_UP;
        if (lane == 0) norms[token] = half_up(norm);
    }
    key_errors = block_errors(key_errors, shared);
    value_errors = block_errors(value_errors, shared);
    if (threadIdx.x == 0) {
        float *header = (float *)page;
        header[0] = key_errors.largest;
        header[1] = value_errors.largest;
        header[2] = key_scale;
        header[3] = value_errors.total;
        header[4] = value_scale;
        header[5] = key_errors.total;
        header[6] = header[7] = 0;
    }
}
KERNEL(kv_encode_fp8);
