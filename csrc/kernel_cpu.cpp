// The kernels of one rule for one dtype. Compiled once per instruction set (NPERF_ISA = baseline, avx2, avx512, of
// NPERF_WIDTH = 2, 4, 8), update rule (NPERF_RULE, of NPERF_RULE_FILE) and dtype (NPERF_TYPE, of types_cpu.h), side by
// side. Only the exported table has external linkage.

#include <utility>

#include "block.h"

// After the functions of vectors that an update calls.
#include NPERF_RULE_FILE

namespace noetherperf {
namespace {

using NPERF_RULE::Rule;

template <int... variant>
constexpr VariantKernels every(std::integer_sequence<int, variant...>) {
  static_assert(Rule::n_variants <= most_variants && Rule::n_buffers <= most_buffers, "tables have room for these");
  return {{kernels_of<NPERF_TYPE, Rule::Step<variant>, (variant < Rule::n_hot)>()...}};
}

}  // namespace

extern const VariantKernels NPERF_KERNELS(NPERF_ISA, NPERF_RULE, NPERF_TYPE);
constexpr VariantKernels NPERF_KERNELS(NPERF_ISA, NPERF_RULE,
                                       NPERF_TYPE) = every(std::make_integer_sequence<int, Rule::n_variants>{});

}  // namespace noetherperf
