// Recognises a step that sees the same tensors as the step before, wherever gradients and buffers are now.
//
// It compares, and reads addresses. What a difference means is for others to find out, who look at each thing in turn.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "gatherer.h"
#include "tensors.h"
#include "watch.h"

namespace noetherperf {

// A column of the addresses: who reads it, and who watches its tensors for writes of others (null: nobody).
struct Column {
  TensorReader* reader;
  const Watch* watch;
};

class Glance {
 public:
  // All that is referred to outlives this object.
  // params: a list of all tensors; sizes: how many of them are in each parameter group.
  // columns: of parameters, gradients, and each of the buffers, whose keys in the state of a parameter are `keys`.
  // counts: watches each one's count of steps, which has the key count_key; both may be null.
  // addresses: [n, columns], as the step before had them; 0 stands for None.
  Glance(PyObject* params, const std::vector<int64_t>& sizes, Gatherer& gatherer, std::vector<Column> columns,
         std::vector<PyObject*> keys, const Watch* counts, PyObject* count_key, uint64_t* addresses)
      : params_(params),
        sizes_(sizes),
        gatherer_(gatherer),
        columns_(std::move(columns)),
        keys_(std::move(keys)),
        counts_(counts),
        count_key_(count_key),
        addresses_(addresses) {
    for (size_t k = 0; k < columns_.size(); ++k) places_.push_back(places_in(columns_[k].watch));
    count_places_ = places_in(counts_);
  }

  // Whether parameter groups and state hold the same tensors as before, in the same layouts: parameters at the same
  // addresses, gradients and buffers of the same ones, written into the addresses here. And whether nothing that is
  // watched was written or replaced. False with a Python exception set: an attribute raised it.
  // keep: gets the gradients and buffers, with a reference to each.
  bool is_as_before(PyObject* groups, PyObject* state, PyObject* params_name, PyObject* grad_name,
                    std::vector<PyObject*>& keep) {
    return has_same_params(groups, params_name) && has_same_gradients(grad_name, keep) && has_same_state(state, keep);
  }

 private:
  // A parameter's entry of the state, a dict.
  struct Slot {
    int64_t place;  // of the parameter
    PyObject* dict;

