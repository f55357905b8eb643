// NEON (aarch64).
#include "neon.h"
#include "variants.h"

namespace rheo {

const Variant kNeon = make_variant<Neon>("neon");

}  // namespace rheo
