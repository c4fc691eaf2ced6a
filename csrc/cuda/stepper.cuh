// One vector of elements: loaded, stepped, stored, and added to the sums of its columns and its row.
//
// While a thread steps a vector, its next ones are in flight to shared memory. Each thread has its own slots there, so
// no thread waits for another.
#pragma once

#include <type_traits>

#include "inputs.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace noetherperf {

// Instead of a rule's step: any variant, chosen at run time, for any strides.
template <class TheRule>
struct Any {
  using Rule = TheRule;
  static constexpr int n_taken = Rule::n_moments, n_read = Rule::n_buffers;
};

template <class Step>
constexpr bool is_any = std::is_same_v<Step, Any<typename Step::Rule>>;

template <class Type>
struct alignas(16) VectorOf {
  static constexpr int L = 16 / sizeof(typename Type::Element);
  typename Type::Element x[L];
};

// The tensors that a step reads: parameter, gradient, and the first buffers. They have the order of the addresses.
enum Stream : int { of_parameter, of_gradient, of_buffers };
template <class Step>
constexpr int n_streams = of_buffers + Step::n_read;

// Threads of a block. What they have in flight must fit into the 48 KiB of shared memory that a launch has; and more
// sums than the common ones need registers, which small blocks share out in smaller pieces.
template <class Step>
constexpr int n_threads = n_streams<Step> > 3 || (!is_any<Step> && Step::n_taken > Step::Rule::n_common) ? 128 : 256;

template <class Type, class Step>
struct Stepper {
  using Rule = typename Step::Rule;
  using Element = typename Type::Element;
  using Scalar = typename Type::Scalar;
  using Vector = VectorOf<Type>;
  static constexpr int L = Vector::L, n = n_streams<Step>;
  static constexpr int n_row_slots = n_slots<Step::n_taken>;
  using Stage = Vector[n][n_threads<Step>];

  Element* base[n];
  typename Rule::template Coefficients<Scalar> c;
  Scalar inverse_scale;
  bool scaled;
  bool aligned;  // whole vectors may be loaded and stored at once
  int variant;
  const Tensor& tensor;
  const Dim* dims;

