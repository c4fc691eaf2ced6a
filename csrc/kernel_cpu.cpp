// The CPU kernel: steps a block of a matrix and takes its moments in the same pass, in SIMD.
//
// Compiled once per instruction set (NPERF_ISA = baseline, avx2, avx512, of NPERF_WIDTH = 2, 4, 8) from vector
// extensions that GCC and Clang share and the operations of simd.h. What the code does follows from the width alone, so
// that a machine without an instruction set can run the code of its width. Everything but the one exported function has
// internal linkage, so that no build's code can stand in for another's.
//
// Arithmetic is in float32 (float64 for float64 parameters), sums in float64. A block of N elements is one vector
// register of the compute type; W is a register's worth of float64.

#include "kernel_cpu.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "simd.h"

#define NPERF_JOIN_(a, b) a##b
#define NPERF_JOIN(a, b) NPERF_JOIN_(a, b)

namespace noetherperf {
namespace {

static_assert(2 * W <= 16, "a vector past the width must fit into the padding of col_sums");

// Storage types: what lies in memory (Raw), what it is computed in (Vec), and the way between the two. order(i): where
// in memory that holds a Vec its elements from i on lie, W of them.
struct InOrder {
  static constexpr int64_t order(int64_t i) { return i; }
};

struct Float32 : InOrder {
  using Element = float;
  using Scalar = float;
  using Raw = F32;
  using Vec = F32;
  static Vec widen(const Raw& x) { return x; }
  static Raw narrow(const Vec& x) { return x; }
};

struct Float64 : InOrder {
  using Element = double;
  using Scalar = double;
  using Raw = F64;
  using Vec = F64;
  static Vec widen(const Raw& x) { return x; }
  static Raw narrow(const Vec& x) { return x; }
};

#if NPERF_WIDTH == 4
// Two registers' worth of float32 as one vector, in the order in which 16-bit values unpack without crossing lanes.
struct Unpacked {
  F32 lo, hi;
};
inline Unpacked operator+(const Unpacked& x, const Unpacked& y) { return {x.lo + y.lo, x.hi + y.hi}; }
inline Unpacked operator-(const Unpacked& x, const Unpacked& y) { return {x.lo - y.lo, x.hi - y.hi}; }
inline Unpacked operator*(float x, const Unpacked& y) { return {x * y.lo, x * y.hi}; }

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
  // Rounds to the nearest upper half, ties to even. A NaN stays one: those that come of bfloat16 have an empty lower
  // half, as those that arithmetic makes, and no carry reaches the exponent.
  static U32 round(const F32& x) {
    const U32 bits = (U32)x;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
#if NPERF_WIDTH == 4
  using Raw = U16Full;
  using Vec = Unpacked;
  static Vec widen(const Raw& x) {
    U32 lo, hi;
    unpack_upper_halves(x, lo, hi);
    return {(F32)lo, (F32)hi};
  }
  static Raw narrow(const Vec& x) { return pack_lower_halves(round(x.lo), round(x.hi)); }
  static constexpr int64_t order(int64_t i) { return i == 4 ? 8 : i == 8 ? 4 : i; }
#else
  using Raw = U16;
  using Vec = F32;
  static Vec widen(const Raw& x) { return (Vec)upper_halves(x); }
  static Raw narrow(const Vec& x) { return lower_halves(round(x)); }
#endif
};

struct Float16 : InOrder {
  using Element = uint16_t;
  using Scalar = float;
  using Raw = U16;
  using Vec = F32;
  static Vec widen(const Raw& x) { return widen_half(x); }
  static Raw narrow(const Vec& x) { return narrow_half(x); }
};

// A vector of the compute type holds so many elements. Sums by position are walked in whole cache lines and whole
// vectors.
template <class Type>
constexpr int64_t n_lanes = sizeof(typename Type::Raw) / sizeof(typename Type::Element);
template <class Type>
constexpr int64_t unit_cols = n_lanes<Type> > 8 ? n_lanes<Type> : 8;

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

// How many columns of so many rows are walked together, a strip. The nearest cache keeps what a strip's passes read
// again; what memory sends, asked for in each of them, is to arrive evenly.
constexpr int64_t strip_size = 128;
constexpr int64_t strip_cols(int n_rows) { return strip_size / n_rows; }

// After so many vectors, what was stored has arrived in the cache and can be read back without waiting for it.
constexpr int64_t lag = 4;

// Values of a strip that no tensor holds in the type they are computed in, row after row.
template <class Scalar>
struct Copies {
  alignas(64) Scalar p[strip_size], g[strip_size], u[strip_size], v[strip_size];
};

// Rows of a block. Moments are taken of values in memory: of the tensors where these hold them as computed, of copies
// otherwise. A strip that is not whole is narrower than a unit; copies fill it up with zeros. Memory is asked for row
// by row, or for all rows as the one run that they are.
template <class Type, Mode mode, bool whole, int n_rows, bool one_run>
class Strip {
 public:
  using Element = typename Type::Element;
  using Scalar = typename Type::Scalar;
  using Raw = typename Type::Raw;
  using Vec = typename Type::Vec;
  static constexpr bool as_stored = whole && sizeof(Element) == sizeof(Scalar);
  static constexpr bool u_is_v = mode == Mode::momentum;
  static constexpr bool needs_copies = !as_stored || !(u_is_v || mode == Mode::measure);

