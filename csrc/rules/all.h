// The update rules that have kernels: use(name) of each. CMakeLists.txt lists them too.
#pragma once

#include "adam.h"
#include "given.h"
#include "sgd.h"

#define NPERF_EACH_RULE(use) use(sgd) use(adam) use(given)
