// Decode attention with INT8 keys and INT4 values near, by padded head width. attention_decode.cuh has the algorithm.

#include "attention_decode.cuh"

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
