#include "cpu_features.h"

#include <stdexcept>

#include "isa/variants.h"

namespace rheo {

std::vector<const Variant*> runnable_variants() {
  std::vector<const Variant*> found;
#if defined(RHEO_X86)
  // __builtin_cpu_supports also asks XGETBV whether the system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f")) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
#elif defined(RHEO_ARM64)
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
