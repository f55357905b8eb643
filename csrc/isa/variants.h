// What was compiled in. CMake defines RHEO_X86 or RHEO_ARM64 by the target processor.
#pragma once

#include "../block_attention.h"

namespace rheo {

extern const Variant kScalar;
#if defined(RHEO_X86)
extern const Variant kAvx2;
extern const Variant kAvx512;
extern const Variant kAvx512Bf16;
extern const Variant kAmx;
#elif defined(RHEO_ARM64)
extern const Variant kNeon;
extern const Variant kNeonBf16;
#endif

}  // namespace rheo
