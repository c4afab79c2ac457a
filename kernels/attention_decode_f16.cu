// Decode attention without a near tier, by padded head width. attention_decode.cuh has the algorithm.

#include "attention_decode.cuh"

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
