// Vectors of one width, and the few operations that the vector extensions of GCC and Clang lack.
//
// NPERF_WIDTH is the number of float64 in a vector. It alone chooses the code, whatever target the compiler builds for.
// An operation is one intrinsic if the target has the instruction set of that width (8: AVX-512, 4: AVX2). Otherwise it
// is done lane by lane, so any machine can run the code of every width.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if NPERF_WIDTH == 8 && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define NPERF_AVX512 1
#elif NPERF_WIDTH == 4 && defined(__AVX2__) && defined(__F16C__)
#define NPERF_AVX2 1
#endif

namespace noetherperf {
namespace {

#if defined(__aarch64__)
using Binary16 = __fp16;  // GCC has _Float16 there from version 13 on
#else
using Binary16 = _Float16;
#endif

constexpr int W = NPERF_WIDTH;

// Whether operations are intrinsics; the baseline has vector extensions only and counts as native too.
#if NPERF_AVX512 || NPERF_AVX2 || NPERF_WIDTH == 2
constexpr bool is_native = true;
#else
constexpr bool is_native = false;
#endif

using F64 = double __attribute__((vector_size(8 * W)));
using F32 = float __attribute__((vector_size(8 * W)));  // twice as many
using F32Half = float __attribute__((vector_size(4 * W)));
using U32 = uint32_t __attribute__((vector_size(8 * W)));
using U16 = uint16_t __attribute__((vector_size(4 * W)));
using U16Full = uint16_t __attribute__((vector_size(8 * W)));

// The type of a vector's elements, and their number.
template <class V>
using Item = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
template <class V>
constexpr int64_t lanes = sizeof(V) / sizeof(Item<V>);

template <class V>
inline V load_vector(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class V>
inline void store_vector(void* to, const V& x) {
  std::memcpy(to, &x, sizeof x);
}

#if NPERF_AVX2
// A mask: all bits are set in a vector's first n elements of type T, none in the others.
template <class V, class T>
inline V first(int64_t n) {
  static const T bits[] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  return load_vector<V>(bits + 8 - n);
}
#endif

// Masked load of a vector's first n elements, zeros after them; and the masked store, which writes nothing past them.
template <class V, class T>
inline V load_first(const T* from, int64_t n) {
#if NPERF_AVX512
  const __mmask32 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) return (V)_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
  if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
  if constexpr (sizeof(T) == 2) return (V)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
#elif NPERF_AVX2
  if constexpr (sizeof(T) == 8)
    return (V)_mm256_maskload_epi64(reinterpret_cast<const long long*>(from), first<__m256i, int64_t>(n));
  if constexpr (sizeof(T) == 4)
    return (V)_mm256_maskload_epi32(reinterpret_cast<const int*>(from), first<__m256i, int32_t>(n));
  if constexpr (sizeof(T) == 2) {  // in pairs, and the odd one
    const int* const pairs = reinterpret_cast<const int*>(from);
    V x;
    if constexpr (sizeof(V) == 32) {
      x = (V)_mm256_maskload_epi32(pairs, first<__m256i, int32_t>(n / 2));
    } else {
      x = (V)_mm_maskload_epi32(pairs, first<__m128i, int32_t>(n / 2));
    }
    if (n % 2) x[n - 1] = from[n - 1];
    return x;
  }
#else
  V x{};
  std::memcpy(&x, from, n * sizeof(T));
  return x;
#endif
}

template <class V, class T>
inline void store_first(T* to, const V& x, int64_t n) {
#if NPERF_AVX512
  const __mmask32 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), (__m512i)x);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), (__m512i)x);
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), (__m256i)x);
#elif NPERF_AVX2
  if constexpr (sizeof(T) == 8)
    _mm256_maskstore_epi64(reinterpret_cast<long long*>(to), first<__m256i, int64_t>(n), (__m256i)x);
  if constexpr (sizeof(T) == 4)
    _mm256_maskstore_epi32(reinterpret_cast<int*>(to), first<__m256i, int32_t>(n), (__m256i)x);
  if constexpr (sizeof(T) == 2) {
    int* const pairs = reinterpret_cast<int*>(to);
    if constexpr (sizeof(V) == 32) {
      _mm256_maskstore_epi32(pairs, first<__m256i, int32_t>(n / 2), (__m256i)x);
    } else {
      _mm_maskstore_epi32(pairs, first<__m128i, int32_t>(n / 2), (__m128i)x);
    }
    if (n % 2) to[n - 1] = x[n - 1];
  }
#else
  std::memcpy(to, &x, n * sizeof(T));
#endif
}

// A vector's elements at places below n; zeros for the others, whatever they are. place(i): of element i.
template <class V, class Place>
inline V keep_first(const V& x, int64_t n, const Place& place) {
  using Places = decltype(x == x);
  Places places{};
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) places[i] = place(i);
  return places < Places{} + static_cast<decltype(0 + places[0])>(n) ? x : V{};
}
template <class V>
inline V keep_first(const V& x, int64_t n) {
  return keep_first(x, n, [](size_t i) { return i; });
}

// Functions of an update, lane by lane; compilers make one instruction of the loop. arithmetic.h has them of numbers.
template <class V>
inline V square_root(const V& x) {
  V root{};
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) root[i] = std::sqrt(x[i]);
  return root;
}

