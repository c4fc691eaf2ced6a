// CUDA, or its emulation on a CPU (tests/cuda_emulation), and how kernels are declared and launched.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SHARED(name, ...) __shared__ __VA_ARGS__ name
#define DYNAMIC_SHARED(name, type) extern __shared__ type name[]
#define NPERF_D __device__ __forceinline__
#else
#include "cuda_emulation.h"
#define NPERF_D inline
#endif

namespace noetherperf {

constexpr int n_finishers = 64;  // threads of a block of the second stage
constexpr unsigned all_lanes = 0xffffffffu;

}  // namespace noetherperf