  Strip(const Block& b, int64_t row, int64_t col, int64_t width, int64_t ahead, Copies<Scalar>& copies)
      : p_(static_cast<Element*>(b.p) + row * b.row_stride + col),
        g_(static_cast<const Element*>(mode == Mode::measure ? b.v : b.g) + row * b.row_stride + col),
        v_(static_cast<Element*>(b.v) + row * b.row_stride + col),
        stride_(b.row_stride),
        width_(width),
        ahead_(ahead),
        copies_(copies) {}

  int64_t width() const { return whole ? width_ : unit_cols<Type>; }

  // Row r of each: p before its step, and as stored after it; u and v after it.
  const Scalar* p(int r) const { return values(p_, copies_.p, r); }
  const Scalar* g(int r) const { return values(g_, copies_.g, r); }
  const Scalar* v(int r) const { return values(v_, copies_.v, r); }
  const Scalar* u(int r) const { return u_is_v ? v(r) : copies_.u + place(r, 0); }

  void copy(int r) {
    if constexpr (as_stored) return;
    for (int64_t col = 0; col < width(); col += n_lanes<Type>) {
      store_vector(copies_.p + place(r, col), load(p_, r, col));
      store_vector(copies_.g + place(r, col), load(g_, r, col));
    }
  }

  // Steps a vector of row r.
  template <bool measured>
  inline __attribute__((always_inline)) void step(int r, int64_t col, const Coefficients<Scalar>& c) {
    if constexpr (mode == Mode::measure) return;
    constexpr bool copied = measured && !as_stored;
    Vec p = copied ? load_vector<Vec>(copies_.p + place(r, col)) : load(p_, r, col);
    const Vec g = copied ? load_vector<Vec>(copies_.g + place(r, col)) : load(g_, r, col);
    Vec v{}, u;
    if constexpr (reads_buffer(mode)) v = load(v_, r, col);
    update<mode>(p, g, v, u, c);
    const Raw stored = Type::narrow(p);
    store(p_, r, col, stored);
    if constexpr (writes_buffer(mode)) store(v_, r, col, Type::narrow(v));
    if constexpr (copied) store_vector(copies_.p + place(r, col), Type::widen(stored));
    if constexpr (copied && (u_is_v || n_accumulated(mode) > dot_uv)) store_vector(copies_.v + place(r, col), v);
    if constexpr (measured && !u_is_v) store_vector(copies_.u + place(r, col), u);
  }

  // Ask memory for what follows. (A compiler may drop a call that does nothing else, so these are none.)
  inline __attribute__((always_inline)) void ask_p(int r, int64_t col) const { __builtin_prefetch(p_ + asked(r, col)); }
  inline __attribute__((always_inline)) void ask_g(int r, int64_t col) const {
    if constexpr (mode != Mode::measure) __builtin_prefetch(g_ + asked(r, col));
  }
  inline __attribute__((always_inline)) void ask_v(int r, int64_t col) const {
    if constexpr (mode == Mode::measure || reads_buffer(mode)) __builtin_prefetch(v_ + asked(r, col));
  }

 private:
  static int64_t place(int r, int64_t col) { return r * strip_cols(n_rows) + col; }

  const Scalar* values(const Element* tensor, const Scalar* copy, int r) const {
    return as_stored ? reinterpret_cast<const Scalar*>(tensor + r * stride_) : copy + place(r, 0);
  }

  int64_t asked(int r, int64_t col) const {
    return ahead_ + (one_run ? r * unit_cols<Type> + col * n_rows : r * stride_ + col);
  }

  Vec load(const Element* from, int r, int64_t col) const {
    from += r * stride_ + col;
    if constexpr (whole) return Type::widen(load_vector<Raw>(from));
    return Type::widen(load_first<Raw>(from, n_left(col)));
  }