    void prefetch_keys() const {
      const auto* const keys = reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(dict)->ma_keys);
      for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);
    }
  };

  int64_t size() const { return PyList_GET_SIZE(params_); }
  uint64_t* row(int64_t i) const { return addresses_ + i * static_cast<int64_t>(columns_.size()); }

  std::vector<int64_t> places_in(const Watch* watch) const {
    std::vector<int64_t> places(size(), -1);
    for (int64_t i = 0; watch != nullptr && i < size(); ++i) places[i] = watch->place_of(i);
    return places;
  }

  bool has_same_params(PyObject* groups, PyObject* name) const {
    const auto n_groups = static_cast<Py_ssize_t>(sizes_.size());
    if (!PyList_Check(groups) || PyList_GET_SIZE(groups) != n_groups) return false;
    Py_ssize_t i = 0;
    for (Py_ssize_t g = 0; g < n_groups; ++g) {
      PyObject* const group = PyList_GET_ITEM(groups, g);
      PyObject* const params = PyDict_Check(group) ? PyDict_GetItemWithError(group, name) : nullptr;
      if (params == nullptr || !PyList_Check(params) || PyList_GET_SIZE(params) != sizes_[g]) return false;
      for (Py_ssize_t j = 0; j < sizes_[g]; ++j, ++i)
        if (PyList_GET_ITEM(params, j) != PyList_GET_ITEM(params_, i)) return false;
    }
    return true;
  }

  bool has_same_gradients(PyObject* name, std::vector<PyObject*>& keep) {
    for (int64_t i = 0; i < size(); ++i) {
      if (const int64_t next = i + objects_ahead; next < size()) {
        columns_[0].reader->prefetch(next);
        columns_[1].reader->prefetch(next);
      }
      PyObject* const param = PyList_GET_ITEM(params_, i);
      uint64_t address;
      if (!columns_[0].reader->see(i, param, address) || address != row(i)[0]) return false;
      if (!is_known(columns_[0].watch, places_[0][i], param)) return false;
      PyObject* const grad = PyObject_GetAttr(param, name);
      if (grad == nullptr) return false;
      keep.push_back(grad);
      if (!is_same(1, i, grad)) return false;
    }
    return true;
  }

  bool has_same_state(PyObject* state, std::vector<PyObject*>& keep) {
    const size_t n_buffers = keys_.size();
    int64_t n_expected = counts_ != nullptr ? counts_->n_tensors() : 0, n_watched = 0;
    for (size_t k = 2; k < columns_.size(); ++k) {
      if (columns_[k].watch != nullptr) n_expected += columns_[k].watch->n_tensors();
      for (int64_t i = 0; i < size(); ++i) n_expected += row(i)[k] != 0;
    }
    if (!find_slots(state)) return false;
    const size_t n_slots = slots_.size();
    for (size_t n = 0; n < n_slots; ++n) {
      if (n + 2 * objects_ahead < n_slots) slots_[n + 2 * objects_ahead].prefetch_keys();
      if (n + objects_ahead < n_slots) {
        const int64_t next = slots_[n + objects_ahead].place;
        for (size_t k = 2; k < columns_.size(); ++k) {
          columns_[k].reader->prefetch(next);
          if (places_[k][next] >= 0) columns_[k].watch->prefetch(places_[k][next]);
        }
        if (counts_ != nullptr) counts_->prefetch(count_places_[next]);
      }
      const auto [i, slot] = slots_[n];
      for (size_t k = 0; k < n_buffers; ++k) {
        PyObject* const buffer = item(slot, keys_[k]);
        const int64_t place = places_[2 + k][i];
        if (!is_same(2 + k, i, buffer) || !is_known(columns_[2 + k].watch, place, buffer)) return false;
        if (buffer == Py_None) continue;
        Py_INCREF(buffer);
        keep.push_back(buffer);
        n_watched += 1 + (place >= 0);
      }
      if (counts_ != nullptr) {
        PyObject* const count = item(slot, count_key_);
        if (!is_known(counts_, count_places_[i], count)) return false;
        n_watched += count != Py_None;
      }
    }
    return n_watched == n_expected;  // else the state lacks a parameter that it had
  }

  // Finds every parameter's slot. False: one is no dict.
  bool find_slots(PyObject* state) {
    slots_.clear();
    PyObject *key, *slot;
    Py_ssize_t at = 0;
    for (size_t n = 0; PyDict_Next(state, &at, &key, &slot); ++n) {
      const int64_t i = gatherer_.place_of(n, key);
      if (i < 0) continue;
      __builtin_prefetch(slot);
      slots_.push_back({i, slot});
    }
    return std::all_of(slots_.begin(), slots_.end(), [](const Slot& x) { return PyDict_CheckExact(x.dict); });
  }

  // The item of a dict; None if there is none.
  static PyObject* item(PyObject* dict, PyObject* key) {
    PyObject* const found = PyDict_GetItemWithError(dict, key);
    return found != nullptr ? found : Py_None;
  }

  // Whether tensor i of a column is there, or None, as before, in the same layout; its address is written.
  bool is_same(size_t k, int64_t i, PyObject* object) {
    uint64_t address;
    if (!columns_[k].reader->see(i, object, address) || (address != 0) != (row(i)[k] != 0)) return false;
    row(i)[k] = address;
    return true;
  }

  static bool is_known(const Watch* watch, int64_t place, PyObject* object) {
    return place < 0 || watch->is_known(place, object);
  }

  PyObject* params_;
  std::vector<int64_t> sizes_;
  Gatherer& gatherer_;
  std::vector<Column> columns_;
  std::vector<PyObject*> keys_;
  const Watch* counts_;
  PyObject* count_key_;
  uint64_t* addresses_;
  std::vector<Slot> slots_;                   // of the state, in its order
  std::vector<std::vector<int64_t>> places_;  // per column, each tensor's place in its watch; −1 without
  std::vector<int64_t> count_places_;
};

}  // namespace noetherperf
