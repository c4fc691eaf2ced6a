// Python bindings of what reads tensors: conversions and checks only.

#include "bind_tensors.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gatherer.h"
#include "glance.h"
#include "tensors.h"
#include "watch.h"

namespace py = pybind11;

namespace noetherperf {
namespace {

// The newest table of DLPack 1 that a tensor type has.
const dlpack::ExchangeTable& exchange_table(const py::object& tensor_type) {
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* header =
      static_cast<const dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) throw py::error_already_set();
  while (header != nullptr && header->major != 1) header = header->previous;
  const auto* const found = reinterpret_cast<const dlpack::ExchangeTable*>(header);
  if (found == nullptr || found->describe == nullptr)
    throw py::attribute_error("the tensor type does not describe its tensors by DLPack 1");
  return *found;
}

Describe describe(const py::object& tensor_type) { return Describe(exchange_table(tensor_type)); }

Readable readable(const py::object& tensor_type, const py::object& usual, const py::list& plain,
                  const py::list& negated) {
  if (plain.size() != negated.size()) throw py::value_error("expected as many negated tensors as plain ones");
  const Readable made(tensor_type.ptr(), usual.ptr(), plain.ptr(), negated.ptr(), describe(tensor_type));
  if (PyErr_Occurred()) throw py::error_already_set();
  return made;
}

std::vector<int64_t> read(TensorReader& reader, const py::list& tensors,
                          py::array_t<uint64_t, py::array::c_style>& addresses, int64_t column) {
  if (static_cast<int64_t>(tensors.size()) != reader.size() || addresses.ndim() != 2 ||
      addresses.shape(0) != reader.size() || column < 0 || column >= addresses.shape(1))
    throw py::value_error("expected " + std::to_string(reader.size()) + " tensors, and a row of addresses for each");
  const std::vector<int64_t> changed =
      reader.read(tensors.ptr(), addresses.mutable_data() + column, addresses.shape(1));
  if (PyErr_Occurred()) throw py::error_already_set();
  return changed;
}

void remember(TensorReader& reader, int64_t i, const py::object& tensor) {
  if (i < 0 || i >= reader.size()) throw py::index_error("tensor " + std::to_string(i));
  if (!reader.remember(i, tensor.ptr())) throw py::type_error("DLPack does not describe this tensor");
  reader.hint(i, py::getattr(tensor.attr("untyped_storage")(), "_cdata", py::int_(0)).cast<uintptr_t>());
}

// The list that fill(list) fills, and a byte for each item: 1 if it is None.
template <class Fill>
py::tuple gather(const Gatherer& gatherer, Fill fill) {
  const int64_t n = gatherer.size();
  py::list found(n);
  for (int64_t i = 0; i < n; ++i) {
    Py_INCREF(Py_None);
    PyList_SET_ITEM(found.ptr(), i, Py_None);
  }
  if (!fill(found.ptr())) throw py::error_already_set();
  std::string missing(n, '\0');
  for (int64_t i = 0; i < n; ++i) missing[i] = PyList_GET_ITEM(found.ptr(), i) == Py_None;
  return py::make_tuple(found, py::bytes(missing));
}

py::tuple attributes(Gatherer& gatherer, const py::list& params, const py::str& name) {
  if (static_cast<int64_t>(params.size()) != gatherer.size())
    throw py::value_error("expected " + std::to_string(gatherer.size()) + " parameters, got " +
                          std::to_string(params.size()));
  return gather(gatherer, [&](PyObject* to) { return gatherer.attributes(params.ptr(), name.ptr(), to); });
}

py::tuple items(Gatherer& gatherer, const py::dict& state, const py::str& name) {
  return gather(gatherer, [&](PyObject* to) { return gatherer.items(state.ptr(), name.ptr(), to); });
}

void check_length(const Watch& watch, size_t n) {
  if (static_cast<int64_t>(n) < watch.at_least())
    throw py::value_error("expected at least " + std::to_string(watch.at_least()) + " tensors, got " +
                          std::to_string(n));
}

std::vector<int64_t> look(const Watch& watch, const py::list& tensors) {
  check_length(watch, tensors.size());
  return watch.look(tensors.ptr());
}

void know(Watch& watch, int64_t i, const py::object& tensor) {
  if (!watch.know(i, tensor.ptr())) throw py::error_already_set();
}

void expect(Watch& watch, const py::bytes& missing) {
  const std::string_view view = missing;
  check_length(watch, view.size());
  watch.expect(view.data());
}

// Keeps alive what a Glance refers to.
class PyGlance {
 public:
  PyGlance(const py::list& params, const std::vector<int64_t>& sizes, const py::object& gatherer,
           const py::list& readers, const py::list& watches, const py::list& keys, const py::object& counts,
           const py::object& count_key, py::array_t<uint64_t, py::array::c_style>& addresses)
      : kept_(checked(sizes, params, readers, watches, keys, addresses, gatherer, counts, count_key)),
        glance_(params.ptr(), sizes, gatherer.cast<Gatherer&>(), columns(readers, watches), pointers(keys),
                watch(counts), count_key.ptr(), addresses.mutable_data()) {}