  void store(Element* to, int r, int64_t col, const Raw& x) const {
    to += r * stride_ + col;
    if constexpr (whole) {
      store_vector(to, x);
    } else {
      store_first(to, x, n_left(col));
    }
  }

  // How many of the vector at col are there.
  int64_t n_left(int64_t col) const {
    const int64_t left = width_ - col;
    return left < 0 ? 0 : left < n_lanes<Type> ? left : n_lanes<Type>;
  }

  Element* p_;
  const Element* g_;
  Element* v_;
  int64_t stride_, width_, ahead_;
  Copies<Scalar>& copies_;
};

// Moments are taken in two halves, before the step and after it.
enum class Half { before, after };
constexpr bool belongs(Half half, int moment) {
  const bool of_gradient = moment == sum_g || moment == sq_g || moment == dot_pg;
  return (half == Half::before) == of_gradient;
}

// Adds W elements of row r, those from i on of the vector at col, to a half of the moments.
template <Half half, class Type, Mode mode, bool whole, int n_rows, bool one_run>
inline __attribute__((always_inline)) void accumulate(F64* sums, const Strip<Type, mode, whole, n_rows, one_run>& x,
                                                      int r, int64_t col, int64_t i) {
  constexpr int n_acc = n_accumulated(mode);
  const auto value = [at = col + Type::order(i)](const auto* row) { return as_f64(row + at); };
  const F64 p = value(x.p(r));
  if constexpr (half == Half::before) {
    accumulate_gradient(sums, p, value(x.g(r)));
  } else {
    const F64 g = n_acc > dot_gu ? value(x.g(r)) : F64{};
    const F64 u = mode == Mode::measure ? F64{} : value(x.u(r));
    const F64 v = n_acc > dot_uv ? value(x.v(r)) : F64{};
    accumulate_step<mode>(sums, p, g, u, v);
  }
}

// With sixteen registers, a half of four rows' moments by row and position is taken in two groups, the products apart.
constexpr int n_groups(bool by_row, int n_rows) { return W == 4 && by_row && n_rows > 2 ? 2 : 1; }
constexpr int group_of(int moment) {
  return moment == dot_pg || moment == sq_u || moment == dot_uv || moment == dot_gu ? 1 : 0;
}

// Adds a group of a half of the moments to the sums by position and, with by_row, to those of n_rows rows, which stay
// in registers.
template <Half half, int group, bool by_row, class Type, Mode mode, bool whole, int n_rows, bool one_run>
inline __attribute__((always_inline)) void add_group(const Strip<Type, mode, whole, n_rows, one_run>& x, Line* lines,
                                                     F64 (*row_acc)[n_accumulated(mode)]) {
  constexpr int n_acc = n_accumulated(mode);
  constexpr int n_parts = unit_cols<Type> < 2 * W ? 1 : 2;  // vectors of sums in registers at a time
  static_assert(unit_cols<Type> % (n_parts * W) == 0, "a unit is whole vectors");
  const auto taken = [](int m) { return belongs(half, m) && (n_groups(by_row, n_rows) == 1 || group_of(m) == group); };
  const auto line = [&](int64_t i, int m) { return lines[i / 8 * n_acc + m].at + i % 8; };
  F64 row_sums[n_rows][n_acc];
  if constexpr (by_row)
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < n_acc; ++m) row_sums[r][m] = taken(m) ? row_acc[r][m] : F64{};
  for (int64_t unit = 0; unit < x.width(); unit += unit_cols<Type>, lines += unit_cols<Type> / 8 * n_acc) {
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      if constexpr (half == Half::before && group == 0) x.ask_p(r, unit);
      if constexpr (half == Half::after && group == 0) x.ask_v(r, unit);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < unit_cols<Type>; i += n_parts * W) {
      F64 sums[n_parts][n_acc];
#pragma GCC unroll 2
      for (int part = 0; part < n_parts; ++part)
#pragma GCC unroll 8
        for (int m = 0; m < n_acc; ++m) sums[part][m] = taken(m) ? load_vector<F64>(line(i + part * W, m)) : F64{};
#pragma GCC unroll 4
      for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 2
        for (int part = 0; part < n_parts; ++part) {
          accumulate<half>(sums[part], x, r, unit, i + part * W);
          if constexpr (by_row) accumulate<half>(row_sums[r], x, r, unit, i + part * W);
        }
#pragma GCC unroll 2
      for (int part = 0; part < n_parts; ++part)
#pragma GCC unroll 8
        for (int m = 0; m < n_acc; ++m)
          if (taken(m)) store_vector(line(i + part * W, m), sums[part][m]);
    }
  }
  if constexpr (by_row)
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < n_acc; ++m)
        if (taken(m)) row_acc[r][m] = row_sums[r][m];
}

