// AVX512F: 16 floats a register, 32 registers. Shared by the variants that add to it; each includes
// it under its own flags.
#pragma once

#include <immintrin.h>

#include "fma.h"

namespace rheo {
namespace {

typedef double Double __attribute__((may_alias));

struct Avx512 {
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kTokens = 16;
  static constexpr int kHeads = 8;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Reg load(const BFloat* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg max(Reg x, Reg otherwise) { return _mm512_max_ps(x, otherwise); }
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale2(Reg y, Reg n, Reg x) {
    const __mmask16 keep = _mm512_cmp_ps_mask(x, set1(kExpLowest), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(keep, y, n);
  }
  template <int F>
  static Reg spread(const float* p) {
    if constexpr (F == 1) return _mm512_set1_ps(*p);
    else if constexpr (F == 2) return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const Double*>(p)));
    else if constexpr (F == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    else if constexpr (F == 8) return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(p))));
    else return _mm512_loadu_ps(p);
  }
  static Reg fold(Reg a, Reg b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
  }
};

}  // namespace
}  // namespace rheo
