// Plain C++: the variant every machine has, and what the others are compared with.
#include <cstring>

#include "attend_run.h"
#include "variants.h"

namespace rheo {
namespace {

struct Scalar {
  using Reg = float;
  static constexpr int kWidth = 1;
  static constexpr int kHeads = 4;

  static Reg zero() { return 0.0f; }
  static Reg set1(float x) { return x; }
  static Reg load(const float* p) { return *p; }
  static Reg load(const BFloat* p) {
    const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  static Reg load(const Half* p) {
    // Put the 15 magnitude bits where a float's are and multiply by 2^112, which also
    // turns half denormals into normal floats; all-ones exponents (inf, NaN) are fixed up.
    const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
    uint32_t wide = static_cast<uint32_t>(p->bits & 0x7fffu) << 13;
    if ((p->bits & 0x7c00u) == 0x7c00u) {
      wide |= 0x7f800000u;
    } else {
      float x;
      std::memcpy(&x, &wide, sizeof x);
      x *= 0x1p112f;
      std::memcpy(&wide, &x, sizeof x);
    }
    wide |= sign;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  static void store(float* p, Reg x) { *p = x; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg exp(Reg x) { return std::exp(x); }
  static float sum(Reg x) { return x; }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) {
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
  }
};

}  // namespace

const Variant kScalar = make_variant<Scalar>("scalar");

}  // namespace rheo
