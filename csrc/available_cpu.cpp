// The kernels of this build that this machine can run.

#include "kernel_cpu.h"
#include "rules/all.h"

namespace noetherperf {

// Constants: not even an initialization executes code of an instruction set that the machine may lack.
extern const Kernels kernels_baseline[n_rules], kernels_avx2[n_rules], kernels_avx512[n_rules];

namespace {

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
  [[maybe_unused]] const auto offer = [&](const Kernels(&built)[n_rules], bool runs_here) {
    for (const Kernels& kernels : built)
      if (runs_here || !kernels.is_native) found.push_back(&kernels);
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
  offer(kernels_avx512, avx512);
#endif
#if defined(NPERF_HAS_AVX2)
  offer(kernels_avx2, avx2);
#endif
#if defined(NPERF_HAS_BASELINE)
  offer(kernels_baseline, true);
#endif
  return found;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> found = find();
  return found;
}

}  // namespace noetherperf
