// The instruction-set tiers. Each kernels.cpp is compiled once per tier that gains from it; the best that this machine runs is
// chosen once, or a lower one named by the environment variable FOURFOLD_CPU_CAPABILITY.
#pragma once

namespace fourfold {

enum class Tier { baseline, avx2, avx512, avx512_bf16, amx, neon };
constexpr int kTiers = 6;

const char* name_of(Tier tier);

// The best tier this machine can run.
Tier machine_tier();

// machine_tier(), lowered by FOURFOLD_CPU_CAPABILITY; throws std::invalid_argument when that names no tier.
Tier cpu_tier();

// The table of the highest tier not above cpu_tier() that has one; tables: by tier, null where nothing was compiled for it.
template <typename Table>
const Table& best_table(const Table* const (&tables)[kTiers]) {
  int tier = static_cast<int>(cpu_tier());
  while (tables[tier] == nullptr) --tier;
  return *tables[tier];
}

// FOURFOLD_DECLARE_KERNELS(family), in namespace fourfold: the tables family_kernels, of type family::Kernels, of the tiers
// that this build has (see CMakeLists.txt). FOURFOLD_BEST_KERNELS(family): the one to use.
#define FOURFOLD_DECLARE_TIER(tier, family)      \
  namespace tier {                               \
  extern const family::Kernels family##_kernels; \
  }
#if defined(__x86_64__)
#define FOURFOLD_DECLARE_KERNELS(family)  \
  FOURFOLD_DECLARE_TIER(baseline, family) \
  FOURFOLD_DECLARE_TIER(avx2, family)     \
  FOURFOLD_DECLARE_TIER(avx512, family)   \
  FOURFOLD_DECLARE_TIER(avx512_bf16, family)
#define FOURFOLD_BEST_KERNELS(family) \
  best_table<family::Kernels>(        \
      {&baseline::family##_kernels, &avx2::family##_kernels, &avx512::family##_kernels, &avx512_bf16::family##_kernels})
#elif defined(__aarch64__)
#define FOURFOLD_DECLARE_KERNELS(family) FOURFOLD_DECLARE_TIER(neon, family)
#define FOURFOLD_BEST_KERNELS(family) neon::family##_kernels
#else
#define FOURFOLD_DECLARE_KERNELS(family) FOURFOLD_DECLARE_TIER(baseline, family)
#define FOURFOLD_BEST_KERNELS(family) baseline::family##_kernels
#endif

}  // namespace fourfold
