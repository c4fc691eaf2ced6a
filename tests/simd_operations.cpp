// The operations of csrc/simd.h over arrays, for tests/test_simd.py, which compiles this file for each width.

#include "simd.h"

using namespace noetherperf;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int width() { return W; }
EXPORT bool native() { return is_native; }

#define FIRST(name, V, T)                                                                                      \
  EXPORT void load_first_##name(const T* from, int64_t n, T* to) { store_vector(to, load_first<V>(from, n)); } \
  EXPORT void store_first_##name(T* to, int64_t n, const T* from) { store_first(to, load_vector<V>(from), n); }
FIRST(float64, F64, double)
FIRST(float32, F32, float)
FIRST(uint16, U16, uint16_t)
#if NPERF_WIDTH == 4
FIRST(uint16_full, U16Full, uint16_t)

EXPORT void unpack_upper(const uint16_t* from, uint32_t* lo, uint32_t* hi) {
  U32 x, y;
  unpack_upper_halves(load_vector<U16Full>(from), x, y);
  store_vector(lo, x);
  store_vector(hi, y);
}
EXPORT void pack_lower(const uint32_t* lo, const uint32_t* hi, uint16_t* to) {
  store_vector(to, pack_lower_halves(load_vector<U32>(lo), load_vector<U32>(hi)));
}
#endif

EXPORT void upper(const uint16_t* from, uint32_t* to) { store_vector(to, upper_halves(load_vector<U16>(from))); }
EXPORT void take_upper(const uint32_t* from, uint16_t* to) {
  store_vector(to, take_upper_halves(load_vector<U32>(from)));
}
EXPORT bool above(const uint32_t* from, int64_t limit) { return any_above(load_vector<U32>(from), uint32_t(limit)); }
EXPORT void widen(const uint16_t* from, float* to) { store_vector(to, widen_half(load_vector<U16>(from))); }
EXPORT void narrow(const float* from, uint16_t* to) { store_vector(to, narrow_half(load_vector<F32>(from))); }
EXPORT void to_float64(const float* from, double* to) { store_vector(to, as_f64(from)); }
#define UPDATE(name, V, T)                                                                                \
  EXPORT void square_root_##name(const T* x, T* to) { store_vector(to, square_root(load_vector<V>(x))); } \
  EXPORT void divide_##name(const T* x, const T* y, T* to) {                                              \
    store_vector(to, load_vector<V>(x) / load_vector<V>(y));                                              \
  }                                                                                                       \
  EXPORT void maximum_##name(const T* x, const T* y, T* to) {                                             \
    store_vector(to, maximum(load_vector<V>(x), load_vector<V>(y)));                                      \
  }
UPDATE(float64, F64, double)
UPDATE(float32, F32, float)

EXPORT void sums(const double* from, double* to) {
  F64 x[W];
  for (int i = 0; i < W; ++i) x[i] = load_vector<F64>(from + i * W);
  store_vector(to, sum_each(x));
}
