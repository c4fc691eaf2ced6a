// The CUDA kernels of stochastic gradient descent.

#include "kernels.cuh"

namespace noetherperf {

const Kernels sgd_kernels = kernels_of<sgd::Rule>();

}  // namespace noetherperf
