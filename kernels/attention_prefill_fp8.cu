// Prefill attention with FP8 near pages, by padded head width. attention_prefill.cuh has the algorithm.

#include "attention_prefill.cuh"

PREFILL(prefill_attention_fp8_16, 16, Fp8Pages)
KERNEL(prefill_attention_fp8_16);
PREFILL(prefill_attention_fp8_32, 32, Fp8Pages)
KERNEL(prefill_attention_fp8_32);
PREFILL(prefill_attention_fp8_64, 64, Fp8Pages)
KERNEL(prefill_attention_fp8_64);
PREFILL(prefill_attention_fp8_80, 80, Fp8Pages)
KERNEL(prefill_attention_fp8_80);
PREFILL(prefill_attention_fp8_96, 96, Fp8Pages)
KERNEL(prefill_attention_fp8_96);
PREFILL(prefill_attention_fp8_128, 128, Fp8Pages)
KERNEL(prefill_attention_fp8_128);
PREFILL(prefill_attention_fp8_256, 256, Fp8Pages)
KERNEL(prefill_attention_fp8_256);