// Adds a half of the moments of a strip.
template <Half half, bool by_row, class Type, Mode mode, bool whole, int n_rows, bool one_run>
inline __attribute__((always_inline)) void add_by_position(const Strip<Type, mode, whole, n_rows, one_run>& x,
                                                           Line* lines, F64 (*row_acc)[n_accumulated(mode)]) {
  add_group<half, 0, by_row>(x, lines, row_acc);
  if constexpr (n_groups(by_row, n_rows) > 1) add_group<half, 1, by_row>(x, lines, row_acc);
}

// Steps row r; with by_row, adds its moments to row_acc, those after the step a little behind it.
template <bool measured, bool by_row, bool alone, class Type, Mode mode, bool whole, int n_rows, bool one_run>
inline __attribute__((always_inline)) void step_row(Strip<Type, mode, whole, n_rows, one_run>& x, int r,
                                                    const Coefficients<typename Type::Scalar>& coefficients,
                                                    F64* row_acc) {
  const Coefficients<typename Type::Scalar> c = coefficients;  // a copy that no store can touch
  constexpr int n_acc = n_accumulated(mode);
  constexpr int64_t N = n_lanes<Type>;
  F64 sums[n_acc];
  if constexpr (by_row)
#pragma GCC unroll 8
    for (int m = 0; m < n_acc; ++m) sums[m] = row_acc[m];
  const auto step = [&](int64_t col) __attribute__((always_inline)) {
    if constexpr (alone && (measured || sizeof(typename Type::Element) == 2)) {
      x.ask_p(r, col);
      x.ask_v(r, col);
    }
    if constexpr (measured || sizeof(typename Type::Element) == 2) x.ask_g(r, col);
    if constexpr (by_row)
#pragma GCC unroll 4
      for (int64_t i = 0; i < N; i += W) accumulate<Half::before>(sums, x, r, col, i);
    x.template step<measured>(r, col, c);
  };
  const auto behind = [&](int64_t col) __attribute__((always_inline)) {
    if constexpr (by_row)
#pragma GCC unroll 4
      for (int64_t i = 0; i < N; i += W) accumulate<Half::after>(sums, x, r, col, i);
  };
  const int64_t width = x.width(), start = !by_row ? width : width < lag * N ? width : lag * N;
  for (int64_t col = 0; col < start; col += N) step(col);
  for (int64_t col = start; col < width; col += N) {
    step(col);
    behind(col - start);
  }
  for (int64_t col = width - start; by_row && col < width; col += N) behind(col);
  if constexpr (by_row)
#pragma GCC unroll 8
    for (int m = 0; m < n_acc; ++m) row_acc[m] = sums[m];
}

// Steps n_rows rows of a strip; their row sums are added to row_acc, position sums to the block's col_sums.
template <class Type, Mode mode, bool by_row, bool by_col, int n_rows, bool whole, bool one_run>
inline void step_strip(const Block& b, const Coefficients<typename Type::Scalar>& c, int64_t row, int64_t col,
                       int64_t width, int64_t ahead, Copies<typename Type::Scalar>& copies,
                       F64 (*row_acc)[n_accumulated(mode)]) {
  constexpr bool measured = by_row || by_col;
  Strip<Type, mode, whole, n_rows, one_run> strip(b, row, col, width, ahead, copies);
  Line* const lines = by_col ? b.col_sums + col / 8 * n_accumulated(mode) : nullptr;
  if constexpr (measured)
    for (int r = 0; r < n_rows; ++r) strip.copy(r);
  if constexpr (by_col) add_by_position<Half::before, by_row>(strip, lines, row_acc);
  for (int r = 0; r < n_rows; ++r) step_row<measured, by_row && !by_col, !by_col>(strip, r, c, row_acc[r]);
  if constexpr (by_col) add_by_position<Half::after, by_row>(strip, lines, row_acc);
}

