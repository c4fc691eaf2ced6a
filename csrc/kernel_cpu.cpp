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
static_assert(2 * W <= 16, "a vector past the width must fit into the padding of col_sums");

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
  static Raw squeeze(const U32& x) {  // x < 2^16
#if defined(__AVX512F__)
    return (Raw)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
    return (Raw)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
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
    return squeeze(x != x ? quiet : rounded);
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

// W values in memory as float64. On x86 a conversion that reads memory (just written, so in the store buffer or the
// nearest cache) spares the arithmetic ports the shuffles that one of half a register would need; left alone, a
// compiler would know the value that it has just stored, and convert that.
inline F64 as_f64(const double* from) { return load_vector<F64>(from); }
inline F64 as_f64(const float* from) {
#if defined(__AVX2__)
  using Unaligned = float __attribute__((vector_size(4 * W), aligned(4), may_alias));
  F64 x;
  __asm__("vcvtps2pd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const Unaligned*>(from)));
  return x;
#else
  return __builtin_convertvector(load_vector<F32Half>(from), F64);
#endif
}

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

struct Parts {
  F64 stored, p, g, u, v;
};

// One vector of elements, loaded, stepped and stored. n < N touches the first n elements only.
template <class Type, Mode mode, bool whole>
struct Elements {
  using Element = typename Type::Element;
  using Scalar = typename Type::Scalar;
  using Raw = typename Type::Raw;
  using Vec = typename Type::Vec;

  // What moments are taken of, in memory (the nearest cache), to be read as float64 part by part.
  struct Values {
    Vec stored, p, g, u, v;

    inline __attribute__((always_inline)) Parts part(int h) const {
      const auto at = [h](const Vec& x) { return as_f64(reinterpret_cast<const Scalar*>(&x) + h * W); };
      return {at(stored), at(p), at(g), at(u), n_accumulated(mode) > dot_uv ? at(v) : F64{}};
    }
  };

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

  static inline __attribute__((always_inline)) void step(Element* p_ptr, const Element* g_ptr, Element* v_ptr,
                                                         int64_t n, const Coefficients<Scalar>& c, Values& values) {
    Vec p = load(p_ptr, n), v{}, u{};
    if constexpr (mode == Mode::measure) {
      values = {p, p, load(v_ptr, n), u, v};
      return;
    }
    const Vec g = load(g_ptr, n);
    values.p = p;
    values.g = g;
    if constexpr (reads_buffer(mode)) v = load(v_ptr, n);
    update<mode>(p, g, v, u, c);
    const Raw stored = Type::narrow(p);
    store(p_ptr, stored, n);
    if constexpr (writes_buffer(mode)) store(v_ptr, Type::narrow(v), n);
    values.stored = Type::widen(stored);
    values.u = u;
    values.v = v;
  }
};

// How many rows are walked together. Alone, a row is one run of memory, and its sums by row stay in registers. Sums by
// position are loaded and stored less often where several rows share them; with AVX-512 that does not pay where they
// stay in the nearest cache anyway. Rows a multiple of a page apart fall into the same sets of that cache, which hold
// eight lines or little more: p, g and v of four rows would push each other out.
constexpr int64_t near_cols = W < 8 ? 0 : 768;
constexpr int most_rows = W < 4 ? W : 4;
constexpr int64_t page = 4096;
constexpr int rows_together(int64_t width, int64_t row_bytes) {
  return width <= near_cols ? 1 : row_bytes % page == 0 ? 2 : most_rows;
}

// AVX2's sixteen registers do not hold all sums at once. There the values are gone through twice: sums by position are
// taken of one part after the other, and beside sums by row of one half of the moments after the other, each with the
// values that it shares.
constexpr int n_passes = W < 8 ? 2 : 1;
constexpr bool in_pass(int pass, bool by_row, int part, int moment) {
  if (n_passes == 1) return true;
  const bool of_update = moment == sum_p || moment == sq_p || moment == sq_u || moment == dot_uv;
  return pass == (by_row ? of_update : part);
}

// Steps one vector's width of n_rows rows; their row sums are added to row_acc, position sums to the block's col_sums.
template <class Type, Mode mode, bool by_row, bool by_col, int n_rows, bool whole>
inline __attribute__((always_inline)) void vector_column(const Block& b, const Coefficients<typename Type::Scalar>& c,
                                                         int64_t row, int64_t col, int64_t n, int64_t ahead, bool fresh,
                                                         F64 (*row_acc)[n_accumulated(mode)]) {
  using Element = typename Type::Element;
  using Vectors = Elements<Type, mode, whole>;
  constexpr int parts = n_parts<typename Type::Vec>;
  constexpr int n_acc = n_accumulated(mode);
  constexpr bool measured = by_row || by_col;
  typename Vectors::Values values[n_rows];
#pragma GCC unroll 4
  for (int r = 0; r < n_rows; ++r) {
    const int64_t at = (row + r) * b.row_stride + col;
    Element* const p = static_cast<Element*>(b.p) + at;
    const Element* const g = static_cast<const Element*>(b.g) + at;
    Element* const v = static_cast<Element*>(b.v) + at;
    if constexpr (measured || sizeof(Element) == 2) {
      __builtin_prefetch(p + ahead);
      if constexpr (mode != Mode::measure) __builtin_prefetch(g + ahead);
      if constexpr (mode == Mode::measure || reads_buffer(mode)) __builtin_prefetch(v + ahead);
    }
    Vectors::step(p, g, v, n, c, values[r]);
  }
  if constexpr (!measured) return;

  double* const col_sums = by_col ? b.col_sums[col / 8 * n_acc].at + col % 8 : nullptr;
  const auto col_sum = [&](int h, int m) { return col_sums + h * W / 8 * n_acc * 8 + h * W % 8 + m * 8; };
#pragma GCC unroll 2
  for (int pass = 0; pass < n_passes; ++pass) {
    F64 col_acc[parts][n_acc];
    if constexpr (by_col)
#pragma GCC unroll 2
      for (int h = 0; h < parts; ++h)
#pragma GCC unroll 8
        for (int m = 0; m < n_acc; ++m)
          if (in_pass(pass, by_row, h, m)) col_acc[h][m] = fresh ? F64{} : load_vector<F64>(col_sum(h, m));
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      F64 sums[n_acc];
      if constexpr (by_row)
#pragma GCC unroll 8
        for (int m = 0; m < n_acc; ++m) sums[m] = row_acc[r][m];
#pragma GCC unroll 2
      for (int h = 0; h < parts; ++h) {
        const Parts x = values[r].part(h);
        if constexpr (by_col) accumulate<mode>(col_acc[h], x.stored, x.p, x.g, x.u, x.v);
        if constexpr (by_row) accumulate<mode>(sums, x.stored, x.p, x.g, x.u, x.v);
      }
      if constexpr (by_row)
#pragma GCC unroll 8
        for (int m = 0; m < n_acc; ++m)
          if (in_pass(pass, by_row, 0, m)) row_acc[r][m] = sums[m];
    }
    if constexpr (by_col)
#pragma GCC unroll 2
      for (int h = 0; h < parts; ++h)
#pragma GCC unroll 8
        for (int m = 0; m < n_acc; ++m)
          if (in_pass(pass, by_row, h, m)) store_vector(col_sum(h, m), col_acc[h][m]);
  }
}

template <class Type, Mode mode, bool by_row, bool by_col, int n_rows>
inline void step_rows(const Block& b, const Coefficients<typename Type::Scalar>& c, int64_t row,
                      F64 (*row_acc)[n_accumulated(mode)]) {
  constexpr int N = sizeof(typename Type::Raw) / sizeof(typename Type::Element);
  const bool fresh = b.fresh && row == 0;
  // The sums of one row stay in registers. Those of several do not: that they lie somewhere in memory keeps a compiler
  // from spilling copies of them.
  if constexpr (n_rows > 1) __asm__("" : "+r"(row_acc));
  // How many elements ahead to ask for memory: with moments to take or 16 bits to convert, too little of the work ahead
  // is in flight for the hardware to keep memory busy. A row is followed by the next; several are as many streams,
  // which the hardware follows but starts late: at their end, the beginning of the next ones is asked for.
  constexpr int64_t ahead = (n_rows == 1 ? 2048 : 512) / sizeof(typename Type::Element);
  const int64_t turn = n_rows == 1 ? b.width : b.width - ahead, past_turn = ahead + n_rows * b.row_stride - b.width;
  int64_t col = 0;
  for (; col + N <= b.width; col += N)
    vector_column<Type, mode, by_row, by_col, n_rows, true>(b, c, row, col, N, col < turn ? ahead : past_turn, fresh,
                                                            row_acc);
  if (col < b.width)
    vector_column<Type, mode, by_row, by_col, n_rows, false>(b, c, row, col, b.width - col, past_turn, fresh, row_acc);
}

template <class Type, Mode mode, bool by_row, bool by_col>
void step_block(const Block& block) {
  const Block b = block;  // a copy that no store can touch
  using S = typename Type::Scalar;
  const Coefficients<S> c{S(b.c.lr),          S(b.c.decay), S(b.c.sign), S(b.c.buffer_decay),
                          S(b.c.buffer_gain), S(b.c.mix_d), S(b.c.mix_v)};
  constexpr int n_acc = n_accumulated(mode);
  const int together = by_col ? rows_together(b.width, b.row_stride * sizeof(typename Type::Element)) : 1;
  for (int64_t bank = 0; bank < b.rows; bank += W) {  // W rows: one vector of row sums
    const int64_t rows = b.rows - bank < W ? b.rows - bank : W;
    F64 acc[W][n_acc];
    if constexpr (by_row)
      for (int r = together > 1 ? 0 : int(rows); r < W; ++r)
        for (int m = 0; m < n_acc; ++m) acc[r][m] = F64{};
    int64_t row = 0;
    if constexpr (by_col) {
      for (; together == most_rows && row + most_rows <= rows; row += most_rows)
        step_rows<Type, mode, by_row, by_col, most_rows>(b, c, bank + row, acc + row);
      for (; together > 1 && row + 2 <= rows; row += 2)
        step_rows<Type, mode, by_row, by_col, 2>(b, c, bank + row, acc + row);
    }
    for (; row < rows; ++row) {
      F64 local[1][n_acc] = {};  // in registers
      step_rows<Type, mode, by_row, by_col, 1>(b, c, bank + row, local);
      if constexpr (by_row)
        for (int m = 0; m < n_acc; ++m) acc[row][m] = local[0][m];
    }
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
