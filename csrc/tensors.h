// Reads of thousands of Python objects in a step: gradients, momentum buffers, addresses and layouts of tensors, and
// whether other code has written them.
//
// No torch header is used, so one build serves every torch. torch.Tensor.__dlpack_c_exchange_api__ is a capsule with
// functions of a stable C ABI, DLPack's. One of them describes a tensor in place, and does not wait for a device.
//
// The last step has evicted these objects from the caches, so several are prefetched at once.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace noetherperf {

// Mirrors of DLPack's structs (dlpack.h, major version 1).
namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_id, n_dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeHeader {
  uint32_t major, minor;
  const ExchangeHeader* previous;  // a table of an older version, if there is one
};

struct ExchangeTable {
  ExchangeHeader header;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*describe)(void* object, Tensor* to);  // 0, or −1 with a Python exception set
  void* current_stream;
};

}  // namespace dlpack

// Describes a Python object as a tensor, if DLPack can (a sparse tensor it cannot).
class Describe {
 public:
  explicit Describe(const dlpack::ExchangeTable& table) : describe_(table.describe) {}

  bool operator()(PyObject* object, dlpack::Tensor& to) const {
    if (describe_(object, &to) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  int (*describe_)(void*, dlpack::Tensor*);
};

// Tests whether a tensor's elements are the numbers at its address. DLPack does not report three exceptions: a tensor
// without memory, a subclass that implements torch's operations itself, and a view that torch negates on read.
//
// Torch stores the negation in one bit, at a fixed distance from the shape of a tensor of few dimensions. The distance
// depends on the version of torch. It is learned from tensors that differ in this bit alone. If that fails, torch's own
// method is called, which takes longer than all other reads of a tensor in a step.
class Readable {
 public:
  // type: torch.Tensor. usual: torch.nn.Parameter, another type without a dispatch of its own.
  // plain, negated: lists of tensors that differ pairwise in the bit alone.
  Readable(PyObject* type, PyObject* usual, PyObject* plain, PyObject* negated, Describe describe)
      : type_(type),
        usual_(usual),
        dispatch_(attribute(type, "__torch_dispatch__")),
        is_neg_(attribute(type, "is_neg")) {
    for (int64_t distance = 0; distance <= last_distance && bit_ == 0; distance += 8) {
      uint64_t always = ~uint64_t(0);
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(plain); ++i) {
        dlpack::Tensor x, y;
        if (!describe(PyList_GET_ITEM(plain, i), x) || !describe(PyList_GET_ITEM(negated, i), y)) return;
        if (x.n_dims <= most_dims) always &= ~word(x, distance) & word(y, distance) & only_bit(x, y, distance);
      }
      if (always != 0) distance_ = distance, bit_ = always;
    }
  }

  bool is_quick() const { return bit_ != 0; }

  // Whether a tensor's type implements torch's operations itself. Do not describe these tensors: they may raise.
  bool has_own_dispatch(PyObject* tensor) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (type == type_ || type == usual_) return false;
    const PyObject* const dispatch = attribute(type, "__torch_dispatch__");
    if (dispatch == nullptr) PyErr_Clear();  // not a tensor
    return dispatch != dispatch_;
  }

  // For any other tensor, with its description. False with a Python exception set: torch's method failed.
  bool operator()(PyObject* object, const dlpack::Tensor& x) const {
    if (x.data == nullptr) return std::find(x.shape, x.shape + x.n_dims, 0) != x.shape + x.n_dims;
    if (bit_ != 0 && x.n_dims <= most_dims) return (word(x, distance_) & bit_) == 0;
    PyObject* const answer = PyObject_CallOneArg(is_neg_, object);
    Py_XDECREF(answer);
    return answer == Py_False;
  }

 private:
  static constexpr int32_t most_dims = 5;  // with more, torch allocates the shape elsewhere
  static constexpr int64_t last_distance = 112;

  // A borrowed reference: the type and its attributes outlive this object.
  static PyObject* attribute(PyObject* type, const char* name) {
    PyObject* const found = PyObject_GetAttrString(type, name);
    Py_XDECREF(found);
    return found;
  }

  static uint64_t word(const dlpack::Tensor& x, int64_t distance) {
    uint64_t value;
    std::memcpy(&value, reinterpret_cast<const char*>(x.shape) + distance, sizeof value);
    return value;
  }

  // The bit in which two tensors' words differ; 0 if they differ in several.
  static uint64_t only_bit(const dlpack::Tensor& x, const dlpack::Tensor& y, int64_t distance) {
    const uint64_t both = word(x, distance) ^ word(y, distance);
    return (both & (both - 1)) == 0 ? both : 0;
  }

  PyObject *type_, *usual_, *dispatch_, *is_neg_;
  int64_t distance_ = 0;
  uint64_t bit_ = 0;
};

// The prefetch distance, in objects.
constexpr int64_t objects_ahead = 8;

