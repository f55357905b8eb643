// A trial of a kernel variant, meant for a process that may die of it.
#pragma once

#include "block_attention.h"

namespace rheo {

// Runs every kernel of a variant on small inputs against the scalar one. Throws std::runtime_error where they differ;
// on a machine that announces an instruction it does not have, the process gets SIGILL.
void self_test(const Variant& variant);

}  // namespace rheo
