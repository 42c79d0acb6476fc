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

}  // namespace fourfold
