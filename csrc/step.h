// One element's update and its moments: the mathematics of the step, written once for CPU and CUDA.
//
// V is a float or double on a GPU and a SIMD vector of them on a CPU; D is what moments accumulate in. Coefficients
// follow noetherperf/rules/hyper.py, moments noetherperf/rules/moments.py, the step noetherperf/rules/reference.py:
// same names, same order.
#pragma once

#if defined(__CUDACC__)
#define NPERF_HD __host__ __device__ __forceinline__
#else
#define NPERF_HD inline __attribute__((always_inline))
#endif

namespace noetherperf {

// d = s g + λ p,  v' = b v + a d,  u = c_d d + c_v v',  p' = p − η u.
template <class S>
struct Coefficients {
  S lr;            // η
  S decay;         // λ
  S sign;          // s
  S buffer_decay;  // b
  S buffer_gain;   // a
  S mix_d;         // c_d
  S mix_v;         // c_v
};

enum class Mode : int {
  plain,     // no buffer: u = d
  momentum,  // u = v'
  nesterov,  // u = d + β v'
  stale,     // momentum 0, but a buffer from earlier steps: u = d, v only read
  measure,   // no step: the moments of p with v standing in for g
};

NPERF_HD constexpr bool writes_buffer(Mode mode) { return mode == Mode::momentum || mode == Mode::nesterov; }
NPERF_HD constexpr bool reads_buffer(Mode mode) { return writes_buffer(mode) || mode == Mode::stale; }

// p becomes p', v becomes v'; u is the update.
template <Mode mode, class V, class S>
NPERF_HD void update(V& p, const V& g, V& v, V& u, const Coefficients<S>& c) {
  const V d = c.sign * g + c.decay * p;
  if constexpr (writes_buffer(mode)) v = c.buffer_decay * v + c.buffer_gain * d;
  if constexpr (mode == Mode::momentum) {
    u = v;
  } else if constexpr (mode == Mode::nesterov) {
    u = d + c.mix_v * v;
  } else {
    u = d;
  }
  p = p - c.lr * u;
}

enum Moment : int { sum_p, sq_p, sum_g, sq_g, dot_pg, sq_u, dot_uv, dot_gu, n_moments };

// How many moments a mode accumulates; the others are zero.
NPERF_HD constexpr int n_accumulated(Mode mode) {
  return mode == Mode::nesterov ? n_moments : mode == Mode::stale ? dot_gu : dot_uv;
}

// Adds one element (or vector of elements) to the moments: what the gradient and the parameter before the step give,
// and what the step gives. stored is p' as stored, after rounding to the dtype.
template <class D>
NPERF_HD void accumulate_gradient(D* m, const D& p, const D& g) {
  m[sum_g] += g;
  m[sq_g] += g * g;
  m[dot_pg] += p * g;
}

template <Mode mode, class D>
NPERF_HD void accumulate_step(D* m, const D& stored, const D& g, const D& u, const D& v) {
  m[sum_p] += stored;
  m[sq_p] += stored * stored;
  m[sq_u] += u * u;
  if constexpr (n_accumulated(mode) > dot_uv) m[dot_uv] += u * v;
  if constexpr (n_accumulated(mode) > dot_gu) m[dot_gu] += g * u;
}

template <Mode mode, class D>
NPERF_HD void accumulate(D* m, const D& stored, const D& p, const D& g, const D& u, const D& v) {
  accumulate_gradient(m, p, g);
  accumulate_step<mode>(m, stored, g, u, v);
}

}  // namespace noetherperf
