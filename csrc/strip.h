// Strips: rows of a block that the CPU kernel walks together, their elements stepped a vector at a time.
//
// Each build of the kernel includes this file once; everything in it has internal linkage.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernel_cpu.h"
#include "types_cpu.h"

namespace noetherperf {
namespace {

template <class Step, class Scalar>
using Coefficients = typename Step::Rule::template Coefficients<Scalar>;

// Whether a step sums a moment of this operand; with `of_results`, one that needs its results too.
template <class Step>
constexpr bool takes(Operand operand, bool of_results = false) {
  for (int m = 0; m < Step::n_taken; ++m)
    if (const Moment& x = Step::Rule::moments[m]; x.has(operand) && (!of_results || is_of_results(x))) return true;
  return false;
}

// How many rows are walked together. A single row is one contiguous run, and its row sums stay in registers. Several
// rows share the loads and stores of position sums; with AVX-512 that does not pay while these sums stay in the L1 and
// are few.
// Rows a multiple of a page apart map to the same L1 sets, which have eight ways or little more: p, g and the buffers
// of four rows would evict each other.
constexpr int64_t near_cols = W < 8 ? 0 : 768;
constexpr int few_sums = 6;
constexpr int most_rows = W < 4 ? W : 4;
constexpr int64_t page = 4096;
constexpr int rows_together(int64_t width, int n_sums, int64_t row_bytes) {
  return width <= near_cols && n_sums <= few_sums ? 1 : row_bytes % page == 0 ? 2 : most_rows;
}

// The elements of a strip. It stays in the L1 between its passes. Every pass prefetches a part of what follows, so that
// memory traffic is even.
template <class Type>
constexpr int64_t strip_size = sizeof(typename Type::Element) == 2 && W >= 4 ? 256 : 128;

// The latency of a store, in vectors: after it the value is in the cache, and a load of it does not stall.
constexpr int64_t lag = 4;

// Values of a strip that no tensor stores in the compute type, row after row.
template <class Type>
struct Copies {
  using Values = typename Type::Scalar[strip_size<Type>];
  alignas(64) Values p, p_new, g, u, v;
};

// The copies of a strip's rows; they have all values if no tensor stores the compute type.
template <class Type, class Step>
class CopiedRows {
 public:
  using Scalar = typename Type::Scalar;

  CopiedRows(const Copies<Type>& copies, int64_t stride) : copies_(copies), stride_(stride) {}

  const Scalar* p(int r) const { return copies_.p + r * stride_; }
  const Scalar* p_kept(int r) const { return p(r); }
  const Scalar* p_new(int r) const { return (Step::updates ? copies_.p_new : copies_.p) + r * stride_; }
  const Scalar* g(int r) const { return copies_.g + r * stride_; }
  const Scalar* u(int r) const { return (Step::u_is_v ? copies_.v : copies_.u) + r * stride_; }
  const Scalar* v(int r) const { return copies_.v + r * stride_; }

 private:
  const Copies<Type>& copies_;
  int64_t stride_;
};

// Some rows of a block. Moments are summed from memory: from the tensors if these store the compute type and still have
// the value, else from copies. A strip that is not `whole` is narrower than a unit; copies pad it with zeros.
template <class Type, class Step, bool whole, int n_rows>
class Strip {
 public:
  using Element = typename Type::Element;
  using Scalar = typename Type::Scalar;
  using Raw = typename Type::Raw;
  using Vec = typename Type::Vec;
  using Sum = std::conditional_t<whole, typename Type::Sum, F64>;
  static constexpr int64_t cols = strip_size<Type> / n_rows;  // most of a strip
  static constexpr bool as_stored = whole && sizeof(Element) == sizeof(Scalar);
  static constexpr bool u_is_v = Step::u_is_v;
  static constexpr bool needs_copies = !as_stored || !(u_is_v || !Step::updates);
  // Whether a moment needs the buffer after the step, or after it the parameter before it.
  static constexpr bool keeps_v = u_is_v || takes<Step>(Operand::v), keeps_p = takes<Step>(Operand::p, true);

  Strip(const Block& b, int64_t row, int64_t col, int64_t width, int64_t ahead, Copies<Type>& copies)
      : p_(static_cast<Element*>(b.p) + row * b.row_stride + col),
        g_(static_cast<const Element*>(Step::updates ? b.g : b.buffers[0]) + row * b.row_stride + col),
        stride_(b.row_stride),
        width_(width),
        ahead_(ahead),
        copies_(copies) {
    for (int k = 0; k < Step::n_read; ++k) buffers_[k] = static_cast<Element*>(b.buffers[k]) + row * b.row_stride + col;
  }

