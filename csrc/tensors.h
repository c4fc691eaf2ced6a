// Reads of thousands of tensors in a step: addresses and layouts.
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
  static constexpr int32_t most_dims = 5;        // with more, torch allocates the shape elsewhere
  static constexpr int64_t last_distance = 104;  // torch 2.13's object ends behind it

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

// Prefetches torch's C++ object, which is around the tensor's shape.
inline __attribute__((always_inline)) void prefetch_around(uintptr_t shape) {
  for (int line = -1; line <= 2; ++line)
    __builtin_prefetch(reinterpret_cast<const void*>(shape + uintptr_t(64 * line)));
}

// The same, and its Python object.
inline __attribute__((always_inline)) void prefetch_tensor(const PyObject* object, uintptr_t shape) {
  __builtin_prefetch(object);
  prefetch_around(shape);
}

// Reads the addresses of tensors, and compares their layouts with the remembered ones.
class TensorReader {
 public:
  TensorReader(int64_t n, Describe describe, Readable readable) : describe_(describe), readable_(readable), known_(n) {}

  int64_t size() const { return static_cast<int64_t>(known_.size()); }

  // Writes the address of every tensor of a list to to[i * stride]. Returns the indices of the tensors for which `see`
  // is false.
  std::vector<int64_t> read(PyObject* list, uint64_t* to, int64_t stride) {
    std::vector<int64_t> changed;
    for (int64_t i = 0; i < size(); ++i, to += stride) {
      if (const int64_t next = i + objects_ahead; next < size()) {
        __builtin_prefetch(PyList_GET_ITEM(list, next));
        prefetch(next);
      }
      if (!see(i, PyList_GET_ITEM(list, i), *to)) changed.push_back(i);
    }
    return changed;
  }

  // Writes the address of tensor i: 0 for None, 1 for an empty tensor. Whether its layout is the remembered one; that
  // of a tensor that DLPack cannot describe (sparse), or that is not readable, never is, and its address is 0.
  bool see(int64_t i, PyObject* object, uint64_t& to) {
    to = 0;
    if (object == Py_None) return true;
    dlpack::Tensor x;
    if (readable_.has_own_dispatch(object) || !describe_(object, x) || !readable_(object, x)) return false;
    to = x.data != nullptr ? reinterpret_cast<uint64_t>(x.data) + x.byte_offset : 1;
    known_[i].object = object;
    known_[i].place = reinterpret_cast<uintptr_t>(x.shape);
    return known_[i].is_of(x);
  }

  // Prefetches what `see` reads of tensor i, if it is where it was.
  void prefetch(int64_t i) const {
    prefetch_tensor(known_[i].object, known_[i].place);
    __builtin_prefetch(reinterpret_cast<const void*>(known_[i].storage));
    __builtin_prefetch(reinterpret_cast<const void*>(known_[i].storage + 64));
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
    // Of the last tensor, to prefetch it; they may be dangling.
    const PyObject* object = nullptr;
    uintptr_t place = 0;    // address of the shape, inside torch's C++ object
    uintptr_t storage = 0;  // address of torch's storage object

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

}  // namespace noetherperf
