// AVX512-BF16: logits of bf16 keys by vdpbf16ps, straight from memory. Values are widened and multiplied in
// fp32: so the weights are not rounded, at the same number of instructions.
#include "pairs.h"
#include "variants.h"

namespace rheo {
namespace {

// Registers of bf16 pairs: the "floats" that Dots moves about are pairs, until `fma` multiplies them.
struct Pairs : Avx512 {
  static Reg fma(Reg a, Reg b, Reg c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
};

class PairLogits {
 public:
  explicit PairLogits(const Run& run)
      : terms_{Dots<Pairs>(run.group, run.dim / 2), Dots<Pairs>(run.group, run.dim / 2)}, width(terms_[0].width), words_(run.dim / 2) {
    QueryPairs pairs[kMaxGroup];
    for (int h = 0; h < run.group; ++h) {
      const int needed = pairs[h].split(run.q + h * run.dim, run.dim);
      count_ = needed > count_ ? needed : count_;
    }
    for (int term = 0; term < count_; ++term)
      for (int h = 0; h < run.group; ++h) terms_[term].set_query(h, reinterpret_cast<const float*>(pairs[h].words(term)));
  }

 private:
  Dots<Pairs> terms_[2];

 public:
  const int width;

  void logits(const BFloat* keys, int tokens, float* out, Ahead& ahead) const {
    const float* words = reinterpret_cast<const float*>(keys);
    for (int t = 0; t < tokens; t += Pairs::kTokens)
      for (int term = 0; term < count_; ++term)
        terms_[term].tile(words + static_cast<int64_t>(t) * words_, out + t * width, term > 0, ahead);
  }

 private:
  const int words_;
  int count_ = 1;
};

}  // namespace

const Variant kAvx512Bf16 = {"avx512_bf16",
                             {attend_run<FmaMath<Avx512, float>>, attend_run<FmaMath<Avx512, Half>>,
                              attend_run<FmaMath<Avx512, BFloat, PairLogits>>}};

}  // namespace rheo
