// Whether the kernels of an instruction set compute what they should, on this processor.
#pragma once

#include <string>

#include "kernel_cpu.h"

namespace noetherperf {

// What is wrong, nothing if all is right. Takes a millisecond or two.
//
// mix_up, for a test of the check itself: the kernels of each mode are taken for those of the mode before it.
std::string self_check(const Kernels& kernels, bool mix_up = false);

}  // namespace noetherperf
