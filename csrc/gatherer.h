// Gathers what thousands of parameters have: gradients, and entries of the optimizer's state.
#pragma once

#include <Python.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "tensors.h"

namespace noetherperf {

// Gathers attributes and state entries of fixed parameters. It holds no reference to any object.
class Gatherer {
 public:
  // params: a list of tensors.
  Gatherer(PyObject* params, Describe describe) : seen_(PyList_GET_SIZE(params)) {
    for (int64_t i = 0; i < size(); ++i) {
      PyObject* const param = PyList_GET_ITEM(params, i);
      dlpack::Tensor x;
      if (describe(param, x)) seen_[i].shape = reinterpret_cast<uintptr_t>(x.shape);
      place_[param] = i;
    }
  }

  int64_t size() const { return static_cast<int64_t>(seen_.size()); }

  // Writes every parameter's attribute `name` to a list with one None per parameter. False: a Python exception is set.
  bool attributes(PyObject* params, PyObject* name, PyObject* to) {
    for (int64_t i = 0; i < size(); ++i) {
      if (const int64_t next = i + objects_ahead; next < size()) {
        prefetch_tensor(PyList_GET_ITEM(params, next), seen_[next].shape);
        __builtin_prefetch(seen_[next].attribute);
      }
      PyObject* const value = PyObject_GetAttr(PyList_GET_ITEM(params, i), name);
      if (value == nullptr) return false;
      seen_[i].attribute = value;
      PyList_SetItem(to, i, value);
    }
    return true;
  }

  // Writes state[parameter][name] of every parameter that has it to a list with one None per parameter. False: a Python
  // exception is set. state: a dict of dicts; its order is remembered, because hashing every parameter takes longer.
  bool items(PyObject* state, PyObject* name, PyObject* to) {
    PyObject *key, *slot;
    Py_ssize_t at = 0;
    size_t n = 0;
    for (; PyDict_Next(state, &at, &key, &slot); ++n) {
      const int64_t place = place_of(n, key);
      if (place < 0) continue;
      PyObject* value;
      if (PyDict_CheckExact(slot)) {
        value = PyDict_GetItemWithError(slot, name);
        Py_XINCREF(value);
      } else {
        value = PyObject_CallMethod(slot, "get", "O", name);
      }
      if (value != nullptr) {
        PyList_SetItem(to, place, value);
      } else if (PyErr_Occurred()) {
        return false;
      }
    }
    return true;
  }

  // The index of the parameter that is the n-th key of the state; −1 if the key is none.
  int64_t place_of(size_t n, PyObject* key) {
    if (n == keys_.size()) keys_.push_back({nullptr, -1});
    if (keys_[n].param != key) {
      const auto found = place_.find(key);
      keys_[n] = {key, found == place_.end() ? -1 : found->second};
    }
    return keys_[n].place;
  }

 private:
  struct Seen {
    uintptr_t shape = 0;            // of the parameter
    PyObject* attribute = nullptr;  // of the last gather, to prefetch it; may be dangling
  };
  struct Key {
    PyObject* param;
    int64_t place;
  };

  std::vector<Seen> seen_;
  std::unordered_map<PyObject*, int64_t> place_;
  std::vector<Key> keys_;  // of the state, in its order
};

}  // namespace noetherperf
