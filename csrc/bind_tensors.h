// Python bindings of what reads tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace noetherperf {

void bind_tensors(pybind11::module_& m);

}  // namespace noetherperf
