// Queries as pairs of bf16, for instructions that multiply two neighbouring components at once.
#pragma once

#include "avx512.h"

namespace rheo {
namespace {

// One head's query as words of two neighbouring bf16. A query that bf16 cannot hold is the sum of two terms;
// `split` returns how many it needs: one whenever the model itself runs in bf16. Scaling by the softmax
// scale is left for the logits, to keep it so.
struct QueryPairs {
  alignas(64) uint16_t term[2][kMaxDim];

  const uint32_t* words(int t) const { return reinterpret_cast<const uint32_t*>(term[t]); }

  int split(const float* q, int dim) {
    __mmask16 rest = 0;
    for (int j = 0; j < dim; j += 16) {
      const __m512 x = _mm512_loadu_ps(q + j);
      const __m256i first = (__m256i)_mm512_cvtneps_pbh(x);
      const __m512 left = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16)));
      // The first term already carries an infinity or a NaN, for which `left` is no number.
      const __mmask16 some = _mm512_cmp_ps_mask(left, _mm512_setzero_ps(), _CMP_NEQ_OQ);
      const __m256i second = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(some, left));
      _mm256_store_si256(reinterpret_cast<__m256i*>(term[0] + j), first);
      _mm256_store_si256(reinterpret_cast<__m256i*>(term[1] + j), second);
      rest |= some;
    }
    return rest != 0 ? 2 : 1;
  }
};

}  // namespace
}  // namespace rheo
