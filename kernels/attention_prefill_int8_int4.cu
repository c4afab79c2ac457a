// Prefill attention with INT8 keys and INT4 values near, by padded head width. attention_prefill.cuh has the algorithm.

#include "attention_prefill.cuh"

PREFILL(prefill_attention_int8_int4_16, 16, Int8Int4Pages)
KERNEL(prefill_attention_int8_int4_16);
PREFILL(prefill_attention_int8_int4_32, 32, Int8Int4Pages)
KERNEL(prefill_attention_int8_int4_32);
PREFILL(prefill_attention_int8_int4_64, 64, Int8Int4Pages)
KERNEL(prefill_attention_int8_int4_64);
PREFILL(prefill_attention_int8_int4_80, 80, Int8Int4Pages)
KERNEL(prefill_attention_int8_int4_80);
PREFILL(prefill_attention_int8_int4_96, 96, Int8Int4Pages)
KERNEL(prefill_attention_int8_int4_96);
PREFILL(prefill_attention_int8_int4_128, 128, Int8Int4Pages)
KERNEL(prefill_attention_int8_int4_128);
PREFILL(prefill_attention_int8_int4_256, 256, Int8Int4Pages)
KERNEL(prefill_attention_int8_int4_256);
