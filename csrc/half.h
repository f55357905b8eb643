// 16-bit floats. In an anonymous namespace, because files built with different flags include it.
#pragma once

#include <cstdint>
#include <cstring>

namespace rheo {
namespace {

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }

inline float widen(BFloat x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

// Puts the 15 magnitude bits where a float's are and multiplies by 2^112, which also turns half
// denormals into normal floats; all-ones exponents (inf, NaN) are fixed up.
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  uint32_t wide = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if ((x.bits & 0x7c00u) == 0x7c00u) {
    wide |= 0x7f800000u;
  } else {
    const float scaled = from_bits(wide) * 0x1p112f;
    std::memcpy(&wide, &scaled, sizeof wide);
  }
  return from_bits(wide | sign);
}

}  // namespace
}  // namespace rheo
