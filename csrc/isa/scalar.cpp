// Plain C++: the variant every machine has, and what the others are compared with.
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
  static Reg load(const BFloat* p) { return widen(*p); }
  static Reg load(const Half* p) { return widen(*p); }
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
