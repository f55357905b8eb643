// AVX512F.
#include "avx512.h"
#include "variants.h"

namespace rheo {

const Variant kAvx512 = make_variant<Avx512>("avx512");

}  // namespace rheo
