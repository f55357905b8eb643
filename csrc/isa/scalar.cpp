// Plain C++: the variant every machine has, and what the others are compared with. A "register" is
// four floats, which a compiler may turn into whatever vectors the target always has.
#include "fma.h"
#include "variants.h"

namespace rheo {
namespace {

struct Plain {
  struct Reg { float x[4]; };
  static constexpr int kWidth = 4;
  static constexpr int kTokens = 8;
  static constexpr int kHeads = 4;

  template <class F>
  static Reg each(F&& f) {
    Reg r;
    for (int i = 0; i < 4; ++i) r.x[i] = f(i);
    return r;
  }
  static Reg zero() { return set1(0.0f); }
  static Reg set1(float x) { return each([&](int) { return x; }); }
  template <class T>
  static Reg load(const T* p) { return each([&](int i) { return widen(p[i]); }); }
  static void store(float* p, Reg a) { for (int i = 0; i < 4; ++i) p[i] = a.x[i]; }
  static Reg fma(Reg a, Reg b, Reg c) { return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
  static Reg mul(Reg a, Reg b) { return each([&](int i) { return a.x[i] * b.x[i]; }); }
  static Reg add(Reg a, Reg b) { return each([&](int i) { return a.x[i] + b.x[i]; }); }
  static Reg max(Reg a, Reg otherwise) {
    return each([&](int i) { return a.x[i] > otherwise.x[i] ? a.x[i] : otherwise.x[i]; });
  }
  template <int F>
  static Reg spread(const float* p) { return each([&](int i) { return p[i % F]; }); }
  static Reg fold(Reg a, Reg b) { return each([&](int i) { const Reg& from = i < 2 ? a : b; return from.x[i % 2 * 2] + from.x[i % 2 * 2 + 1]; }); }
  static Reg round(Reg a) { return each([&](int i) { return nearbyintf(a.x[i]); }); }
  static Reg scale2(Reg y, Reg n, Reg x) {
    // 2^n through the exponent's bits; n is in [-126, 0] where the result is kept, and NaN is passed on.
    return each([&](int i) {
      if (x.x[i] < kExpLowest) return 0.0f;
      if (x.x[i] != x.x[i]) return x.x[i];
      return y.x[i] * from_bits(static_cast<uint32_t>(static_cast<int>(n.x[i]) + 127) << 23);
    });
  }
};

}  // namespace

const Variant kScalar = make_variant<Plain>("scalar");

}  // namespace rheo
