// Checks that kernels compute correct results on this processor.
#pragma once

#include <string>

#include "kernel_cpu.h"

namespace noetherperf {

// Describes the first fault; empty if there is none. Takes about two milliseconds a rule.
//
// mix_up tests the check itself: each variant is checked with the kernels of the next variant.
std::string self_check(const Kernels& kernels, bool mix_up = false);

}  // namespace noetherperf
