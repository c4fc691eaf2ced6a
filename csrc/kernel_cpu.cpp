// The CPU kernel: steps a block of a matrix and takes its moments in the same pass, in SIMD.
//
// Compiled once per instruction set (NPERF_ISA = baseline, avx2, avx512) from vector extensions that GCC and Clang
// share; intrinsics only where those have no word for it (half precision, masked loads). Everything but the one
// exported function has internal linkage, so that no build's code can stand in for another's.
//
// Arithmetic is in float32 (float64 for float64 parameters), sums in float64. A block of N elements is one vector
// register of the compute type; W is a register's worth of float64.

#include "kernel_cpu.h"

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define NPERF_JOIN_(a, b) a##b
#define NPERF_JOIN(a, b) NPERF_JOIN_(a, b)

namespace noetherperf {
namespace {

#if defined(__AVX512F__)
constexpr int W = 8;
#elif defined(__AVX2__)
constexpr int W = 4;
#else
constexpr int W = 2;
#endif

using F64 = double __attribute__((vector_size(8 * W)));
using F32 = float __attribute__((vector_size(8 * W)));  // twice as many
using F32Half = float __attribute__((vector_size(4 * W)));
using U32 = uint32_t __attribute__((vector_size(8 * W)));
using U16 = uint16_t __attribute__((vector_size(4 * W)));
static_assert(2 * W <= col_sums_padding, "a vector past the width must fit into the padding");

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

// The first n of a vector's elements, zeros after them; and their store, which touches nothing past them.
template <class V, class T>
inline V load_first(const T* from, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask32 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) return (V)_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
  if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
  if constexpr (sizeof(T) == 2) return (V)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
#else
  V x{};
  std::memcpy(&x, from, n * sizeof(T));
  return x;
#endif
}

template <class V, class T>
inline void store_first(T* to, const V& x, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask32 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), (__m512i)x);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), (__m512i)x);
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), (__m256i)x);
#else
  std::memcpy(to, &x, n * sizeof(T));
#endif
}

// Storage types: what lies in memory (Raw), what it is computed in (Vec), and the way between the two.
struct Float32 {
  using Element = float;
  using Scalar = float;
  using Raw = F32;
  using Vec = F32;
  static Vec widen(const Raw& x) { return x; }
  static Raw narrow(const Vec& x) { return x; }
};

struct Float64 {
  using Element = double;
  using Scalar = double;
  using Raw = F64;
  using Vec = F64;
  static Vec widen(const Raw& x) { return x; }
  static Raw narrow(const Vec& x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
  using Scalar = float;
  using Raw = U16;
  using Vec = F32;
  static U32 spread(const Raw& x) {
#if defined(__AVX512F__)
    return (U32)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (U32)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, U32);
#endif
  }
  static Raw squeeze(const U32& x) {
#if defined(__AVX512F__)
    return (Raw)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, U16);
#endif
  }
  static Vec widen(const Raw& x) { return (Vec)(spread(x) << 16); }
  // To the nearest, ties to even; a NaN stays one.
  static Raw narrow(const Vec& x) {
    const U32 bits = (U32)x;
    const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32 quiet = (bits >> 16) | 0x40u;
    const U32 is_nan = (U32)(x != x);
    return squeeze((is_nan & quiet) | (~is_nan & rounded));
  }
};

