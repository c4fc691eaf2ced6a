// Python bindings of the CPU engine: conversions and checks only.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "bind_tensors.h"
#include "floor_cpu.h"
#include "self_check.h"
#include "step_cpu.h"

namespace py = pybind11;

namespace noetherperf {
namespace {

// A table as an array of structs. Only the item size of the array's dtype is checked.
template <class T>
const T* table(const py::array& array, const char* name) {
  if (array.itemsize() != sizeof(T) || array.ndim() != 1 || !(array.flags() & py::array::c_style))
    throw py::value_error(std::string("table ") + name + ": expected a contiguous 1-d array of items of " +
                          std::to_string(sizeof(T)) + " bytes");
  return static_cast<const T*>(array.data());
}

template <class T>
const T* values(const py::array& array, int64_t at_least, const char* name) {
  if (array.itemsize() != sizeof(T) || array.size() < at_least || !(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + ": expected a contiguous array of at least " + std::to_string(at_least) +
                          " items of " + std::to_string(sizeof(T)) + " bytes");
  return static_cast<const T*>(array.data());
}

double* pointer(uint64_t address) { return reinterpret_cast<double*>(address); }

// A field's values among the kernels, each once, in order.
std::vector<std::string> names_of(const char* Kernels::* field) {
  std::vector<std::string> names;
  for (const Kernels* const kernels : available_kernels())
    if (std::find(names.begin(), names.end(), kernels->*field) == names.end()) names.emplace_back(kernels->*field);
  return names;
}

void check_name(const char* what, const std::string& name, const char* Kernels::* field) {
  std::string listed;
  for (const std::string& known : names_of(field)) {
    if (known == name) return;
    listed += (listed.empty() ? "" : ", ") + known;
  }
  throw py::value_error(std::string(what) + " \"" + name + "\" is not available here; choose one of: " + listed);
}

// The kernels of an instruction set for a rule.
const Kernels& find(const std::string& isa, const std::string& rule) {
  check_name("isa", isa, &Kernels::isa);
  check_name("rule", rule, &Kernels::rule);
  for (const Kernels* const kernels : available_kernels())
    if (isa == kernels->isa && rule == kernels->rule) return *kernels;
  throw std::logic_error("a build has the kernels of every rule for every instruction set");
}

// Keeps the tables alive for the engine that reads them.
class PyEngine {
 public:
  PyEngine(py::array tensors, py::array dims, py::array views, py::array tiles, py::array spans, py::array components,
           py::array driving, std::array<int32_t, n_laws> law_numbers, int64_t n_numbers, uint64_t workspace,
           uint64_t moments, int64_t moments_stride, std::array<uint64_t, n_laws> states,
           std::array<int64_t, n_laws> states_stride, uint64_t propagators, const std::string& isa,
           const std::string& rule)
      : tables_{tensors, dims, views, tiles, spans, components, driving},
        n_tensors_(tensors.size()),
        n_numbers_(n_numbers),
        engine_(Problem{table<Tensor>(tensors, "tensors"),
                        table<Dim>(dims, "dims"),
                        table<View>(views, "views"),
                        table<Tile>(tiles, "tiles"),
                        table<Span>(spans, "spans"),
                        table<Component>(components, "components"),
                        table<int32_t>(driving, "driving"),
                        tensors.size(),
                        tiles.size(),
                        spans.size(),
                        components.size(),
                        {law_numbers[translation], law_numbers[norm]},
                        n_numbers,
                        pointer(workspace),
                        pointer(moments),
                        moments_stride,
                        {pointer(states[translation]), pointer(states[norm])},
                        {states_stride[translation], states_stride[norm]},
                        pointer(propagators)},
                find(isa, rule)) {
    for (int64_t i = 0; i < n_tensors_; ++i)
      n_groups_ = std::max<int64_t>(n_groups_, table<Tensor>(tensors, "tensors")[i].group + 1);
  }

  void step(const py::array& addresses, const py::array& row_of, const py::array& rows, const py::array& groups,
            int n_threads, double unscale) {
    const Inputs in{values<uint64_t>(addresses, n_addresses(), "addresses"),
                    values<int32_t>(row_of, n_tensors_, "row_of"),
                    values<double>(rows, n_numbers_, "rows"),
                    rows.size() / n_numbers_,
                    values<Group>(groups, n_groups_, "groups"),
                    unscale};
    for (int64_t i = 0; i < n_tensors_; ++i)
      if (in.row_of[i] < 0 || in.row_of[i] >= in.n_rows) throw py::value_error("row_of: no such row");
    py::gil_scoped_release release;
    engine_.step(in, n_threads);
  }

  void measure(const py::array& addresses, int n_threads) {
    const Inputs in{values<uint64_t>(addresses, n_addresses(), "addresses"), nullptr, nullptr, 0, nullptr, 1.0};
    py::gil_scoped_release release;
    engine_.measure(in, n_threads);
  }

  std::string isa() const { return engine_.kernels().isa; }

 private:
  int64_t n_addresses() const { return (2 + engine_.kernels().n_buffers) * n_tensors_; }

  std::array<py::array, 7> tables_;
  int64_t n_tensors_, n_numbers_, n_groups_ = 0;
  Engine engine_;
};

// Field offsets, so that a test can compare the Python dtypes with these structs.
#define FIELD(Struct, name) field(#name, offsetof(Struct, name), sizeof(Struct::name))

py::dict layouts() {
  py::dict all, layout;
  // Not inlined: fifty copies take seconds to compile.
  const auto field = [&](const char* name, size_t offset, size_t size)
                         __attribute__((noinline)) { layout[name] = py::make_tuple(offset, size); };
  const auto finish = [&](const char* name, size_t size) {
    layout["__size__"] = size;
    all[name] = layout;
    layout = py::dict();
  };
  FIELD(Tensor, n_rows), FIELD(Tensor, n_cols), FIELD(Tensor, dims), FIELD(Tensor, n_dims), FIELD(Tensor, dense);
  FIELD(Tensor, dtype), FIELD(Tensor, group), FIELD(Tensor, view), FIELD(Tensor, n_views);
  finish("TENSOR", sizeof(Tensor));
  FIELD(Dim, size), FIELD(Dim, strides);
  finish("DIM", sizeof(Dim));
  FIELD(View, tensor), FIELD(View, by_row), FIELD(View, inner), FIELD(View, n_segments), FIELD(View, segment);
  FIELD(View, translation), FIELD(View, norm), FIELD(View, n_slices), FIELD(View, workspace);
  finish("VIEW", sizeof(View));
  FIELD(Tile, row_begin), FIELD(Tile, row_end), FIELD(Tile, col_begin), FIELD(Tile, col_end), FIELD(Tile, tensor);
  FIELD(Tile, row_slice), FIELD(Tile, col_slice), FIELD(Tile, padding);
  finish("TILE", sizeof(Tile));
  FIELD(Span, begin), FIELD(Span, end), FIELD(Span, view), FIELD(Span, tensor);
  finish("SPAN", sizeof(Span));
  FIELD(Group, variant), FIELD(Group, ages), FIELD(Group, row), FIELD(Group, padding);
  finish("GROUP", sizeof(Group));
  FIELD(Component, law), FIELD(Component, row), FIELD(Component, size), FIELD(Component, compensated);
  FIELD(Component, n_moments), FIELD(Component, moments), FIELD(Component, numbers), FIELD(Component, padding);
  finish("COMPONENT", sizeof(Component));
  return all;
}

void floor(const std::vector<uint64_t>& addresses, int n_written, int64_t n, int n_threads) {
  const int n_read = int(addresses.size());
  if (n_read < 2 || n_read > most_streams || n_written < 1 || n_written >= n_read)
    throw py::value_error("expected 2 to " + std::to_string(most_streams) + " streams, and one less written at most");
  std::vector<float*> streams;
  for (const uint64_t address : addresses) streams.push_back(reinterpret_cast<float*>(address));
  py::gil_scoped_release release;
  memory_floor(streams.data(), n_read, n_written, n, n_threads);
}

// By name; so that a test can compare the rules in Python with these.
py::dict rules() {
  py::dict all;
  for (const Kernels* const kernels : available_kernels()) {
    py::list moments;
    for (int m = 0; m < kernels->n_moments; ++m) moments.append(kernels->moments[m].name);
    all[kernels->rule] = py::dict(py::arg("moments") = moments, py::arg("n_coefficients") = kernels->n_coefficients,
                                  py::arg("n_buffers") = kernels->n_buffers,
                                  py::arg("n_variants") = kernels->n_variants, py::arg("n_kept") = kernels->n_kept);
  }
  return all;
}

// mix_up: a rule whose variants are checked with each other's kernels, as a test of the check itself.
std::string check(const std::string& isa, const std::string& mix_up) {
  check_name("isa", isa, &Kernels::isa);
  for (const Kernels* const kernels : available_kernels())
    if (isa == kernels->isa)
      if (const std::string wrong = self_check(*kernels, mix_up == kernels->rule); !wrong.empty()) return wrong;
  return "";
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "noetherperf's CPU engine; use it through noetherperf's optimizers.";
  py::class_<PyEngine>(m, "Engine", py::module_local())
      .def(py::init<py::array, py::array, py::array, py::array, py::array, py::array, py::array,
                    std::array<int32_t, n_laws>, int64_t, uint64_t, uint64_t, int64_t, std::array<uint64_t, n_laws>,
                    std::array<int64_t, n_laws>, uint64_t, const std::string&, const std::string&>(),
           py::arg("tensors"), py::arg("dims"), py::arg("views"), py::arg("tiles"), py::arg("spans"),
           py::arg("components"), py::arg("driving"), py::arg("law_numbers"), py::arg("n_numbers"),
           py::arg("workspace"), py::arg("moments"), py::arg("moments_stride"), py::arg("states"),
           py::arg("states_stride"), py::arg("propagators"), py::arg("isa"), py::arg("rule"))
      .def("step", &PyEngine::step, py::arg("addresses"), py::arg("row_of"), py::arg("rows"), py::arg("groups"),
           py::arg("n_threads"), py::arg("unscale") = 1.0)
      .def("measure", &PyEngine::measure, py::arg("addresses"), py::arg("n_threads"))
      .def_property_readonly("isa", &PyEngine::isa);
  bind_tensors(m);
  m.def("isas", [] { return names_of(&Kernels::isa); });
  m.def("rules", &rules, "Every rule that has kernels: its moments and how many coefficients and buffers it has.");
  m.def("self_check", &check, "What is wrong with the kernels of an instruction set here; empty if all is right.",
        py::arg("isa"), py::arg("mix_up") = "");
  m.def("layouts", &layouts);
  m.def("memory_floor", &floor, "Reads streams of n float32 at the addresses, writes the first of them in place.",
        py::arg("streams"), py::arg("n_written"), py::arg("n"), py::arg("n_threads"));
}

}  // namespace
}  // namespace noetherperf
