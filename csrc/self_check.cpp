// Compares every kernel of an instruction set with plain loops, on small blocks whose arithmetic is exact.
//
// Parameters, gradients and buffers are small integers, coefficients are powers of two, and roots and quotients are of
// numbers that have exact ones. So all results of a step and its moments are exact in each dtype, and == compares them,
// whatever order or contraction a kernel uses. The gaps between rows and after the last row are NaN: an out-of-range
// read makes sums NaN, an out-of-range write replaces a NaN.

#include "self_check.h"

#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "rules/all.h"

namespace noetherperf {
namespace {

struct Shape {
  int64_t rows, width, gap;  // gap: elements between rows; −1: as many as make rows a page apart
};
// Rows within one page; an odd number of rows, more than a bank of sums; several strips; rows a page apart; rows so
// wide that their sums do not stay in the L1.
constexpr Shape shapes[] = {{5, 7, 0}, {11, 19, 5}, {3, 150, 0}, {2, 40, -1}, {4, 776, 1}};
constexpr int64_t behind = 64;  // NaN after the last row

// Small integers, the same ones each time.
class Numbers {
 public:
  double operator()() {  // −4 … 4
    state_ = state_ * 1664525u + 1013904223u;
    return double((state_ >> 16) % 9) - 4.0;
  }

 private:
  uint32_t state_ = 1;
};

// A rule's steps with exact results: for each variant a name and a row's coefficients, and buffers for p and g.
template <class Rule>
struct Exact;

template <>
struct Exact<sgd::Rule> {
  static constexpr const char* names[] = {"plain", "momentum", "nesterov", "idle"};
  static constexpr double rows[][7] = {{0.5, 0.25, 1.0, 1.0, 0.0, 1.0, 0.0},  // η, λ, s, b, a, c_d, c_v
                                       {0.5, 0.25, 1.0, 0.5, 0.5, 0.0, 1.0},
                                       {0.5, 0.25, -1.0, 0.5, 0.5, 1.0, 0.5},
                                       {0.5, 0.25, 1.0, 1.0, 0.0, 1.0, 0.0}};
  static void fill(double* buffers, Numbers& number, const double*, double, double) { buffers[0] = number(); }
};

template <>
struct Exact<adam::Rule> {
  static constexpr const char* names[] = {"plain", "amsgrad"};
  // η, r, λ, s, β₁, β₂, ε, c, √e, amsgrad
  static constexpr double rows[][10] = {{0.5, 0.5, 0.0, -1.0, 0.5, 0.5, 4.0, 0.5, 1.0, 0.0},
                                        {1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 1.0}};
  // n' = (n + d²)/2 is 16, so that D = 8; or 64, so that D = 16, or 32 where the largest n so far is 256.
  static void fill(double* buffers, Numbers& number, const double* row, double p, double g) {
    const bool amsgrad = row[9] != 0.0;
    const double d = row[3] * g + row[2] * p;
    buffers[0] = number();
    buffers[1] = (amsgrad ? 128.0 : 32.0) - d * d;
    buffers[2] = number() < 0.0 ? 256.0 : 16.0;
  }
};

template <>
struct Exact<given::Rule> {
  static constexpr const char* names[] = {"given"};
  static constexpr double rows[][2] = {{2.0, 0.5}};  // 1/η, λ
  static void fill(double* buffers, Numbers& number, const double*, double, double) { buffers[0] = number(); }
};

const char* const dtype_names[n_dtypes] = {"float32", "float64", "bfloat16", "float16"};

// One tensor's block before and after a step, in float64, and its moments by row and by column.
struct Expected {
  using Values = std::vector<double>;
  Shape shape;
  Values p, g, buffers[most_buffers], p_after, buffers_after[most_buffers], rows, columns;
};

template <class Step>
Expected expected(const Shape& shape, const double* row) {
  using Rule = typename Step::Rule;
  const int64_t n = shape.rows * shape.width;
  const int n_acc = Step::n_taken;
  Expected e{shape, {}, {}, {}, {}, {}, {}, {}};
  e.rows.assign(n_acc * shape.rows, 0.0);
  e.columns.assign(n_acc * shape.width, 0.0);
  Numbers number;
  for (int64_t i = 0; i < n; ++i) {
    const double p = number(), g = number();
    double buffers[most_buffers] = {}, p_after = p, u = 0.0, moments[Rule::n_moments] = {};
    Exact<Rule>::fill(buffers, number, row, p, g);
    e.p.push_back(p);
    e.g.push_back(g);
    for (int k = 0; k < Rule::n_buffers; ++k) e.buffers[k].push_back(buffers[k]);
    if constexpr (Step::updates) Step::update(p_after, g, buffers, u, Rule::template Coefficients<double>::of(row));
    e.p_after.push_back(p_after);
    for (int k = 0; k < Rule::n_buffers; ++k) e.buffers_after[k].push_back(buffers[k]);
    accumulate<Step>(moments, Operands<double>{p, p_after, Step::updates ? g : buffers[0], u, buffers[0]});
    for (int m = 0; m < n_acc; ++m) {
      e.rows[m * shape.rows + i / shape.width] += moments[m];
      e.columns[m * shape.width + i % shape.width] += moments[m];
    }
  }
  return e;
}

// Writes a number in a dtype; all numbers of this file are exact in each dtype.
struct Stored {
  int dtype;

