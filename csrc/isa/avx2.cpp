// AVX2 + FMA + F16C: 8 floats a register, 16 registers.
#include <immintrin.h>

#include "fma.h"
#include "variants.h"

namespace rheo {
namespace {

typedef double Double __attribute__((may_alias));

struct Avx2 {
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kTokens = 8;
  static constexpr int kHeads = 4;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Reg load(const BFloat* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg max(Reg x, Reg otherwise) { return _mm256_max_ps(x, otherwise); }
  static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale2(Reg y, Reg n, Reg x) {
    const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    const Reg scaled = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(i, 23)));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(kExpLowest), _CMP_LT_OQ), scaled);
  }
  template <int F>
  static Reg spread(const float* p) {
    if constexpr (F == 1) return _mm256_set1_ps(*p);
    else if constexpr (F == 2) return _mm256_castpd_ps(_mm256_set1_pd(*reinterpret_cast<const Double*>(p)));
    else if constexpr (F == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    else return _mm256_loadu_ps(p);
  }
  static Reg fold(Reg a, Reg b) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(a, b)), _MM_SHUFFLE(3, 1, 2, 0)));
  }
};

// Words of two bf16: a key is widened in registers, once for all heads.
struct Avx2Pairs : Avx2 {
  static constexpr int kParts = 2;
  static Reg low(Reg words) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(words), 16)); }
  static Reg high(Reg words) { return _mm256_and_ps(words, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff0000))); }
};

class Avx2PairLogits {
 public:
  explicit Avx2PairLogits(const Run& run) : dots_(run.group, run.dim / 2), width(dots_.width), words_(run.dim / 2) {
    for (int h = 0; h < run.group; ++h) dots_.set_query(h, run.q + h * run.dim);
  }

 private:
  Dots<Avx2Pairs> dots_;

 public:
  const int width;

  void logits(const BFloat* keys, int tokens, float* out, Ahead& ahead) const {
    const float* words = reinterpret_cast<const float*>(keys);
    for (int t = 0; t < tokens; t += Avx2::kTokens)
      dots_.tile(words + static_cast<int64_t>(t) * words_, out + t * width, false, ahead);
  }

 private:
  const int words_;
};

}  // namespace

const Variant kAvx2 = {"avx2",
                       {attend_run<FmaMath<Avx2, float>>, attend_run<FmaMath<Avx2, Half>>,
                        attend_run<FmaMath<Avx2, BFloat, Avx2PairLogits>>}};

}  // namespace rheo