  int64_t width() const { return whole ? width_ : unit_cols<Type>; }

  // Row r of each: p and g before its step; after it p_new as stored, p as it was, u and v.
  const Scalar* p(int r) const { return values(p_, copies_.p, r); }
  const Scalar* g(int r) const { return values(g_, copies_.g, r); }
  const Scalar* p_new(int r) const { return values(p_, Step::updates ? copies_.p_new : copies_.p, r); }
  const Scalar* p_kept(int r) const { return copies_.p + place(r, 0); }
  const Scalar* v(int r) const { return values(buffers_[0], copies_.v, r); }
  const Scalar* u(int r) const { return u_is_v ? v(r) : copies_.u + place(r, 0); }

  CopiedRows<Type, Step> copied() const { return {copies_, cols}; }

  void copy(int r) {
    if constexpr (as_stored) return;
    for (int64_t col = 0; col < width(); col += n_lanes<Type>) {
      store_vector(copies_.p + place(r, col), load(p_, r, col));
      store_vector(copies_.g + place(r, col), load(g_, r, col));
    }
  }

  // Steps a vector of row r.
  template <bool measured>
  inline __attribute__((always_inline)) void step(int r, int64_t col, const Coefficients<Step, Scalar>& c) {
    if constexpr (Step::updates) {
      constexpr bool copied = measured && !as_stored;
      Vec p = copied ? load_vector<Vec>(copies_.p + place(r, col)) : load(p_, r, col);
      const Vec g = copied ? load_vector<Vec>(copies_.g + place(r, col)) : load(g_, r, col);
      Vec buffers[most_buffers] = {}, u;
      for (int k = 0; k < Step::n_read; ++k) buffers[k] = load(buffers_[k], r, col);
      if constexpr (measured && as_stored && keeps_p) store_vector(copies_.p + place(r, col), p);
      Step::update(p, g, buffers, u, c);
      Vec stored, unused;
      store(p_, r, col, Type::narrow(p, stored));
      for (int k = 0; k < Step::n_written; ++k) store(buffers_[k], r, col, Type::narrow(buffers[k], unused));
      if constexpr (copied) keep(copies_.p_new, r, col, stored);
      if constexpr (copied && keeps_v) keep(copies_.v, r, col, buffers[0]);
      if constexpr (measured && !u_is_v) keep(copies_.u, r, col, u);
    }
  }

  // Prefetch what follows. Always inlined, because a compiler may drop a call that only prefetches.
  inline __attribute__((always_inline)) void prefetch_p(int r, int64_t col) const {
    __builtin_prefetch(p_ + ahead_of(r, col));
  }
  inline __attribute__((always_inline)) void prefetch_g(int r, int64_t col) const {
    if constexpr (Step::updates) __builtin_prefetch(g_ + ahead_of(r, col));
  }
  inline __attribute__((always_inline)) void prefetch_buffers(int r, int64_t col) const {
    for (int k = 0; k < Step::n_read; ++k) __builtin_prefetch(buffers_[k] + ahead_of(r, col));
  }

 private:
  static int64_t place(int r, int64_t col) { return r * cols + col; }

  const Scalar* values(const Element* tensor, const Scalar* copy, int r) const {
    return as_stored ? reinterpret_cast<const Scalar*>(tensor + r * stride_) : copy + place(r, 0);
  }

  // Copies a step's result; past the width are zeros, for the step of zeros may be NaN.
  void keep(Scalar* copy, int r, int64_t col, const Vec& x) const {
    if constexpr (whole) {
      store_vector(copy + place(r, col), x);
    } else {
      store_vector(copy + place(r, col), keep_first(x, n_left(col)));
    }
  }

  int64_t ahead_of(int r, int64_t col) const { return ahead_ + r * stride_ + col; }

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

  // How many elements of the vector at col are in range.
  int64_t n_left(int64_t col) const {
    const int64_t left = width_ - col;
    return left < 0 ? 0 : left < n_lanes<Type> ? left : n_lanes<Type>;
  }

  Element* p_;
  const Element* g_;
  Element* buffers_[most_buffers] = {};  // those that the step reads
  int64_t stride_, width_, ahead_;
  Copies<Type>& copies_;
};

}  // namespace
}  // namespace noetherperf
