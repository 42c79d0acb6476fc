#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fourfold {
namespace {

constexpr Tier kAll[] = {Tier::baseline, Tier::avx2, Tier::avx512, Tier::avx512_bf16, Tier::amx, Tier::neon};

#if defined(__x86_64__)
// Linux hands out the tile registers only to a process that has asked for them.
bool kernel_grants_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Tier detect() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool leaf1 = __get_cpuid(1, &a, &b, &c, &d);
  const bool f16c = leaf1 && (c & (1u << 29));
  if (!v3 || !f16c) return Tier::baseline;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (!v4) return Tier::avx2;
  const bool bf16 = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") &&
                    __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
  if (!bf16) return Tier::avx512;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22)) && (d & (1u << 24));
  return tiles && kernel_grants_amx() ? Tier::amx : Tier::avx512_bf16;
}
#elif defined(__aarch64__)
Tier detect() { return Tier::neon; }
#else
Tier detect() { return Tier::baseline; }
#endif

Tier lowered() {
  const Tier machine = machine_tier();
  const char* wanted = std::getenv("FOURFOLD_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return machine;
  for (Tier tier : kAll) {
    if (std::strcmp(wanted, name_of(tier)) != 0) continue;
    return tier < machine && machine != Tier::neon ? tier : machine;  // AArch64 has one tier
  }
  std::string text = "FOURFOLD_CPU_CAPABILITY must be one of";
  for (Tier tier : kAll) text += std::string(tier == Tier::baseline ? " " : ", ") + name_of(tier);
  throw std::invalid_argument(text + "; got '" + wanted + "'");
}

}  // namespace

const char* name_of(Tier tier) {
  switch (tier) {
    case Tier::avx2:
      return "avx2";
    case Tier::avx512:
      return "avx512";
    case Tier::avx512_bf16:
      return "avx512_bf16";
    case Tier::amx:
      return "amx";
    case Tier::neon:
      return "neon";
    case Tier::baseline:
      break;
  }
  return "baseline";
}

Tier machine_tier() {
  static const Tier tier = detect();
  return tier;
}

Tier cpu_tier() {
  static const Tier tier = lowered();
  return tier;
}

}  // namespace fourfold
