// Where torch's tensors are and how they lie, read from Python objects without torch's headers: through DLPack.
//
// torch.Tensor.__dlpack_c_exchange_api__ is a capsule that holds functions of a stable C ABI; one of them describes a
// tensor where it is, and waits for nothing. So one build serves every torch, and a step asks for its thousands of
// addresses and strides without a call from Python for each.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
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

// Reads where tensors are, and knows how each of them lay when it was last told to remember that.
class TensorReader {
 public:
  TensorReader(int64_t n, const dlpack::ExchangeTable& table) : describe_(table.describe), known_(n) {}

  int64_t size() const { return static_cast<int64_t>(known_.size()); }

  // Writes the address of every tensor of a list to to[i * stride]: 0 where it is None, 1 where it is empty. Returns
  // the numbers of those that do not lie as remembered; what DLPack does not describe (a sparse tensor) is among them,
  // at 0.
  std::vector<int64_t> read(PyObject* list, uint64_t* to, int64_t stride) {
    std::vector<int64_t> changed;
    for (int64_t i = 0; i < size(); ++i, to += stride) {
      // A step has gone through the caches since these tensors were looked at. Several are asked for at once.
      if (const int64_t next = i + ahead; next < size()) {
        __builtin_prefetch(PyList_GET_ITEM(list, next));
        for (int line = -1; line <= 2; ++line)
          __builtin_prefetch(reinterpret_cast<const void*>(known_[next].place + uintptr_t(64 * line)));
      }
      PyObject* const object = PyList_GET_ITEM(list, i);
      *to = 0;
      if (object == Py_None) continue;
      dlpack::Tensor x;
      const bool described = describe(object, x);
      if (described) *to = x.data != nullptr ? reinterpret_cast<uint64_t>(x.data) + x.byte_offset : 1;
      if (!described || !known_[i].is_of(x)) changed.push_back(i);
      if (described) known_[i].place = reinterpret_cast<uintptr_t>(x.shape);
    }
    return changed;
  }

  // Whether there was something to remember.
  bool remember(int64_t i, PyObject* tensor) {
    dlpack::Tensor x;
    if (!describe(tensor, x)) return false;
    known_[i] = Layout(x);
    return true;
  }

 private:
  struct Layout {
    int32_t device_type = -1, device_id = 0;
    uint8_t type_code = 0, type_bits = 0;
    std::vector<int64_t> sizes;  // shape and strides
    uintptr_t place = 0;         // where torch had written the shape, beside all else that it knows of the tensor

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

  bool describe(PyObject* object, dlpack::Tensor& to) const {
    if (describe_(object, &to) == 0) return true;
    PyErr_Clear();
    return false;
  }

  static constexpr int64_t ahead = 8;

  int (*describe_)(void*, dlpack::Tensor*);
  std::vector<Layout> known_;
};

}  // namespace noetherperf
