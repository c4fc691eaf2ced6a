// Dtypes of the CPU kernel: a vector in memory (Raw), a vector of the compute type (Vec), the conversions, and a vector
// of sums over a block of elements (Sum, see sums_cpu.h). narrow(x, stored) also returns x as it is stored.
//
// Each build of the kernel includes this file once; everything in it has internal linkage.
#pragma once

#include "simd.h"

namespace noetherperf {
namespace {

// order(i): where a Vec in memory has its W elements from element i on.
struct InOrder {
  static constexpr int64_t order(int64_t i) { return i; }
};

struct Float32 : InOrder {
  using Element = float;
  using Scalar = float;
  using Sum = F64;
  using Raw = F32;
  using Vec = F32;
  static Vec widen(const Raw& x) { return x; }
  static Raw narrow(const Vec& x, Vec& stored) { return stored = x; }
};

struct Float64 : InOrder {
  using Element = double;
  using Scalar = double;
  using Sum = F64;
  using Raw = F64;
  using Vec = F64;
  static Vec widen(const Raw& x) { return x; }
  static Raw narrow(const Vec& x, Vec& stored) { return stored = x; }
};

#if NPERF_WIDTH == 4
// Two registers' worth of float32 as one vector, in the order in which 16-bit values unpack without crossing lanes.
struct Unpacked {
  F32 lo, hi;
};
inline Unpacked operator+(const Unpacked& x, const Unpacked& y) { return {x.lo + y.lo, x.hi + y.hi}; }
inline Unpacked operator-(const Unpacked& x, const Unpacked& y) { return {x.lo - y.lo, x.hi - y.hi}; }
inline Unpacked operator*(const Unpacked& x, const Unpacked& y) { return {x.lo * y.lo, x.hi * y.hi}; }
inline Unpacked operator/(const Unpacked& x, const Unpacked& y) { return {x.lo / y.lo, x.hi / y.hi}; }
inline Unpacked operator*(float x, const Unpacked& y) { return {x * y.lo, x * y.hi}; }
inline Unpacked operator+(const Unpacked& x, float y) { return {x.lo + y, x.hi + y}; }
inline Unpacked keep_first(const Unpacked& x, int64_t n) {
  return {keep_first(x.lo, n, [](size_t i) { return i < 4 ? i : i + 4; }),
          keep_first(x.hi, n, [](size_t i) { return i < 4 ? i + 4 : i + 8; })};
}
inline Unpacked square_root(const Unpacked& x) { return {square_root(x.lo), square_root(x.hi)}; }
inline Unpacked maximum(const Unpacked& x, const Unpacked& y) { return {maximum(x.lo, y.lo), maximum(x.hi, y.hi)}; }

template <>
inline Unpacked load_vector<Unpacked>(const void* from) {
  return {load_vector<F32>(from), load_vector<F32>(static_cast<const char*>(from) + sizeof(F32))};
}
inline void store_vector(void* to, const Unpacked& x) {
  store_vector(to, x.lo);
  store_vector(static_cast<char*>(to) + sizeof(F32), x.hi);
}
#endif

struct BFloat16 : InOrder {
  using Element = uint16_t;
  using Scalar = float;
  using Sum = F32;
  // Rounds to the nearest upper half, ties to even, zeros below. A NaN stays NaN: its lower half is zero, whether it is
  // from bfloat16 or from arithmetic, so no carry reaches the exponent.
  static U32 round(const F32& x) {
    const U32 bits = (U32)x;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  }
#if NPERF_WIDTH == 4
  using Raw = U16Full;
  using Vec = Unpacked;
  static Vec widen(const Raw& x) {
    U32 lo, hi;
    unpack_upper_halves(x, lo, hi);
    return {(F32)lo, (F32)hi};
  }
  static Raw narrow(const Vec& x, Vec& stored) {
    const U32 lo = round(x.lo), hi = round(x.hi);
    stored = {(F32)lo, (F32)hi};
    return pack_lower_halves(lo >> 16, hi >> 16);
  }
  static constexpr int64_t order(int64_t i) { return i == 4 ? 8 : i == 8 ? 4 : i; }
#else
  using Raw = U16;
  using Vec = F32;
  static Vec widen(const Raw& x) { return (Vec)upper_halves(x); }
  static Raw narrow(const Vec& x, Vec& stored) {
    const U32 rounded = round(x);
    stored = (Vec)rounded;
    return take_upper_halves(rounded);
  }
#endif
};

struct Float16 : InOrder {
  using Element = uint16_t;
  using Scalar = float;
  using Sum = F32;
  using Raw = U16;
  using Vec = F32;
  static Vec widen(const Raw& x) { return widen_half(x); }
  static Raw narrow(const Vec& x, Vec& stored) {
    const Raw raw = narrow_half(x);
    stored = widen_half(raw);
    return raw;
  }
};

// Elements of a vector, and columns of a unit: sums by position are walked in whole cache lines and whole vectors.
template <class Type>
constexpr int64_t n_lanes = sizeof(typename Type::Raw) / sizeof(typename Type::Element);
template <class Type>
constexpr int64_t unit_cols = n_lanes<Type> > 8 ? n_lanes<Type> : 8;

}  // namespace
}  // namespace noetherperf
