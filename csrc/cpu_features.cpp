#include "cpu_features.h"

#include <stdexcept>

#if defined(RHEO_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(RHEO_ARM64)
#include <sys/auxv.h>
#endif

#include "isa/variants.h"

namespace rheo {

#if defined(RHEO_X86)
namespace {

struct Leaf { unsigned eax = 0, ebx = 0, ecx = 0, edx = 0; };

Leaf cpuid(unsigned leaf, unsigned sub) {
  Leaf out;
  __get_cpuid_count(leaf, sub, &out.eax, &out.ebx, &out.ecx, &out.edx);  // all zero where the leaf is absent
  return out;
}

// The AMX tiles are state that Linux saves only for processes that ask (arch_prctl(2), kernel 5.16).
bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

}  // namespace
#endif

std::vector<const Variant*> runnable_variants() {
  std::vector<const Variant*> found;
#if defined(RHEO_X86)
  // __builtin_cpu_supports also asks XGETBV whether the system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    (cpuid(7, 1).eax >> 5 & 1u);
  const unsigned seven = cpuid(7, 0).edx;
  if (bf16 && (seven >> 22 & 1u) && (seven >> 24 & 1u) && amx_permitted()) found.push_back(&kAmx);
  if (bf16) found.push_back(&kAvx512Bf16);
  if (avx512) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
#elif defined(RHEO_ARM64)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  if (getauxval(AT_HWCAP2) & kBf16) found.push_back(&kNeonBf16);
  found.push_back(&kNeon);
#endif
  found.push_back(&kScalar);
  return found;
}

const Variant& choose_variant(const std::string& name) {
  std::string choices;
  for (const Variant* variant : runnable_variants()) {
    if (name.empty() || name == variant->name) return *variant;
    choices += choices.empty() ? variant->name : std::string(", ") + variant->name;
  }
  throw std::invalid_argument("CPU variant '" + name + "' cannot run here; choices: " + choices);
}

}  // namespace rheo
