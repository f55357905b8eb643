// Where memory lies on a machine of several NUMA nodes.
#pragma once

#include <cstddef>

namespace rheo {

// Asks that the pages of [data, data + bytes), which start at a page boundary and are not touched yet, be spread in
// turn over all nodes that this process may use. Returns how many there are; 1 where there is
// nothing to spread, or the system does not allow it (containers often do not).
int interleave(void* data, size_t bytes);

}  // namespace rheo
