// The tables of one instruction set: each rule's kernels, and the pass that only measures, which serves every rule.
// Compiled once per instruction set, as kernel_cpu.cpp.

#include <utility>

#include "block.h"

// After the functions of vectors that an update calls.
#include "rules/all.h"

namespace noetherperf {

extern const AdvanceKernels NPERF_TABLE(advance, NPERF_ISA);

#define NPERF_OF(rule, Type) NPERF_KERNELS(NPERF_ISA, rule, Type)
#define NPERF_DECLARE(rule)                                                                               \
  extern const VariantKernels NPERF_OF(rule, Float32), NPERF_OF(rule, Float64), NPERF_OF(rule, BFloat16), \
      NPERF_OF(rule, Float16);
NPERF_EACH_RULE(NPERF_DECLARE)

namespace {

// Whether two rules' passes that only measure sum the same.
template <class A, class B>
constexpr bool measure_alike() {
  bool alike = A::n_common == B::n_common && A::Measure::n_read == B::Measure::n_read;
  for (int m = 0; alike && m < A::n_common; ++m)
    alike = A::moments[m].a == B::moments[m].a && A::moments[m].b == B::moments[m].b;
  return alike;
}
#define NPERF_ALIKE(rule) static_assert(measure_alike<rule::Rule, sgd::Rule>(), "one pass measures for every rule");
NPERF_EACH_RULE(NPERF_ALIKE)
using Measure = sgd::Measure;

template <class Type>
constexpr BlockKernels measuring = kernels_of<Type, Measure, false>();

template <class Step>
constexpr StepKernels step_of(const BlockKernels* f32, const BlockKernels* f64, const BlockKernels* bf16,
                              const BlockKernels* f16) {
  StepKernels made{Step::updates, Step::n_read, Step::n_written, Step::n_taken, {}};
  made.kernels[float32] = f32;
  made.kernels[float64] = f64;
  made.kernels[bfloat16] = bf16;
  made.kernels[float16] = f16;
  return made;
}

template <class Rule, int... variant>
constexpr Kernels kernels_of_rule(const VariantKernels& f32, const VariantKernels& f64, const VariantKernels& bf16,
                                  const VariantKernels& f16, std::integer_sequence<int, variant...>) {
#define NPERF_STRING_(x) #x
#define NPERF_STRING(x) NPERF_STRING_(x)
  return {
      NPERF_STRING(NPERF_ISA),
      Rule::name,
      is_native,
      Rule::n_coefficients,
      Rule::n_buffers,
      Rule::n_variants,
      Rule::n_kept,
      Rule::n_moments,
      Rule::moments,
      [](int of_group, bool has_buffer, bool has_views) { return Rule::variant_of(of_group, has_buffer, has_views); },
      {step_of<typename Rule::template Step<variant>>(&f32.of[variant], &f64.of[variant], &bf16.of[variant],
                                                      &f16.of[variant])...},
      step_of<Measure>(&measuring<Float32>, &measuring<Float64>, &measuring<BFloat16>, &measuring<Float16>),
      &NPERF_TABLE(advance, NPERF_ISA)};
}

#define NPERF_RULE_TABLE(rule)                                                                            \
  kernels_of_rule<rule::Rule>(NPERF_OF(rule, Float32), NPERF_OF(rule, Float64), NPERF_OF(rule, BFloat16), \
                              NPERF_OF(rule, Float16), std::make_integer_sequence<int, rule::Rule::n_variants>{}),

}  // namespace

extern const Kernels NPERF_TABLE(kernels, NPERF_ISA)[n_rules];
constexpr Kernels NPERF_TABLE(kernels, NPERF_ISA)[n_rules] = {NPERF_EACH_RULE(NPERF_RULE_TABLE)};

}  // namespace noetherperf
