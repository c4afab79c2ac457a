// Rows of the embedding table, widened. x[t] = table[ids[t]]
// table: [vocab, stride] f16, the first `width` of each row   ids: [rows]   x: [rows, width] f32
// One block per row. The host has checked every id against the vocabulary.

#include "common.cuh"

extern "C" __global__ void embedding_rows_f16(const __half *__restrict__ table, const unsigned *__restrict__ ids, float *__restrict__ x,
                                              unsigned width, unsigned stride) {
    const __half *row = table + size_t(ids[blockIdx.x]) * stride;
    float *out = x + size_t(blockIdx.x) * width;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) out[i] = __half2float(row[i]);
}
KERNEL(embedding_rows_f16);
