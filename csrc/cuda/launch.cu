// The CUDA engine: one thread block per tile (tile.cuh), then one per span of segments (finish.cuh). No atomics, so
// runs agree bit for bit. Bytes, registers and bytes in flight are counted in docs/performance.md; tests/cuda_emulation
// executes this source on a CPU.

#include "launch.h"

#include <stdexcept>

#include "device.cuh"

namespace noetherperf {

const Kernels& kernels_of(const std::string& rule) {
  std::string names;
#define NPERF_ADDRESS(rule) &rule##_kernels,
  for (const Kernels* const kernels : {NPERF_EACH_RULE(NPERF_ADDRESS)}) {
    if (rule == kernels->rule) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->rule;
  }
  throw std::invalid_argument("there are no CUDA kernels of the update rule \"" + rule + "\"; there are those of " +
                              names);
}

int n_devices() {
#if defined(__CUDACC__)
  int n = 0;
  const cudaError_t error = cudaGetDeviceCount(&n);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return n;
#else
  return 0;
#endif
}

}  // namespace noetherperf