  NPERF_D Stepper(const DeviceProblem& problem, const DeviceInputs& inputs, const Tensor& its, int64_t i,
                  int its_variant, const double* row)
      : variant(its_variant), tensor(its), dims(problem.dims + its.dims) {
    const uint64_t* const addresses = addresses_of<Rule>(inputs, i);
    uint64_t all = 0;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      base[k] = on_device(addresses, k);
      all |= addresses[k];
    }
    aligned = all % 16 == 0 && (its.n_rows == 1 || its.n_cols % L == 0);
    scaled = inputs.scaled;
    inverse_scale = scaled ? Scalar(1.0 / double(*reinterpret_cast<const float*>(inputs.scalars[0]))) : Scalar(1);
    c = Rule::template Coefficients<Scalar>::of(row);
  }

  static NPERF_D Element* on_device(const uint64_t* addresses, int stream) {
    void* const pointer = reinterpret_cast<void* const*>(addresses)[stream];
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(pointer));  // an address from a table could be in any memory space
#endif
    return static_cast<Element*>(pointer);
  }

  // Calls f with an object of the type of the step that the tensor takes.
  template <class F>
  NPERF_D void with_its_step(const F& f) const {
    if constexpr (is_any<Step>) {
      with_step<Rule>(variant, f);
    } else {
      f(Step{});
    }
  }

  // The offset in each stream's memory of element `at` of the matrix.
  struct Offsets {
    int64_t in[n];
  };
  NPERF_D Offsets offsets(int64_t at) const {
    Offsets found;
#pragma unroll
    for (int k = 0; k < n; ++k) found.in[k] = at;
    if constexpr (is_any<Step>) {
      if (tensor.dense) return found;
#pragma unroll
      for (int k = 0; k < n; ++k) found.in[k] = 0;
#pragma unroll 1
      for (int d = tensor.n_dims - 1; d >= 0; --d) {  // one division for all streams
        const int64_t index = at % dims[d].size;
        at /= dims[d].size;
#pragma unroll
        for (int k = 0; k < n; ++k) found.in[k] += index * dims[d].strides[k];
      }
    }
    return found;
  }

  // Element by element: n_inside elements from `at` on, then zeros.
  NPERF_D void load(Vector (&x)[n], const bool (&reads)[n], int64_t at, int n_inside) const {
#pragma unroll
    for (int i = 0; i < L; ++i) {
      const Offsets there = offsets(at + i);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        if (reads[k] && i < n_inside) {
          x[k].x[i] = base[k][there.in[k]];
        } else {
          x[k].x[i] = Element(0);
        }
      }
    }
  }

  NPERF_D void store(const Vector (&x)[n], const bool (&writes)[n], int64_t at, int n_inside) const {
#pragma unroll
    for (int i = 0; i < L; ++i) {
      if (i >= n_inside) break;
      const Offsets there = offsets(at + i);
#pragma unroll
      for (int k = 0; k < n; ++k)
        if (writes[k]) base[k][there.in[k]] = x[k].x[i];
    }
  }

  // Whether n_inside elements are a whole, aligned vector in memory.
  NPERF_D bool whole(int n_inside) const { return !is_any<Step> && aligned && n_inside == L; }

  // Prefetches the n_inside elements from `at` on, if they are a whole vector.
  NPERF_D void fetch(Stage& stage, int64_t at, int n_inside) const {
    if constexpr (!is_any<Step>) {
      if (!whole(n_inside)) return;
#pragma unroll
      for (int k = 0; k < n; ++k) __pipeline_memcpy_async(&stage[k][threadIdx.x], base[k] + at, 16);
    }
  }

  // Steps n_inside elements from `at` on and adds them to the sums of their columns and of their row.
  NPERF_D void step(const Stage& stage, int64_t at, int n_inside, Scalar (&col_sums)[L][Step::n_taken],
                    Scalar (&row_sums)[n_row_slots]) const {
    bool reads[n] = {}, writes[n] = {};
    with_its_step([&](auto its) {
      using Its = decltype(its);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        reads[k] = k == of_gradient ? Its::updates : k < n_streams<Its>;
        writes[k] = k < of_buffers ? Its::updates && (k == of_parameter || scaled) : k < of_buffers + Its::n_written;
      }
    });
    Vector x[n];
    if (whole(n_inside)) {
#pragma unroll
      for (int k = 0; k < n; ++k) x[k] = stage[k][threadIdx.x];
    } else {
      load(x, reads, at, n_inside);
    }
#pragma unroll
    for (int i = 0; i < L; ++i)
      with_its_step([&](auto its) { element<decltype(its)>(x, i, i < n_inside, col_sums[i], row_sums); });
    if (whole(n_inside)) {
#pragma unroll
      for (int k = 0; k < n; ++k)
        if (writes[k]) store_vector(base[k] + at, x[k]);
    } else {
      store(x, writes, at, n_inside);
    }
  }

  // Steps element i of the vectors and adds it to the sums of its column and its row. An element that is not inside the
  // tensor is zeros, which add nothing; a rule that divides makes 0/0 of them, and is held to zero.
  template <class Its>
  NPERF_D void element(Vector (&x)[n], int i, bool inside, Scalar* col_sums, Scalar* row_sums) const {
    const Scalar before = Type::widen(x[of_parameter].x[i]);
    Operands<Scalar> operands{before, before, 0, 0, 0};
    if constexpr (Its::updates) {
      Scalar p_new = before, u = 0, held[Its::n_read > 0 ? Its::n_read : 1] = {};
      const Scalar g = Type::widen(x[of_gradient].x[i]) * inverse_scale;
#pragma unroll
      for (int k = 0; k < Its::n_read; ++k) held[k] = Type::widen(x[of_buffers + k].x[i]);
      Its::update(p_new, g, held, u, c);
      if (Rule::divides && !inside) p_new = u = Scalar(0);
      x[of_parameter].x[i] = Type::narrow(p_new);
      x[of_gradient].x[i] = Type::narrow(g);
#pragma unroll
      for (int k = 0; k < Its::n_written; ++k) x[of_buffers + k].x[i] = Type::narrow(held[k]);
      operands = {before, Type::widen(x[of_parameter].x[i]), g, u, held[0]};
    } else if constexpr (Its::n_read > 0) {
      operands.g = Type::widen(x[of_buffers].x[i]);
    }
    accumulate<Its>(col_sums, operands);
    accumulate<Its>(row_sums, operands);
  }
};

}  // namespace noetherperf
