// Decode attention by near tier and padded head width. attention_decode.cuh has the algorithm.

#include "attention_decode.cuh"

#define DECODE(name, width, near)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * DECODE_WARPS)                                                                         \
        name(const float *queries, const uint8_t *exact_pages, const uint8_t *near_pages, const uint32_t *lists,                             \
             const uint32_t *list_lengths, float *partials, float *page_facts, uint32_t last_tokens, uint32_t list_stride, uint32_t group,   \
             uint32_t head_dim) {                                                                                                            \
        decode_attention<width, near>({queries, exact_pages, near_pages, lists, list_lengths, partials, page_facts, last_tokens,             \
                                       list_stride, group, head_dim});                                                                       \
    }

DECODE(decode_attention_f16_16, 16, NoNear)
KERNEL(decode_attention_f16_16);
DECODE(decode_attention_f16_32, 32, NoNear)
KERNEL(decode_attention_f16_32);
DECODE(decode_attention_f16_64, 64, NoNear)
KERNEL(decode_attention_f16_64);
DECODE(decode_attention_f16_80, 80, NoNear)
KERNEL(decode_attention_f16_80);
DECODE(decode_attention_f16_96, 96, NoNear)
KERNEL(decode_attention_f16_96);
DECODE(decode_attention_f16_128, 128, NoNear)
KERNEL(decode_attention_f16_128);
DECODE(decode_attention_f16_256, 256, NoNear)
KERNEL(decode_attention_f16_256);
DECODE(decode_attention_fp8_16, 16, Fp8)
KERNEL(decode_attention_fp8_16);
DECODE(decode_attention_fp8_32, 32, Fp8)
KERNEL(decode_attention_fp8_32);
DECODE(decode_attention_fp8_64, 64, Fp8)
KERNEL(decode_attention_fp8_64);
DECODE(decode_attention_fp8_80, 80, Fp8)
KERNEL(decode_attention_fp8_80);
DECODE(decode_attention_fp8_96, 96, Fp8)
KERNEL(decode_attention_fp8_96);
DECODE(decode_attention_fp8_128, 128, Fp8)
KERNEL(decode_attention_fp8_128);
DECODE(decode_attention_fp8_256, 256, Fp8)
KERNEL(decode_attention_fp8_256);
DECODE(decode_attention_int8_int4_16, 16, Int8Int4)
KERNEL(decode_attention_int8_int4_16);
DECODE(decode_attention_int8_int4_32, 32, Int8Int4)
KERNEL(decode_attention_int8_int4_32);
DECODE(decode_attention_int8_int4_64, 64, Int8Int4)
KERNEL(decode_attention_int8_int4_64);
DECODE(decode_attention_int8_int4_80, 80, Int8Int4)
KERNEL(decode_attention_int8_int4_80);
DECODE(decode_attention_int8_int4_96, 96, Int8Int4)
KERNEL(decode_attention_int8_int4_96);
DECODE(decode_attention_int8_int4_128, 128, Int8Int4)
KERNEL(decode_attention_int8_int4_128);
DECODE(decode_attention_int8_int4_256, 256, Int8Int4)
KERNEL(decode_attention_int8_int4_256);