  // A list of the gradients and buffers, None if something is not as before.
  py::object look(const py::list& groups, const py::dict& state) {
    std::vector<PyObject*> keep;
    keep.reserve(n_kept_);
    const bool same = glance_.is_as_before(groups.ptr(), state.ptr(), params_name_.ptr(), grad_name_.ptr(), keep);
    n_kept_ = keep.size();
    py::list kept(keep.size());
    for (size_t i = 0; i < keep.size(); ++i) PyList_SET_ITEM(kept.ptr(), i, keep[i]);
    if (same) return kept;
    if (PyErr_Occurred()) throw py::error_already_set();
    return py::none();
  }

 private:
  // The objects that must live as long as the glance.
  template <class... Others>
  static py::tuple checked(const std::vector<int64_t>& sizes, const py::list& params, const py::list& readers,
                           const py::list& watches, const py::list& keys, const py::array& addresses,
                           const Others&... others) {
    const auto n = static_cast<int64_t>(params.size());
    const size_t n_columns = 2 + keys.size();
    if (std::accumulate(sizes.begin(), sizes.end(), int64_t(0)) != n || readers.size() != n_columns ||
        watches.size() != n_columns || addresses.ndim() != 2 || addresses.shape(0) != n ||
        addresses.shape(1) != static_cast<py::ssize_t>(n_columns))
      throw py::value_error("expected " + std::to_string(n) + " parameters in the groups, and a reader, a watch or " +
                            "None, and a column of addresses for parameters, gradients and each of the buffers");
    for (const py::handle reader : readers)
      if (reader.cast<TensorReader&>().size() != n) throw py::value_error("a reader of another number of tensors");
    return py::make_tuple(params, readers, watches, keys, addresses, others...);
  }

  static const Watch* watch(const py::handle& object) {
    return object.is_none() ? nullptr : &object.cast<const Watch&>();
  }

  static std::vector<Column> columns(const py::list& readers, const py::list& watches) {
    std::vector<Column> made;
    for (size_t k = 0; k < readers.size(); ++k)
      made.push_back({&py::handle(readers[k]).cast<TensorReader&>(), watch(py::handle(watches[k]))});
    return made;
  }

  static std::vector<PyObject*> pointers(const py::list& list) {
    std::vector<PyObject*> found;
    for (const py::handle item : list) found.push_back(item.ptr());
    return found;
  }

  py::tuple kept_;
  // Interned, as Python's caches of attributes need it.
  py::object params_name_ = py::reinterpret_steal<py::object>(PyUnicode_InternFromString("params"));
  py::object grad_name_ = py::reinterpret_steal<py::object>(PyUnicode_InternFromString("grad"));
  size_t n_kept_ = 0;
  Glance glance_;
};

}  // namespace

void bind_tensors(py::module_& m) {
  py::class_<Readable>(m, "Readable", py::module_local())
      .def(py::init(&readable), py::arg("tensor_type"), py::arg("usual"), py::arg("plain"), py::arg("negated"))
      .def_property_readonly("is_quick", &Readable::is_quick);
  py::class_<TensorReader>(m, "TensorReader", py::module_local())
      .def(py::init([](int64_t n, const py::object& tensor_type, const Readable& readable) {
             return TensorReader(n, describe(tensor_type), readable);
           }),
           py::arg("n"), py::arg("tensor_type"), py::arg("readable"))
      .def("read", &read, py::arg("tensors"), py::arg("addresses").noconvert(), py::arg("column"))
      .def("remember", &remember, py::arg("i"), py::arg("tensor"));
  py::class_<Gatherer>(m, "Gatherer", py::module_local())
      .def(py::init([](const py::list& params, const py::object& tensor_type) {
             return Gatherer(params.ptr(), describe(tensor_type));
           }),
           py::arg("params"), py::arg("tensor_type"))
      .def("attributes", &attributes, py::arg("params"), py::arg("name"))
      .def("items", &items, py::arg("state"), py::arg("name"));
  py::class_<Watch>(m, "Watch", py::module_local())
      .def(py::init([](const std::vector<int64_t>& which, const py::object& tensor_type, bool kept) {
             return std::make_unique<Watch>(which, tensor_type.attr("_version").ptr(), describe(tensor_type), kept);
           }),
           py::arg("which"), py::arg("tensor_type"), py::arg("kept"))
      .def("look", &look, py::arg("tensors"))
      .def("know", &know, py::arg("i"), py::arg("tensor"))
      .def("expect", &expect, py::arg("missing"));
  py::class_<PyGlance>(m, "Glance", py::module_local())
      .def(
          py::init<const py::list&, const std::vector<int64_t>&, const py::object&, const py::list&, const py::list&,
                   const py::list&, const py::object&, const py::object&, py::array_t<uint64_t, py::array::c_style>&>(),
          py::arg("params"), py::arg("sizes"), py::arg("gatherer"), py::arg("readers"), py::arg("watches"),
          py::arg("keys"), py::arg("counts"), py::arg("count_key"), py::arg("addresses").noconvert())
      .def("look", &PyGlance::look, py::arg("groups"), py::arg("state"));
}

}  // namespace noetherperf
