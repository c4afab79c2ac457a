// Pages of the key-value cache as the kernels hold them: 64 tokens of one key-value head, head width padded to W (a multiple of 16).
//
// Bytes lie in the order in which the lanes of a warp feed them to `mma.m16n8k16`, so that every lane copies with 16-byte asynchronous
// copies exactly the bytes it multiplies itself: no shared-memory bank conflict, no ldmatrix, no transposition.
// r = lane / 4, j = lane % 4. Padding channels hold zero keys; what padding value channels hold is never read back.
//
// key tile   (16 tokens x 16 channels): lane (r, j) holds channels 4j .. 4j+3 of tokens r and r + 8. As the left operand these are its four
//            registers, with channels 4j, 4j+1 in the place of columns 2j, 2j+1 and 4j+2, 4j+3 in that of 2j+8, 2j+9; queries use the
//            same permutation. As the right operand they are two tiles of 8 tokens.
// value tile (16 tokens x 16 channels): lane (r, j) holds tokens 2j, 2j+1, 2j+8, 2j+9 of channels r and r + 8.
//
// Exact page, 256 W + 128 bytes:
//   f16 value_norms[64]                  norm(v_t) rounded up
//   f16 keys[4 token tiles][W/16][32 lanes][2 tokens: r, r + 8][4 channels]
//   f16 values[4 token tiles][W/16][32 lanes][2 token pairs: 2j, 2j + 8][2 channels: r, r + 8][2 tokens]
// INT8 keys, INT4 values, 144 + 100 W + 256 ceil(W/32) bytes (W = 128: 13968, that is 218.25 per token):
//   f32 key_radius, value_error, max_key_scale, value_mean_square;   f16 value_norms[64]   norm(vhat_t) rounded up
//   f16 key_scale[W], key_zero[W];   u8 keys[2 halves of 32 tokens][W/16][32 lanes][4 rows: r, r + 8, r + 16, r + 24][4 channels]
//   u8 values[W/16][32 lanes][4 token tiles][8 nibbles: pair p = (r | r + 8) + 2 * (2j | 2j + 8), low token at nibble p, high at p + 4]
//   f16 value_scale[ceil(W/32)][4 j][8 eights of tokens][2], value_zero likewise, one behind the other for every group of 32 channels
// FP8 (e4m3), 160 + 128 W bytes:
//   f32 key_radius, value_error, key_scale, value_mean_square, value_scale, key_mean_square, 0, 0;   f16 value_norms[64]
//   u8 keys as INT8;   u8 values[2 halves of 32 tokens][W/16][32 lanes][2 token tiles][2 token pairs][2 channels][2 tokens]
#pragma once

#include "common.cuh"

constexpr int PAGE = 64;
constexpr int HEADER_BYTES = 16;
constexpr int NORMS_BYTES = 2 * PAGE;
constexpr int GROUP = 32;

// Entries of page lists: the slot of a page within its pool; the top bit says that it is an exact page.
constexpr uint32_t EXACT = 0x80000000u;

__host__ __device__ constexpr int num_groups(int width) { return (width + GROUP - 1) / GROUP; }

__host__ __device__ constexpr size_t exact_page_bytes(int width) { return NORMS_BYTES + 4 * (size_t)PAGE * width; }

__host__ __device__ constexpr size_t int8_int4_page_bytes(int width) {
    return HEADER_BYTES + NORMS_BYTES + 4 * (size_t)width + 96 * (size_t)width + 4 * (size_t)PAGE * num_groups(width);
}

__host__ __device__ constexpr size_t fp8_page_bytes(int width) { return 2 * HEADER_BYTES + NORMS_BYTES + 128 * (size_t)width; }

// Offsets, in elements, of a token's channel within the parts of a page.

__host__ __device__ inline int exact_key_index(int token, int channel, int width) {
    int lane = (token % 8) * 4 + channel % 16 / 4;
    return ((token / 16 * (width / 16) + channel / 16) * 32 + lane) * 8 + token / 8 % 2 * 4 + channel % 4;
}

__host__ __device__ inline int exact_value_index(int token, int channel, int width) {
    int lane = channel % 8 * 4 + token % 8 / 2;
    return ((token / 16 * (width / 16) + channel / 16) * 32 + lane) * 8 + token / 8 % 2 * 4 + channel / 8 % 2 * 2 + token % 2;
}

// Byte codes of keys, INT8 and FP8.
__host__ __device__ inline int byte_key_index(int token, int channel, int width) {
    int lane = (token % 8) * 4 + channel % 16 / 4;
    return ((token / 32 * (width / 16) + channel / 16) * 32 + lane) * 16 + token / 8 % 4 * 4 + channel % 4;
}

__host__ __device__ inline int byte_value_index(int token, int channel, int width) {
    int lane = channel % 8 * 4 + token % 8 / 2;
    int tile = ((token / 32 * (width / 16) + channel / 16) * 32 + lane) * 16 + token / 16 % 2 * 8;
    return tile + token / 8 % 2 * 4 + channel / 8 % 2 * 2 + token % 2;
}

// Nibble codes of values: index of the nibble, two to a byte, the low one first.
__host__ __device__ inline int nibble_value_index(int token, int channel) {
    int lane = channel % 8 * 4 + token % 8 / 2;
    int word = (channel / 16 * 32 + lane) * 4 + token / 16;
    return word * 8 + channel / 8 % 2 + token / 8 % 2 * 2 + token % 2 * 4;
}

// Place of a token within the 64 scales (or zeros) of a group of value channels.
__host__ __device__ inline int value_scale_index(int token) { return token % 8 / 2 * 16 + token / 8 * 2 + token % 2; }
