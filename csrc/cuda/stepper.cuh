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
  static constexpr int n_taken = Rule::n_moments;
};

template <class Step>
constexpr bool is_any = std::is_same_v<Step, Any<typename Step::Rule>>;

template <class Type>
struct alignas(16) VectorOf {
  static constexpr int L = 16 / sizeof(typename Type::Element);
  typename Type::Element x[L];
};

// Pipeline depth: the vectors of p, g and v that a thread has in flight, and the one that it steps.
template <class Type, class Step>
constexpr int n_stages = is_any<Step>                          ? 1
                         : sizeof(typename Type::Element) == 8 ? 2
                                                               : 3;

template <class Type, class Step>
struct Stepper {
  using Rule = typename Step::Rule;
  using Element = typename Type::Element;
  using Scalar = typename Type::Scalar;
  using Vector = VectorOf<Type>;
  static constexpr int L = Vector::L;
  static constexpr int n_row_slots = n_slots<Step::n_taken>;
  using Stage = Vector[3][n_threads];

  Element *p, *g, *v;
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
    p = on_device(addresses, 0);
    g = on_device(addresses, 1);
    v = on_device(addresses, 2);
    aligned = (addresses[0] | addresses[1] | addresses[2]) % 16 == 0 && (its.n_rows == 1 || its.n_cols % L == 0);
    scaled = inputs.scaled;
    inverse_scale = scaled ? Scalar(1.0 / double(*reinterpret_cast<const float*>(inputs.scalars[0]))) : Scalar(1);
    c = Rule::template Coefficients<Scalar>::of(row);
  }

  static NPERF_D Element* on_device(const uint64_t* addresses, int which) {
    void* const pointer = reinterpret_cast<void* const*>(addresses)[which];
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

  // The offset in memory of element `at` of the matrix, in the parameter (0), gradient (1) or a buffer (2 …).
  NPERF_D int64_t offset(int64_t at, int which) const {
    if constexpr (!is_any<Step>) return at;
    if (tensor.dense) return at;
    int64_t sum = 0;
    for (int d = tensor.n_dims - 1; d >= 0; --d) {
      sum += at % dims[d].size * dims[d].strides[which];
      at /= dims[d].size;
    }
    return sum;
  }

  // Element by element: n elements from `at` on, then zeros.
  NPERF_D void load(Vector& x, const Element* from, int64_t at, int n, int which) const {
#pragma unroll
    for (int i = 0; i < L; ++i) x.x[i] = i < n ? from[offset(at + i, which)] : Element(0);
  }

  NPERF_D void store(const Vector& x, Element* to, int64_t at, int n, int which) const {
#pragma unroll
    for (int i = 0; i < L; ++i)
      if (i < n) to[offset(at + i, which)] = x.x[i];
  }

  // Whether n elements are a whole, aligned vector in memory.
  NPERF_D bool whole(int n) const { return !is_any<Step> && aligned && n == L; }

  // Prefetches the n elements from `at` on, if they are a whole vector.
  NPERF_D void fetch(Stage& stage, int64_t at, int n) const {
    if constexpr (!is_any<Step>) {
      if (!whole(n)) return;
      __pipeline_memcpy_async(&stage[0][threadIdx.x], p + at, 16);
      __pipeline_memcpy_async(&stage[1][threadIdx.x], g + at, 16);
      if (Step::n_read > 0) __pipeline_memcpy_async(&stage[2][threadIdx.x], v + at, 16);
    }
  }

  // Steps n elements from `at` on and adds them to the sums of their columns and of their row.
  NPERF_D void step(const Stage& stage, int64_t at, int n, Scalar (&col_sums)[L][Step::n_taken],
                    Scalar (&row_sums)[n_row_slots]) const {
    bool updates = true, reads_buffer = true, writes_buffer = true;
    with_its_step([&](auto its) {
      updates = decltype(its)::updates;
      reads_buffer = decltype(its)::n_read > 0;
      writes_buffer = decltype(its)::n_written > 0;
    });
    Vector x, y, z;
    if (whole(n)) {
      x = stage[0][threadIdx.x];
      y = stage[1][threadIdx.x];
      if (reads_buffer) z = stage[2][threadIdx.x];
    } else {
      load(x, p, at, n, 0);
      if (updates) load(y, g, at, n, 1);
      if (reads_buffer) load(z, v, at, n, 2);
    }
#pragma unroll
    for (int i = 0; i < L; ++i)
      with_its_step([&](auto its) { element<decltype(its)>(x.x[i], y.x[i], z.x[i], col_sums[i], row_sums); });
    if (whole(n)) {
      *reinterpret_cast<Vector*>(p + at) = x;
      if (scaled) *reinterpret_cast<Vector*>(g + at) = y;
      if (writes_buffer) *reinterpret_cast<Vector*>(v + at) = z;
    } else {
      if (updates) store(x, p, at, n, 0);
      if (scaled) store(y, g, at, n, 1);
      if (writes_buffer) store(z, v, at, n, 2);
    }
  }

  // Steps one element and adds it to the sums of its column and its row.
  template <class Its>
  NPERF_D void element(Element& x, Element& y, Element& z, Scalar* col_sums, Scalar* row_sums) const {
    const Scalar before = Type::widen(x);
    Operands<Scalar> operands{before, before, 0, 0, 0};
    if constexpr (Its::updates) {
      Scalar p_new = before, v_new = 0, u = 0;
      const Scalar gradient = Type::widen(y) * inverse_scale;
      if constexpr (Its::n_read > 0) v_new = Type::widen(z);
      Its::update(p_new, gradient, &v_new, u, c);
      x = Type::narrow(p_new);
      y = Type::narrow(gradient);
      if constexpr (Its::n_written > 0) z = Type::narrow(v_new);
      operands = {before, Type::widen(x), gradient, u, v_new};
    } else {
      operands.g = Type::widen(z);
    }
    accumulate<Its>(col_sums, operands);
    accumulate<Its>(row_sums, operands);
  }
};

}  // namespace noetherperf
