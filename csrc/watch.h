// Detects tensors that other code has written or replaced since the last step.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "tensors.h"

namespace noetherperf {

// Detects tensors that were written or replaced, by identity and version counter. Keeps no tensor alive.
class Watch {
 public:
  // which: the indices of the watched tensors. counter: the descriptor of torch.Tensor._version, whose getter is called
  // directly: a lookup for each tensor takes twice as long. kept: the caller keeps the known tensors alive.
  Watch(const std::vector<int64_t>& which, PyObject* counter, Describe describe, bool kept)
      : known_(which.size()), describe_(describe), kept_(kept) {
    for (size_t k = 0; k < which.size(); ++k) {
      known_[k].number = which[k];
      place_[which[k]] = k;
      at_least_ = std::max(at_least_, which[k] + 1);
    }
    if (Py_IS_TYPE(counter, &PyGetSetDescr_Type)) {
      const auto* const descriptor = reinterpret_cast<const PyGetSetDescrObject*>(counter);
      type_ = PyDescr_TYPE(descriptor);
      get_ = *descriptor->d_getset;
    }
  }
  Watch(const Watch&) = delete;
  ~Watch() {
    for (const Known& known : known_) let_go(known);
  }

  // The least length of a list: it must have all watched tensors.
  int64_t at_least() const { return at_least_; }

  // The indices of the watched tensors that were written or replaced.
  std::vector<int64_t> look(PyObject* list) const {
    std::vector<int64_t> changed;
    const size_t n = known_.size();
    for (size_t k = 0; k < n; ++k) {
      if (const size_t next = k + objects_ahead; next < n) {
        __builtin_prefetch(PyList_GET_ITEM(list, known_[next].number));
        prefetch(next);
      }
      if (!is_known(k, PyList_GET_ITEM(list, known_[k].number))) changed.push_back(known_[k].number);
    }
    return changed;
  }

  // Where tensor i is among the watched ones; −1 if it is not watched.
  int64_t place_of(int64_t i) const {
    const auto found = place_.find(i);
    return found == place_.end() ? -1 : static_cast<int64_t>(found->second);
  }

  // Whether the tensor (or None) in this place is the known one, as it was.
  bool is_known(int64_t place, PyObject* object) const {
    const Known& known = known_[place];
    return object == Py_None ? known.reference == nullptr : is(known, object) && version(object) == known.version;
  }

  // Prefetches what `is_known` reads of the known tensor in this place.
  void prefetch(int64_t place) const {
    const Known& known = known_[place];
    prefetch_tensor(known.reference, known.shape);
  }

  // How many of the known ones are no None.
  int64_t n_tensors() const { return n_tensors_; }

  // Records the present state of tensor i (or None), if it is watched. False: a Python exception is set.
  bool know(int64_t i, PyObject* object) {
    const auto found = place_.find(i);
    if (found == place_.end()) return true;
    Known now;
    now.number = i;
    if (object != Py_None) {
      now.reference = kept_ ? object : PyWeakref_NewRef(object, nullptr);
      if (now.reference == nullptr) return false;
      now.version = version(object);
      dlpack::Tensor x;
      if (describe_(object, x)) now.shape = reinterpret_cast<uintptr_t>(x.shape);
    }
    Known& known = known_[found->second];
    n_tensors_ += (now.reference != nullptr) - (known.reference != nullptr);
    let_go(known);
    known = now;
    return true;
  }

  // All tensors are about to be written once, except those with a 1 in `missing`.
  void expect(const char* missing) {
    for (Known& known : known_)
      if (known.version >= 0) known.version += missing[known.number] == 0;
  }

 private:
  struct Known {
    int64_t number = 0;
    PyObject* reference = nullptr;  // the tensor if it is kept, else weak: addresses may be reused
    int64_t version = 0;
    uintptr_t shape = 0;  // address of the shape, inside torch's C++ object
  };

  bool is(const Known& known, PyObject* object) const {
    if (kept_ || known.reference == nullptr) return known.reference == object;
#if PY_VERSION_HEX >= 0x030d0000
    PyObject* now = nullptr;
    PyWeakref_GetRef(known.reference, &now);
    Py_XDECREF(now);
    return now == object;
#else
    return PyWeakref_GET_OBJECT(known.reference) == object;
#endif
  }

  void let_go(const Known& known) const {
    if (!kept_) Py_XDECREF(known.reference);
  }

  // −1 if a tensor has no counter, like one made in inference mode.
  int64_t version(PyObject* object) const {
    PyObject* const value = type_ != nullptr && PyObject_TypeCheck(object, type_)
                                ? get_.get(object, get_.closure)
                                : PyObject_GetAttrString(object, "_version");
    const int64_t number = value != nullptr ? PyLong_AsLongLong(value) : -1;
    Py_XDECREF(value);
    if (number == -1) PyErr_Clear();
    return number;
  }

  std::vector<Known> known_;
  Describe describe_;
  bool kept_;
  std::unordered_map<int64_t, size_t> place_;
  int64_t at_least_ = 0, n_tensors_ = 0;
  PyTypeObject* type_ = nullptr;
  PyGetSetDef get_ = {};
};

}  // namespace noetherperf