  int64_t size() const { return dtype == float64 ? 8 : dtype == float32 ? 4 : 2; }

  void write(char* to, double x) const {
    const float single = float(x);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    uint16_t half = uint16_t(bits >> 16);
    if (dtype == float16)  // a normal number, zero or NaN
      half = uint16_t((bits >> 16 & 0x8000u) | (x != x     ? 0x7e00u
                                                : x == 0.0 ? 0u
                                                           : ((bits >> 13 & 0x3ffffu) - (112u << 10))));
    if (dtype == float64) std::memcpy(to, &x, 8);
    if (dtype == float32) std::memcpy(to, &single, 4);
    if (dtype == bfloat16 || dtype == float16) std::memcpy(to, &half, 2);
  }
};

// A matrix with its own memory; gaps are NaN.
class Matrix {
 public:
  Matrix(const Stored& stored, const Shape& shape, const std::vector<double>& values)
      : stride_(shape.gap < 0 ? 4096 / stored.size() : shape.width + shape.gap),
        bytes_((shape.rows * stride_ + behind) * stored.size()) {
    const int64_t size = stored.size();
    for (int64_t i = 0; i < shape.rows * stride_ + behind; ++i) {
      const int64_t r = i / stride_, c = i % stride_;
      const bool inside = r < shape.rows && c < shape.width;
      stored.write(&bytes_[i * size], inside ? values[r * shape.width + c] : std::numeric_limits<double>::quiet_NaN());
    }
  }

  int64_t stride() const { return stride_; }
  void* data() { return bytes_.data(); }
  bool operator==(const Matrix& other) const { return bytes_ == other.bytes_; }

 private:
  int64_t stride_;
  std::vector<char> bytes_;
};

// A step's inputs and its expected results, stored in one dtype.
struct Matrices {
  Matrix p, g, p_after;
  std::vector<Matrix> buffers, buffers_after;