// Prefetches a tensor's Python object, and torch's C++ object, which is around the tensor's shape.
inline __attribute__((always_inline)) void prefetch_tensor(const PyObject* object, uintptr_t shape) {
  __builtin_prefetch(object);
  for (int line = -1; line <= 2; ++line)
    __builtin_prefetch(reinterpret_cast<const void*>(shape + uintptr_t(64 * line)));
}

// Reads the addresses of tensors, and compares their layouts with the remembered ones.
class TensorReader {
 public:
  TensorReader(int64_t n, Describe describe, Readable readable) : describe_(describe), readable_(readable), known_(n) {}

  int64_t size() const { return static_cast<int64_t>(known_.size()); }

  // Writes the address of every tensor of a list to to[i * stride]: 0 for None, 1 for an empty tensor. Returns the
  // indices of the tensors whose layout is not the remembered one. A tensor that DLPack cannot describe (sparse), or
  // that is not readable, is always among them, with address 0.
  std::vector<int64_t> read(PyObject* list, uint64_t* to, int64_t stride) {
    std::vector<int64_t> changed;
    for (int64_t i = 0; i < size(); ++i, to += stride) {
      if (const int64_t next = i + objects_ahead; next < size()) {
        prefetch_tensor(PyList_GET_ITEM(list, next), known_[next].place);
        __builtin_prefetch(reinterpret_cast<const void*>(known_[next].storage));
        __builtin_prefetch(reinterpret_cast<const void*>(known_[next].storage + 64));
      }
      PyObject* const object = PyList_GET_ITEM(list, i);
      *to = 0;
      if (object == Py_None) continue;
      dlpack::Tensor x;
      const bool readable = !readable_.has_own_dispatch(object) && describe_(object, x) && readable_(object, x);
      if (readable) *to = x.data != nullptr ? reinterpret_cast<uint64_t>(x.data) + x.byte_offset : 1;
      if (!readable || !known_[i].is_of(x)) changed.push_back(i);
      if (readable) known_[i].place = reinterpret_cast<uintptr_t>(x.shape);
    }
    return changed;
  }

  // Remembers the layout of tensor i. False: DLPack cannot describe it.
  bool remember(int64_t i, PyObject* tensor) {
    dlpack::Tensor x;
    if (!describe_(tensor, x)) return false;
    known_[i] = Layout(x);
    return true;
  }

  // The address of torch's storage object of tensor i, which is prefetched too.
  void hint(int64_t i, uintptr_t storage) { known_[i].storage = storage; }

 private:
  struct Layout {
    int32_t device_type = -1, device_id = 0;
    uint8_t type_code = 0, type_bits = 0;
    std::vector<int64_t> sizes;  // shape and strides
    uintptr_t place = 0;         // address of the shape, inside torch's C++ object
    uintptr_t storage = 0;       // address of torch's storage object

    Layout() = default;
    explicit Layout(const dlpack::Tensor& x)
        : device_type(x.device_type),
          device_id(x.device_id),
          type_code(x.type_code),
          type_bits(x.type_bits),
          sizes(x.shape, x.shape + x.n_dims) {
      sizes.insert(sizes.end(), x.strides, x.strides + x.n_dims);
    }

    bool is_of(const dlpack::Tensor& x) const {
      return device_type == x.device_type && device_id == x.device_id && type_code == x.type_code &&
             type_bits == x.type_bits && static_cast<int64_t>(sizes.size()) == 2 * x.n_dims &&
             std::equal(x.shape, x.shape + x.n_dims, sizes.begin()) &&
             std::equal(x.strides, x.strides + x.n_dims, sizes.begin() + x.n_dims);
    }
  };

  Describe describe_;
  Readable readable_;
  std::vector<Layout> known_;
};

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
      if (n == keys_.size()) keys_.push_back({nullptr, -1});
      if (keys_[n].param != key) {
        const auto found = place_.find(key);
        keys_[n] = {key, found == place_.end() ? -1 : found->second};
      }
      if (keys_[n].place < 0) continue;
      PyObject* value;
      if (PyDict_CheckExact(slot)) {
        value = PyDict_GetItemWithError(slot, name);
        Py_XINCREF(value);
      } else {
        value = PyObject_CallMethod(slot, "get", "O", name);
      }
      if (value != nullptr) {
        PyList_SetItem(to, keys_[n].place, value);
      } else if (PyErr_Occurred()) {
        return false;
      }
    }
    return true;
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
      if (k + objects_ahead < n) {
        const Known& next = known_[k + objects_ahead];
        prefetch_tensor(PyList_GET_ITEM(list, next.number), next.shape);
        __builtin_prefetch(next.reference);
      }
      const Known& known = known_[k];
      PyObject* const object = PyList_GET_ITEM(list, known.number);
      if (object == Py_None ? known.reference != nullptr : !is(known, object) || version(object) != known.version)
        changed.push_back(known.number);
    }
    return changed;
  }

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
  int64_t at_least_ = 0;
  PyTypeObject* type_ = nullptr;
  PyGetSetDef get_ = {};
};

}  // namespace noetherperf
