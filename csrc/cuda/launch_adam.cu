// The CUDA kernels of Adam and AdamW.

#include "kernels.cuh"

namespace noetherperf {

const Kernels adam_kernels = kernels_of<adam::Rule>();

}  // namespace noetherperf
