// Dtypes: the type in memory (Element), the type of the arithmetic (Scalar), and the conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.cuh"

namespace noetherperf {

struct Float32 {
  using Element = float;
  using Scalar = float;
  static NPERF_D Scalar widen(Element x) { return x; }
  static NPERF_D Element narrow(Scalar x) { return x; }
};

struct Float64 {
  using Element = double;
  using Scalar = double;
  static NPERF_D Scalar widen(Element x) { return x; }
  static NPERF_D Element narrow(Scalar x) { return x; }
};

template <class To, class From>
NPERF_D To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Stores 16 bytes at once. It is assembly, because the compiler cuts the copy of a struct into its elements where
// another branch stores them too.
template <class Vector>
NPERF_D void store_vector(void* to, const Vector& x) {
  static_assert(sizeof x == 16);
#if defined(__CUDACC__)
  const uint4 words = bits_as<uint4>(x);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
#else
  std::memcpy(to, &x, sizeof x);
#endif
}

struct BFloat16 {
  using Element = uint16_t;
  using Scalar = float;
  static NPERF_D Scalar widen(Element x) { return bits_as<float>(uint32_t(x) << 16); }
  static NPERF_D Element narrow(Scalar x) {
#if defined(__CUDACC__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t bits = bits_as<uint32_t>(x);
    return Element((x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  }
};

struct Float16 {
  using Element = uint16_t;
  using Scalar = float;
#if defined(__CUDACC__)
  static NPERF_D Scalar widen(Element x) { return __half2float(__ushort_as_half(x)); }
  static NPERF_D Element narrow(Scalar x) { return __half_as_ushort(__float2half_rn(x)); }
#else
  static NPERF_D Scalar widen(Element x) { return bits_as<_Float16>(x); }
  static NPERF_D Element narrow(Scalar x) { return bits_as<Element>(_Float16(x)); }
#endif
};

}  // namespace noetherperf
