// Decode attention with FP8 near pages, by padded head width. attention_decode.cuh has the algorithm.

#include "attention_decode.cuh"

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
