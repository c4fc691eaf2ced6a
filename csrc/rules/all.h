// The update rules that have kernels: use(name) of each. CMakeLists.txt lists them too.
#pragma once

#include "adam.h"
#include "given.h"
#include "sgd.h"

#define NPERF_EACH_RULE(use) use(sgd) use(adam) use(given)

#define NPERF_COUNT(rule) +1
namespace noetherperf {
constexpr int n_rules = NPERF_EACH_RULE(NPERF_COUNT);
}
