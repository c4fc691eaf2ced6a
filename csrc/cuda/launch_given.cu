// The CUDA kernels of a step that another optimizer has made.

#include "kernels.cuh"

namespace noetherperf {

const Kernels given_kernels = kernels_of<given::Rule>();

}  // namespace noetherperf
