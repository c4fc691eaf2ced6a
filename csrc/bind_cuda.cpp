// Python bindings of the CUDA engine: conversions only. Addresses are passed by name, so that none is mistaken for
// another. All memory is on the device and belongs to the caller.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "cuda/launch.h"

#if !defined(NPERF_CUDA_ARCHITECTURES)
#define NPERF_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace noetherperf {
namespace {

template <class T>
T* pointer(const py::object& address) {
  return reinterpret_cast<T*>(address.cast<uint64_t>());
}

class PyEngine {
 public:
  PyEngine(const std::string& rule, const py::dict& at, int64_t n_tensors, int64_t n_spans, int64_t n_groups,
           int64_t n_components, int64_t n_driving, int32_t n_ages, int32_t n_numbers,
           std::array<int32_t, n_laws> law_numbers, std::array<int32_t, n_laws> n_state_rows, int64_t moments_stride,
           std::array<int64_t, n_laws> states_stride)
      : kernels_(kernels_of(rule)),
        problem_{pointer<const Tensor>(at["tensors"]),
                 pointer<const Dim>(at["dims"]),
                 pointer<const View>(at["views"]),
                 pointer<const Tile>(at["tiles"]),
                 pointer<const Span>(at["spans"]),
                 pointer<const Component>(at["components"]),
                 pointer<const int32_t>(at["driving"]),
                 n_tensors,
                 n_spans,
                 n_groups,
                 n_components,
                 n_driving,
                 n_ages,
                 n_numbers,
                 {law_numbers[translation], law_numbers[norm]},
                 {n_state_rows[translation], n_state_rows[norm]},
                 pointer<double>(at["workspace"]),
                 pointer<double>(at["moments"]),
                 moments_stride,
                 {pointer<double>(at["translation"]), pointer<double>(at["norm"])},
                 {states_stride[translation], states_stride[norm]},
                 pointer<double>(at["propagators"]),
                 pointer<double>(at["clock"]),
                 pointer<uint8_t>(at["ages"]),
                 pointer<int32_t>(at["chosen"])} {}

  void launch(const std::vector<std::tuple<int, int, int64_t, int64_t>>& launches, const py::dict& at, bool scaled,
              bool measuring, uint64_t stream, bool first, bool second) const {
    std::vector<Launch> wanted;
    for (const auto& [dtype, variant, begin, end] : launches) wanted.push_back({dtype, variant, begin, end});
    const DeviceInputs given = inputs(at, scaled, measuring);
    py::gil_scoped_release release;
    void* const on = reinterpret_cast<void*>(stream);
    if (first) kernels_.first_stage(problem_, given, wanted, on);
    if (second) kernels_.second_stage(problem_, given, on);
  }

  int any_variant() const { return kernels_.any_variant; }

 private:
  static DeviceInputs inputs(const py::dict& at, bool scaled, bool measuring) {
    return {pointer<const uint64_t>(at["scalars"]),
            pointer<const double>(at["rows"]),
            pointer<const Group>(at["groups"]),
            pointer<const uint64_t>(at["addresses"]),
            pointer<const int32_t>(at["first"]),
            pointer<const uint8_t>(at["ages"]),
            scaled,
            measuring};
  }

  const Kernels& kernels_;
  DeviceProblem problem_;
};

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "noetherperf's CUDA engine; use it through noetherperf.SGD.";
  py::class_<PyEngine>(m, "Engine", py::module_local())
      .def(py::init<std::string, py::dict, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t,
                    std::array<int32_t, n_laws>, std::array<int32_t, n_laws>, int64_t, std::array<int64_t, n_laws>>(),
           py::arg("rule"), py::arg("addresses"), py::kw_only(), py::arg("n_tensors"), py::arg("n_spans"),
           py::arg("n_groups"), py::arg("n_components"), py::arg("n_driving"), py::arg("n_ages"), py::arg("n_numbers"),
           py::arg("law_numbers"), py::arg("n_state_rows"), py::arg("moments_stride"), py::arg("states_stride"))
      .def("launch", &PyEngine::launch,
           "Queue one step on a stream: the launches (dtype, variant, first tile, last tile + 1) of the first stage, "
           "then "
           "the second; or one of the two.",
           py::arg("launches"), py::arg("inputs"), py::kw_only(), py::arg("scaled"), py::arg("measuring"),
           py::arg("stream"), py::arg("first") = true, py::arg("second") = true)
      .def_property_readonly("any_variant", &PyEngine::any_variant,
                             "Instead of a variant: the kernel for all variants without their own.");
  m.attr("architectures") = NPERF_CUDA_ARCHITECTURES;
  m.def("n_devices", &n_devices, "How many devices the driver shows; RuntimeError says why there is none.");
}

}  // namespace
}  // namespace noetherperf