// The larger one; NaN if one of them is NaN.
template <class V>
inline V maximum(const V& a, const V& b) {
  return (a > b) | (a != a) ? a : b;
}

// 16-bit values as upper halves of 32 bits, zeros below; and the upper halves of 32-bit values.
inline U32 upper_halves(const U16& x) {
#if NPERF_AVX512
  return (U32)_mm512_cvtepu16_epi32((__m256i)x) << 16;
#else
  return __builtin_convertvector(x, U32) << 16;
#endif
}
inline U16 take_upper_halves(const U32& x) {
#if NPERF_AVX512
  static const uint16_t odd[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return (U16)_mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_loadu_si512(odd), (__m512i)x));
#else
  return __builtin_convertvector(x >> 16, U16);
#endif
}

#if NPERF_WIDTH == 4
// The same for a whole register's sixteen values, in the order in which AVX2 unpacks them without crossing lanes:
// elements 0-3 and 8-11, then 4-7 and 12-15.
inline void unpack_upper_halves(const U16Full& x, U32& lo, U32& hi) {
#if NPERF_AVX2
  const __m256i zero = _mm256_setzero_si256();
  lo = (U32)_mm256_unpacklo_epi16(zero, (__m256i)x);
  hi = (U32)_mm256_unpackhi_epi16(zero, (__m256i)x);
#else
  for (int i = 0; i < 8; ++i) {
    const int at = i < 4 ? i : i + 4;
    lo[i] = uint32_t(x[at]) << 16;
    hi[i] = uint32_t(x[at + 4]) << 16;
  }
#endif
}
inline U16Full pack_lower_halves(const U32& lo, const U32& hi) {
#if NPERF_AVX2
  return (U16Full)_mm256_packus_epi32((__m256i)lo, (__m256i)hi);
#else
  U16Full x{};
  for (int i = 0; i < 8; ++i) {
    const int at = i < 4 ? i : i + 4;
    x[at] = uint16_t(lo[i]);
    x[at + 4] = uint16_t(hi[i]);
  }
  return x;
#endif
}
#endif

// float16 to float32 and back, to the nearest, ties to even.
inline F32 widen_half(const U16& x) {
#if NPERF_AVX512
  return (F32)_mm512_cvtph_ps((__m256i)x);
#elif NPERF_AVX2
  return (F32)_mm256_cvtph_ps((__m128i)x);
#else
  F32 wide{};
  for (int i = 0; i < 2 * W; ++i) {
    Binary16 half;
    const uint16_t bits = x[i];
    std::memcpy(&half, &bits, sizeof half);
    wide[i] = static_cast<float>(half);
  }
  return wide;
#endif
}
inline U16 narrow_half(const F32& x) {
#if NPERF_AVX512
  return (U16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif NPERF_AVX2
  return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  U16 raw{};
  for (int i = 0; i < 2 * W; ++i) {
    const Binary16 half = static_cast<Binary16>(x[i]);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof half);
    raw[i] = bits;
  }
  return raw;
#endif
}

// Loads W values as float64. On x86 a conversion with a memory operand needs no shuffle on the arithmetic ports; a
// conversion of half a register does. The memory was just written, so it is in the store buffer or the L1. Without the
// assembly, the compiler would forward the stored register and convert that.
inline F64 as_f64(const double* from) { return load_vector<F64>(from); }
inline F64 as_f64(const float* from) {
#if NPERF_AVX512 || NPERF_AVX2
  using Unaligned = float __attribute__((vector_size(4 * W), aligned(4), may_alias));
  F64 x;
  __asm__("vcvtps2pd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const Unaligned*>(from)));
  return x;
#else
  return __builtin_convertvector(load_vector<F32Half>(from), F64);
#endif
}

// Loads values as a vector of sums, float64 or float32.
template <class Sum, class S>
inline Sum load_as(const S* from) {
  if constexpr (std::is_same_v<Sum, F64>) {
    return as_f64(from);
  } else {
    return load_vector<Sum>(from);
  }
}

// Whether an element is above a limit.
inline bool any_above(const U32& x, uint32_t limit) {
#if NPERF_AVX512
  return _mm512_cmpgt_epu32_mask((__m512i)x, _mm512_set1_epi32(int(limit))) != 0;
#elif NPERF_AVX2
  const __m256i least = _mm256_set1_epi32(int(limit + 1));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)x, least), (__m256i)x)) != 0;
#else
  bool found = false;
  for (int i = 0; i < 2 * W; ++i) found |= x[i] > limit;
  return found;
#endif
}

// The sums of W vectors: element i is the sum of vector i. Transposes and adds at once.
inline F64 sum_each(const F64* x) {
#if NPERF_WIDTH == 8
  F64 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; ++i)
    quads[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
#elif NPERF_WIDTH == 4
  F64 pairs[2];
  for (int i = 0; i < 2; ++i)
    pairs[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 4, 2, 6) +
               __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 5, 3, 7);
  return __builtin_shufflevector(pairs[0], pairs[1], 0, 1, 4, 5) +
         __builtin_shufflevector(pairs[0], pairs[1], 2, 3, 6, 7);
#else
  return __builtin_shufflevector(x[0], x[1], 0, 2) + __builtin_shufflevector(x[0], x[1], 1, 3);
#endif
}

}  // namespace
}  // namespace noetherperf