  Matrices(const Stored& stored, const Expected& e, int n_buffers)
      : p(stored, e.shape, e.p), g(stored, e.shape, e.g), p_after(stored, e.shape, e.p_after) {
    for (int k = 0; k < n_buffers; ++k) {
      buffers.emplace_back(stored, e.shape, e.buffers[k]);
      buffers_after.emplace_back(stored, e.shape, e.buffers_after[k]);
    }
  }
};

// Describes the fault of a kernel's step of one block; empty if there is none.
std::string fault(BlockKernel kernel, const Expected& e, const Matrices& given, int n_acc, const double* row,
                  bool by_row, bool by_col) {
  Matrix p = given.p, g = given.g;
  std::vector<Matrix> buffers = given.buffers;
  const Shape& shape = e.shape;
  std::vector<double> rows(n_acc * shape.rows, 1.0);
  Line nothing;
  for (double& x : nothing.at) x = NAN;
  std::vector<Line> lines(n_lines(shape.width, n_acc), nothing);
  std::vector<Line> block_lines(n_block_lines(shape.width, n_acc), nothing);

  Block block{};
  block.p = p.data();
  block.g = g.data();
  for (size_t k = 0; k < buffers.size(); ++k) block.buffers[k] = buffers[k].data();
  block.row_stride = p.stride();
  block.rows = shape.rows;
  block.width = shape.width;
  block.row = row;
  block.unscale = 1.0;
  block.row_sums = rows.data();
  block.row_sums_stride = shape.rows;
  block.col_sums = lines.data();
  block.block_lines = block_lines.data();
  block.fresh = true;
  kernel(block);

  if (!(p == given.p_after)) return "parameters";
  if (!(buffers == given.buffers_after)) return "buffers";
  if (!(g == given.g)) return "gradients";
  for (int m = 0; by_row && m < n_acc; ++m)
    for (int64_t r = 0; r < shape.rows; ++r)
      if (!(rows[m * shape.rows + r] == 1.0 + e.rows[m * shape.rows + r])) return "sums by row";
  for (int m = 0; by_col && m < n_acc; ++m)
    for (int64_t c = 0; c < shape.width; ++c)
      if (!(lines[c / 8 * n_acc + m].at[c % 8] == e.columns[m * shape.width + c])) return "sums by column";
  return "";
}

// Checks the kernels `made` of one variant of a rule's step, or of the pass that only measures.
template <class Step>
std::string check_step(const StepKernels& made, const double* row, const char* name) {
  using Rule = typename Step::Rule;
  for (const Shape& shape : shapes) {
    const Expected e = expected<Step>(shape, row);
    for (int dtype = 0; dtype < n_dtypes; ++dtype) {
      const Matrices given(Stored{dtype}, e, Rule::n_buffers);
      for (const bool by_row : {false, true})
        for (const bool by_col : {false, true}) {
          if (!Step::updates && !by_row && !by_col) continue;  // does nothing
          const BlockKernel kernel = made.of(dtype, by_row, by_col);
          const std::string wrong = fault(kernel, e, given, Step::n_taken, row, by_row, by_col);
          if (!wrong.empty())
            return std::string(Rule::name) + ", " + dtype_names[dtype] + ", " + name + ", a block of " +
                   std::to_string(shape.rows) + " x " + std::to_string(shape.width) + ": wrong " + wrong;
        }
    }
  }
  return "";
}

template <class Rule, int... variant>
std::string check_variants(const Kernels& kernels, bool mix_up, std::integer_sequence<int, variant...>) {
  std::string wrong;
  ((wrong = !wrong.empty() ? wrong
                           : check_step<typename Rule::template Step<variant>>(
                                 kernels.steps[(variant + mix_up) % Rule::n_variants], Exact<Rule>::rows[variant],
                                 Exact<Rule>::names[variant])),
   ...);
  return wrong;
}

template <class Rule>
std::string check_rule(const Kernels& kernels, bool mix_up) {
  static_assert(std::size(Exact<Rule>::rows) == Rule::n_variants && std::size(Exact<Rule>::names) == Rule::n_variants &&
                    std::size(Exact<Rule>::rows[0]) == Rule::n_coefficients,
                "a case for each variant");
  std::string wrong = check_variants<Rule>(kernels, mix_up, std::make_integer_sequence<int, Rule::n_variants>{});
  if (wrong.empty()) wrong = check_step<typename Rule::Measure>(kernels.measure, Exact<Rule>::rows[0], "measure");
  return wrong;
}

// Checks components of every size, with and without compensation, and with up to two moments more than have unrolled
// code. Their arithmetic is exact too.
std::string check_components(const AdvanceKernels& kernels) {
  constexpr int64_t n = 21, stride = 23;
  constexpr int most = 6;
  const int32_t driving[most] = {5, 0, 3, 1, 4, 2};
  double numbers[3 * (2 + most)];
  for (int i = 0; i < 3 * (2 + most); ++i) numbers[i] = double(i * 5 % 9 - 4) / 8.0;
  double moments[most * stride];
  for (int64_t i = 0; i < most * stride; ++i) moments[i] = double(i * 5 % 13) - 6.0;
  for (int size = 1; size <= 2; ++size)
    for (const bool compensated : {false, true})
      for (int n_moments = 0; n_moments <= most; ++n_moments) {
        const Component component{0, 0, size, compensated, n_moments, 0, 0, 0};
        double state[3 * stride], other[3 * stride];
        for (int64_t i = 0; i < 3 * stride; ++i) state[i] = other[i] = double(i * 7 % 11) - 5.0;
        const Recursion recursion = recursion_of(component, driving, numbers);
        kernels(recursion)(recursion, state, stride, moments, stride, 0, n);
        for (int64_t i = 0; i < n; ++i)
          advance(component, numbers, other + i, stride, [&](int k) { return moments[driving[k] * stride + i]; });
        for (int64_t i = 0; i < 3 * stride; ++i)
          if (!(state[i] == other[i])) return "wrong laws";
      }
  return "";
}

}  // namespace

std::string self_check(const Kernels& kernels, bool mix_up) {
  std::string wrong;
#define NPERF_CHECK(name) \
  if (std::string(kernels.rule) == #name) wrong = check_rule<name::Rule>(kernels, mix_up);
  NPERF_EACH_RULE(NPERF_CHECK)
  if (wrong.empty()) wrong = check_components(*kernels.advance);
  return wrong;
}

}  // namespace noetherperf
