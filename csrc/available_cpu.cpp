// The kernels of this build that this machine can run.

#include "kernel_cpu.h"
#include "rules/all.h"

namespace noetherperf {

// Constants: not even an initialization executes code of an instruction set that the machine may lack.
#define NPERF_DECLARE(rule) extern const Kernels kernels_baseline_##rule, kernels_avx2_##rule, kernels_avx512_##rule;
NPERF_EACH_RULE(NPERF_DECLARE)

namespace {

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
  [[maybe_unused]] const auto offer = [&](const Kernels& built, bool runs_here) {
    if (runs_here || !built.is_native) found.push_back(&built);
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto has = [](bool supported) { return supported; };
  [[maybe_unused]] const bool avx2 = has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma")) &&
                                     has(__builtin_cpu_supports("bmi2")) && has(__builtin_cpu_supports("f16c"));
  [[maybe_unused]] const bool avx512 =
      avx2 && has(__builtin_cpu_supports("avx512f")) && has(__builtin_cpu_supports("avx512bw")) &&
      has(__builtin_cpu_supports("avx512dq")) && has(__builtin_cpu_supports("avx512vl"));
#else
  [[maybe_unused]] constexpr bool avx2 = false, avx512 = false;
#endif
#if defined(NPERF_HAS_AVX512)
#define NPERF_OFFER_AVX512(rule) offer(kernels_avx512_##rule, avx512);
  NPERF_EACH_RULE(NPERF_OFFER_AVX512)
#endif
#if defined(NPERF_HAS_AVX2)
#define NPERF_OFFER_AVX2(rule) offer(kernels_avx2_##rule, avx2);
  NPERF_EACH_RULE(NPERF_OFFER_AVX2)
#endif
#if defined(NPERF_HAS_BASELINE)
#define NPERF_OFFER(rule) offer(kernels_baseline_##rule, true);
  NPERF_EACH_RULE(NPERF_OFFER)
#endif
  return found;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> found = find();
  return found;
}

}  // namespace noetherperf
