// Prefill attention over exact pages, by padded head width. attention_prefill.cuh has the algorithm.

#include "attention_prefill.cuh"

PREFILL(prefill_attention_f16_16, 16, ExactPages)
KERNEL(prefill_attention_f16_16);
PREFILL(prefill_attention_f16_32, 32, ExactPages)
KERNEL(prefill_attention_f16_32);
PREFILL(prefill_attention_f16_64, 64, ExactPages)
KERNEL(prefill_attention_f16_64);
PREFILL(prefill_attention_f16_80, 80, ExactPages)
KERNEL(prefill_attention_f16_80);
PREFILL(prefill_attention_f16_96, 96, ExactPages)
KERNEL(prefill_attention_f16_96);
PREFILL(prefill_attention_f16_128, 128, ExactPages)
KERNEL(prefill_attention_f16_128);
PREFILL(prefill_attention_f16_256, 256, ExactPages)
KERNEL(prefill_attention_f16_256);
