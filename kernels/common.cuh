// What every kernel includes first. Under nvcc it adds shared arrays and named instructions to CUDA; under a plain C++ compiler it
// brings CUDA itself, run on the CPU and checked (`emulate/emulate.h`). README.md in this folder says how kernels are written.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "instructions.cuh"

#define KERNEL(name) static_assert(true, "")

#else

#include "emulate/emulate.h"

#endif

#include <cstdint>

// The whole warp, as the masks of warp-wide operations want it.
constexpr unsigned all_lanes = 0xffffffffu;
