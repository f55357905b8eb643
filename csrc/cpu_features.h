// Which kernel variants this build holds and this processor and system can run.
#pragma once

#include <string>
#include <vector>

#include "block_attention.h"

namespace rheo {

// Best first; always ends with "scalar".
std::vector<const Variant*> runnable_variants();

// The named variant, or the best for an empty name. Throws std::invalid_argument, naming
// the legal choices, for one that this build or this processor lacks.
const Variant& choose_variant(const std::string& name);

}  // namespace rheo