template <class Type, Mode mode, bool by_row, bool by_col, int n_rows, bool one_run>
inline void step_rows(const Block& b, const Coefficients<typename Type::Scalar>& c, int64_t row,
                      Copies<typename Type::Scalar>& copies, F64 (*row_acc)[n_accumulated(mode)]) {
  constexpr bool in_strips = by_col || (by_row && Strip<Type, mode, true, n_rows, one_run>::needs_copies);
  const int64_t end = b.width / unit_cols<Type> * unit_cols<Type>;
  const int64_t widest = in_strips ? strip_cols(n_rows) : end;
  // How far ahead to ask for memory: with moments to take or 16 bits to convert, too little of the work ahead is in
  // flight for the hardware to keep memory busy. A row is followed by the next. Several are as many streams, which the
  // hardware follows but starts late: at their end, the beginning of the next ones is asked for.
  constexpr int64_t bytes = n_rows == 1 ? 2048 : one_run ? 2560 : 512;
  constexpr int64_t ahead = bytes / sizeof(typename Type::Element);
  const auto from = [&](int64_t col) {
    if (one_run) return ahead + col * (n_rows - 1);
    return n_rows == 1 || col + ahead < b.width ? ahead : ahead + n_rows * b.row_stride - b.width;
  };
  for (int64_t col = 0; col < end; col += widest)
    step_strip<Type, mode, by_row, by_col, n_rows, true, one_run>(
        b, c, row, col, end - col < widest ? end - col : widest, from(col), copies, row_acc);
  if (end < b.width)
    step_strip<Type, mode, by_row, by_col, n_rows, false, one_run>(b, c, row, end, b.width - end, from(end), copies,
                                                                   row_acc);
}

template <class Type, Mode mode, bool by_row, bool by_col>
void step_block(const Block& block) {
  const Block b = block;  // a copy that no store can touch
  using S = typename Type::Scalar;
  const auto number = [](double x) { return x == x ? S(x) : S(NAN); };  // no NaN that rounding could carry on
  const Coefficients<S> c{number(b.c.lr),          number(b.c.decay), number(b.c.sign), number(b.c.buffer_decay),
                          number(b.c.buffer_gain), number(b.c.mix_d), number(b.c.mix_v)};
  constexpr int n_acc = n_accumulated(mode);
  const int64_t row_bytes = b.row_stride * sizeof(typename Type::Element);
  const int together = by_col ? rows_together(b.width, row_bytes) : 1;
  // Streams within a page confuse the hardware that follows them.
  const bool one_run = b.row_stride == b.width && most_rows * row_bytes <= page;
  Copies<S> copies;
  if (by_col && b.fresh) std::memset(b.col_sums, 0, n_lines(b.width, n_acc) * sizeof(Line));
  for (int64_t bank = 0; bank < b.rows; bank += W) {  // W rows: one vector of row sums
    const int64_t rows = b.rows - bank < W ? b.rows - bank : W;
    F64 acc[W][n_acc];
    for (int r = 0; r < W; ++r)
      for (int m = 0; m < n_acc; ++m) acc[r][m] = F64{};
    int64_t row = 0;
    if constexpr (by_col) {
      for (; together == most_rows && row + most_rows <= rows; row += most_rows)
        if (one_run) {
          step_rows<Type, mode, by_row, by_col, most_rows, true>(b, c, bank + row, copies, acc + row);
        } else {
          step_rows<Type, mode, by_row, by_col, most_rows, false>(b, c, bank + row, copies, acc + row);
        }
      for (; together > 1 && row + 2 <= rows; row += 2)
        step_rows<Type, mode, by_row, by_col, 2, false>(b, c, bank + row, copies, acc + row);
    }
    for (; row < rows; ++row) step_rows<Type, mode, by_row, by_col, 1, false>(b, c, bank + row, copies, acc + row);
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

// Advances a law's state of the segments [begin, end) by their moments.
template <Law law>
void advance(double* state, int64_t stride, const double* moments, int64_t moment_stride, const Transitions& t,
             int64_t begin, int64_t end) {
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i)
    if constexpr (law == translation) {
      advance_translation(state, stride, moments, moment_stride, t, i);
    } else {
      advance_norm(state, stride, moments, moment_stride, t, i);
    }
}

}  // namespace

#define NPERF_STRING_(x) #x
#define NPERF_STRING(x) NPERF_STRING_(x)

Kernels NPERF_JOIN(kernels_, NPERF_ISA)() {
  Kernels kernels{};
  kernels.isa = NPERF_STRING(NPERF_ISA);
  kernels.is_native = is_native;
  kernels.advance[translation] = advance<translation>;
  kernels.advance[norm] = advance<norm>;
  fill<Float32>(kernels.step[float32]);
  fill<Float64>(kernels.step[float64]);
  fill<BFloat16>(kernels.step[bfloat16]);
  fill<Float16>(kernels.step[float16]);
  return kernels;
}

}  // namespace noetherperf
