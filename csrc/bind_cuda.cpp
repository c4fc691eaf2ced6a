// Python's way into the CUDA engine: conversion, nothing else. Addresses come by name, so that none is taken for
// another; all of them are the caller's and on the device.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "step_cuda.h"

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
  PyEngine(const py::dict& at, int64_t n_tensors, int64_t n_spans, int64_t n_hypers, int64_t moments_stride,
           std::array<int64_t, n_laws> states_stride)
      : problem_{pointer<const Tensor>(at["tensors"]),
                 pointer<const Dim>(at["dims"]),
                 pointer<const View>(at["views"]),
                 pointer<const Tile>(at["tiles"]),
                 pointer<const Span>(at["spans"]),
                 n_tensors,
                 n_spans,
                 n_hypers,
                 pointer<double>(at["workspace"]),
                 pointer<double>(at["moments"]),
                 moments_stride,
                 {pointer<double>(at["translation"]), pointer<double>(at["norm"])},
                 {states_stride[translation], states_stride[norm]},
                 pointer<double>(at["propagators"]),
                 pointer<double>(at["clock"]),
                 pointer<uint8_t>(at["fresh"]),
                 pointer<uint8_t>(at["pending"])} {}

  void find_transitions(const py::dict& at, uint64_t stream) const {
    noetherperf::find_transitions(problem_.n_hypers, inputs(at, false, false), reinterpret_cast<void*>(stream));
  }

  void launch(const std::vector<std::tuple<int, int, int64_t, int64_t>>& launches, const py::dict& at, bool scaled,
              bool measuring, uint64_t stream) const {
    std::vector<Launch> wanted;
    for (const auto& [dtype, variant, begin, end] : launches) wanted.push_back({dtype, variant, begin, end});
    const Inputs given = inputs(at, scaled, measuring);
    py::gil_scoped_release release;
    noetherperf::launch(problem_, given, wanted, reinterpret_cast<void*>(stream));
  }

 private:
  static Inputs inputs(const py::dict& at, bool scaled, bool measuring) {
    return {pointer<const uint64_t>(at["scalars"]),
            pointer<const DeviceLr>(at["lrs"]),
            pointer<const Hyper>(at["hypers"]),
            pointer<const uint64_t>(at["addresses"]),
            pointer<const uint8_t>(at["first"]),
            pointer<Transitions>(at["transitions"]),
            scaled,
            measuring};
  }

  Problem problem_;
};

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "noetherperf's CUDA engine; use it through noetherperf.SGD.";
  py::class_<PyEngine>(m, "Engine", py::module_local())
      .def(py::init<py::dict, int64_t, int64_t, int64_t, int64_t, std::array<int64_t, n_laws>>(), py::arg("addresses"),
           py::kw_only(), py::arg("n_tensors"), py::arg("n_spans"), py::arg("n_hypers"), py::arg("moments_stride"),
           py::arg("states_stride"))
      .def("find_transitions", &PyEngine::find_transitions,
           "Put on a stream what finds the transitions of the inputs' hyperparameters, and leaves them there.",
           py::arg("inputs"), py::kw_only(), py::arg("stream"))
      .def(
          "launch", &PyEngine::launch,
          "Put one step on a stream: the launches (dtype, variant, first tile, last tile + 1) of the first stage, then "
          "the second.",
          py::arg("launches"), py::arg("inputs"), py::kw_only(), py::arg("scaled"), py::arg("measuring"),
          py::arg("stream"));
  m.attr("ANY") = any;
  m.attr("N_TRANSITIONS") = sizeof(Transitions) / sizeof(double);
  m.attr("architectures") = NPERF_CUDA_ARCHITECTURES;
  m.def("n_devices", &n_devices, "How many devices the driver shows; RuntimeError says why there is none.");
}

}  // namespace
}  // namespace noetherperf