struct Float16 {
  using Element = uint16_t;
  using Scalar = float;
  using Raw = U16;
  using Vec = F32;
#if defined(__AVX512F__)
  static Vec widen(const Raw& x) { return (Vec)_mm512_cvtph_ps((__m256i)x); }
  static Raw narrow(const Vec& x) { return (Raw)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
  static Vec widen(const Raw& x) { return (Vec)_mm256_cvtph_ps((__m128i)x); }
  static Raw narrow(const Vec& x) { return (Raw)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
  static Vec widen(const Raw& x) {
    Vec wide;
    for (int i = 0; i < 2 * W; ++i) {
      _Float16 half;
      const uint16_t bits = x[i];
      std::memcpy(&half, &bits, sizeof half);
      wide[i] = static_cast<float>(half);
    }
    return wide;
  }
  static Raw narrow(const Vec& x) {
    Raw raw;
    for (int i = 0; i < 2 * W; ++i) {
      const _Float16 half = static_cast<_Float16>(x[i]);
      uint16_t bits;
      std::memcpy(&bits, &half, sizeof half);
      raw[i] = bits;
    }
    return raw;
  }
#endif
};

// A vector's parts as float64: one for float64, two for float32.
template <class V>
constexpr int n_parts = sizeof(V) / sizeof(F64) * (sizeof(std::declval<V>()[0]) == 4 ? 2 : 1);

#if defined(__AVX512F__)  // GCC takes four instructions a half where the machine has one
inline F64 part(const F32& x, int which) {
  return (F64)_mm512_cvtps_pd(which == 0 ? _mm512_castps512_ps256((__m512)x) : _mm512_extractf32x8_ps((__m512)x, 1));
}
#else
template <size_t... I>
inline F64 half(const F32& x, int which, std::index_sequence<I...>) {
  const F32Half part = which == 0 ? __builtin_shufflevector(x, x, static_cast<int>(I)...)
                                  : __builtin_shufflevector(x, x, static_cast<int>(W + I)...);
#if defined(__AVX2__)
  return (F64)_mm256_cvtps_pd((__m128)part);
#else
  return __builtin_convertvector(part, F64);
#endif
}
inline F64 part(const F32& x, int which) { return half(x, which, std::make_index_sequence<W>()); }
#endif
inline F64 part(const F64& x, int) { return x; }

// The sums of W vectors, element i that of vector i: a transposition and its additions at once.
inline F64 sum_each(const F64* x) {
#if defined(__AVX512F__)
  F64 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; ++i)
    quads[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
#elif defined(__AVX2__)
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

// One vector of elements: loaded, stepped, stored. n < N touches the first n only.
template <class Type, Mode mode, bool whole>
struct Elements {
  using Element = typename Type::Element;
  using Raw = typename Type::Raw;
  using Vec = typename Type::Vec;
  Vec p, g, v, u, stored;

  static Vec load(const Element* from, int64_t n) {
    if constexpr (whole) return Type::widen(load_vector<Raw>(from));
    return Type::widen(load_first<Raw>(from, n));
  }

  static void store(Element* to, const Raw& x, int64_t n) {
    if constexpr (whole) {
      store_vector(to, x);
    } else {
      store_first(to, x, n);
    }
  }

  inline __attribute__((always_inline)) Elements(Element* p_ptr, const Element* g_ptr, Element* v_ptr, int64_t n,
                                                 const Coefficients<typename Type::Scalar>& c) {
    p = load(p_ptr, n);
    if constexpr (mode == Mode::measure) {
      g = load(v_ptr, n);
      v = u = Vec{};
      stored = p;
    } else {
      g = load(g_ptr, n);
      v = reads_buffer(mode) ? load(v_ptr, n) : Vec{};
      stored = p;
      update<mode>(stored, g, v, u, c);
      const Raw raw = Type::narrow(stored);
      store(p_ptr, raw, n);
      stored = Type::widen(raw);
      if constexpr (writes_buffer(mode)) store(v_ptr, Type::narrow(v), n);
    }
  }

  inline __attribute__((always_inline)) void add_part(int which, F64* moments) const {
    accumulate<mode>(moments, part(stored, which), part(p, which), part(g, which), part(u, which), part(v, which));
  }
};

// Steps n_rows rows over the block's width; their row sums are added to row_acc, position sums to the block's col_sums.
template <class Type, Mode mode, bool by_row, bool by_col, int n_rows, bool whole>
inline __attribute__((always_inline)) void vector_column(const Block& b, const Coefficients<typename Type::Scalar>& c,
                                                         int64_t row, int64_t col, int64_t n, bool fresh,
                                                         F64 (*row_acc)[n_accumulated(mode)]) {
  using Element = typename Type::Element;
  constexpr int parts = n_parts<typename Type::Vec>;
  constexpr int n_acc = n_accumulated(mode);
  F64 col_acc[parts][n_acc];
  if constexpr (by_col)
    for (int h = 0; h < parts; ++h)
      for (int m = 0; m < n_acc; ++m)
        col_acc[h][m] = fresh ? F64{} : load_vector<F64>(b.col_sums + m * b.col_sums_stride + col + h * W);
#pragma GCC unroll 1
  for (int r = 0; r < n_rows; ++r) {
    const int64_t at = (row + r) * b.row_stride + col;
    Element* const p = static_cast<Element*>(b.p) + at;
    const Element* const g = static_cast<const Element*>(b.g) + at;
    Element* const v = static_cast<Element*>(b.v) + at;
    if constexpr (by_col && n_rows > 1) {  // runs this short defeat the hardware's prefetching; into L2, not L1, where
      constexpr int to_l2 = 2;             // rows a power of two apart would push each other out
      const int64_t next = n_rows * b.row_stride;
      __builtin_prefetch(p + next, 0, to_l2);
      if constexpr (mode != Mode::measure) __builtin_prefetch(g + next, 0, to_l2);
      if constexpr (mode == Mode::measure || reads_buffer(mode)) __builtin_prefetch(v + next, 0, to_l2);
    }
    const Elements<Type, mode, whole> x(p, g, v, n, c);
#pragma GCC unroll 2
    for (int h = 0; h < parts; ++h) {
      if constexpr (by_col) x.add_part(h, col_acc[h]);
      if constexpr (by_row) x.add_part(h, row_acc[r]);
    }
  }
  if constexpr (by_col)
    for (int h = 0; h < parts; ++h)
      for (int m = 0; m < n_acc; ++m) store_vector(b.col_sums + m * b.col_sums_stride + col + h * W, col_acc[h][m]);
}

template <class Type, Mode mode, bool by_row, bool by_col, int n_rows>
inline void step_rows(const Block& b, const Coefficients<typename Type::Scalar>& c, int64_t row,
                      F64 (*row_acc)[n_accumulated(mode)]) {
  constexpr int N = sizeof(typename Type::Raw) / sizeof(typename Type::Element);
  const bool fresh = b.fresh && row == 0;
  int64_t col = 0;
  for (; col + N <= b.width; col += N)
    vector_column<Type, mode, by_row, by_col, n_rows, true>(b, c, row, col, N, fresh, row_acc);
  if (col < b.width)
    vector_column<Type, mode, by_row, by_col, n_rows, false>(b, c, row, col, b.width - col, fresh, row_acc);
}

template <class Type, Mode mode, bool by_row, bool by_col>
void step_block(const Block& block) {
  const Block b = block;  // a copy that no store can touch
  using S = typename Type::Scalar;
  const Coefficients<S> c{S(b.c.lr),          S(b.c.decay), S(b.c.sign), S(b.c.buffer_decay),
                          S(b.c.buffer_gain), S(b.c.mix_d), S(b.c.mix_v)};
  constexpr int n_acc = n_accumulated(mode);
  constexpr int rows_at_once = by_col ? (W < 4 ? W : 4) : 1;
  for (int64_t bank = 0; bank < b.rows; bank += W) {  // W rows: one vector of row sums
    const int64_t rows = b.rows - bank < W ? b.rows - bank : W;
    F64 acc[W][n_acc];
    if constexpr (by_row)
      for (int r = rows_at_once == 1 ? int(rows) : 0; r < W; ++r)
        for (int m = 0; m < n_acc; ++m) acc[r][m] = F64{};
    int64_t row = 0;
    for (; row + rows_at_once <= rows; row += rows_at_once) {
      if constexpr (rows_at_once == 1) {
        F64 local[1][n_acc] = {};  // in registers
        step_rows<Type, mode, by_row, by_col, 1>(b, c, bank + row, local);
        if constexpr (by_row)
          for (int m = 0; m < n_acc; ++m) acc[row][m] = local[0][m];
      } else {
        step_rows<Type, mode, by_row, by_col, rows_at_once>(b, c, bank + row, acc + row);
      }
    }
    for (; row < rows; ++row) step_rows<Type, mode, by_row, by_col, 1>(b, c, bank + row, acc + row);
    if constexpr (by_row) {
      for (int m = 0; m < n_acc; ++m) {
        F64 column[W];
        for (int r = 0; r < W; ++r) column[r] = acc[r][m];
        const F64 sums = sum_each(column);
        double* const to = b.row_sums + m * b.row_sums_stride + bank;
        for (int64_t r = 0; r < rows; ++r) to[r] += sums[r];
      }
    }
  }
}

template <class Type, Mode mode>
void fill(BlockKernel (&table)[2][2]) {
  table[0][0] = step_block<Type, mode, false, false>;
  table[0][1] = step_block<Type, mode, false, true>;
  table[1][0] = step_block<Type, mode, true, false>;
  table[1][1] = step_block<Type, mode, true, true>;
}

template <class Type>
void fill(BlockKernel (&table)[n_modes][2][2]) {
  fill<Type, Mode::plain>(table[int(Mode::plain)]);
  fill<Type, Mode::momentum>(table[int(Mode::momentum)]);
  fill<Type, Mode::nesterov>(table[int(Mode::nesterov)]);
  fill<Type, Mode::stale>(table[int(Mode::stale)]);
  fill<Type, Mode::measure>(table[int(Mode::measure)]);
}

}  // namespace

#define NPERF_STRING_(x) #x
#define NPERF_STRING(x) NPERF_STRING_(x)

Kernels NPERF_JOIN(kernels_, NPERF_ISA)() {
  Kernels kernels{};
  kernels.isa = NPERF_STRING(NPERF_ISA);
  fill<Float32>(kernels.step[float32]);
  fill<Float64>(kernels.step[float64]);
  fill<BFloat16>(kernels.step[bfloat16]);
  fill<Float16>(kernels.step[float16]);
  return kernels;
}

}  // namespace noetherperf
