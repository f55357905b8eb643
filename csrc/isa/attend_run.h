// The kernel body, written once over a vector type `V` and compiled by each isa/*.cpp with
// its own flags. Everything is in an anonymous namespace: two translation units built with
// different flags must never share an inline function.
//
// V offers: Reg, kWidth, kHeads (query heads per register tile), zero, set1, load(const T*)
// for float / half / bf16, store, fma, mul, add, max, exp, sum, and sum4.
#pragma once

#include <cmath>
#include <limits>

#include "../block_attention.h"
#include "../half.h"

namespace rheo {
namespace {

// Logits of H heads against all 64 keys. Rows past the valid length are computed and
// masked by the caller: stale bytes there are readable, whatever they hold.
template <class V, int H, class T>
inline void dot_tile(const float* q, const T* keys, int dim, int tokens, float* logits) {
  for (int t = 0; t < tokens; t += 4) {
    typename V::Reg acc[H][4];
    for (int h = 0; h < H; ++h)
      for (int i = 0; i < 4; ++i) acc[h][i] = V::zero();
    const T* row = keys + static_cast<int64_t>(t) * dim;
    for (int j = 0; j < dim; j += V::kWidth) {
      const typename V::Reg k0 = V::load(row + j);
      const typename V::Reg k1 = V::load(row + dim + j);
      const typename V::Reg k2 = V::load(row + 2 * dim + j);
      const typename V::Reg k3 = V::load(row + 3 * dim + j);
      for (int h = 0; h < H; ++h) {
        const typename V::Reg qv = V::load(q + h * dim + j);
        acc[h][0] = V::fma(qv, k0, acc[h][0]);
        acc[h][1] = V::fma(qv, k1, acc[h][1]);
        acc[h][2] = V::fma(qv, k2, acc[h][2]);
        acc[h][3] = V::fma(qv, k3, acc[h][3]);
      }
    }
    for (int h = 0; h < H; ++h)
      V::sum4(acc[h][0], acc[h][1], acc[h][2], acc[h][3], logits + h * kBlockTokens + t);
  }
}

// acc[h] = acc[h] * rescale[h] + sum_t p[h][t] * values[t], for H heads and N vectors of dim.
template <class V, int H, int N, class T>
inline void value_strip(const float* p, const T* values, int dim, int tokens,
                        const float* rescale, float* out) {
  typename V::Reg acc[H][N];
  for (int h = 0; h < H; ++h) {
    const typename V::Reg r = V::set1(rescale[h]);
    for (int n = 0; n < N; ++n) acc[h][n] = V::mul(r, V::load(out + h * dim + n * V::kWidth));
  }
  for (int t = 0; t < tokens; ++t) {
    typename V::Reg v[N];
    for (int n = 0; n < N; ++n) v[n] = V::load(values + static_cast<int64_t>(t) * dim + n * V::kWidth);
    for (int h = 0; h < H; ++h) {
      const typename V::Reg w = V::set1(p[h * kBlockTokens + t]);
      for (int n = 0; n < N; ++n) acc[h][n] = V::fma(w, v[n], acc[h][n]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int n = 0; n < N; ++n) V::store(out + h * dim + n * V::kWidth, acc[h][n]);
}

template <class V, int H, class T>
inline void value_tile(const float* p, const T* values, int dim, int tokens,
                       const float* rescale, float* out) {
  int j = 0;
  for (; j + 4 * V::kWidth <= dim; j += 4 * V::kWidth)
    value_strip<V, H, 4>(p, values + j, dim, tokens, rescale, out + j);
  for (; j < dim; j += V::kWidth)
    value_strip<V, H, 1>(p, values + j, dim, tokens, rescale, out + j);
}

// Turns logits into exp(logit - max), returns their sum; `rescale` is what the old state
// must be multiplied by. A NaN logit is lost in the max but not in the exp, so it reaches
// the sum and poisons this head only.
template <class V>
inline float soften(float* logits, int tokens, float* running_max, float* rescale) {
  for (int t = tokens; t < kBlockTokens; ++t) logits[t] = -std::numeric_limits<float>::infinity();
  float top = *running_max;
  for (int t = 0; t < tokens; ++t) top = logits[t] > top ? logits[t] : top;
  *rescale = std::exp(*running_max - top);
  // Nothing but -inf so far (possible only with infinite keys): stay at exp(-inf) = 0.
  const float shift = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
  if (*running_max == top) *rescale = 1.0f;
  *running_max = top;
  typename V::Reg total = V::zero();
  const typename V::Reg minus = V::set1(-shift);
  for (int t = 0; t < kBlockTokens; t += V::kWidth) {
    const typename V::Reg e = V::exp(V::add(V::load(logits + t), minus));
    V::store(logits + t, e);
    total = V::add(total, e);
  }
  return V::sum(total);
}

template <class V, int H, class T>
inline void attend_heads(const Run& run, const State& state, int head) {
  alignas(64) float logits[H * kBlockTokens];
  float rescale[H];
  const int dim = run.dim;
  const int64_t half = static_cast<int64_t>(kBlockTokens) * dim;
  const T* blocks = static_cast<const T*>(run.blocks);
  const float* q = run.q + head * dim;
  float* acc = state.acc + head * dim;
  for (int b = 0; b < run.count; ++b) {
    const T* keys = blocks + static_cast<int64_t>(run.ids[b]) * 2 * half;
    const int tokens = b + 1 == run.count ? run.last_len : kBlockTokens;
    dot_tile<V, H>(q, keys, dim, (tokens + 3) & ~3, logits);
    for (int h = 0; h < H; ++h) {
      float& sum = state.sum[head + h];
      const float add = soften<V>(logits + h * kBlockTokens, tokens, state.max + head + h, rescale + h);
      sum = sum * rescale[h] + add;
    }
    value_tile<V, H>(logits, keys + half, dim, tokens, rescale, acc);
  }
}

template <class V, class T>
void attend_run(const Run& run, const State& state) {
  int head = 0;
  for (; head + V::kHeads <= run.group; head += V::kHeads) attend_heads<V, V::kHeads, T>(run, state, head);
  switch (run.group - head) {  // kHeads is at most 4, so at most 3 heads are left
    case 3: attend_heads<V, 3, T>(run, state, head); break;
    case 2: attend_heads<V, 2, T>(run, state, head); break;
    case 1: attend_heads<V, 1, T>(run, state, head); break;
    default: break;
  }
}

// exp(x) by range reduction and a degree-5 polynomial (Cephes expf coefficients), about
// 2 ulp. `scale2` multiplies by 2^n; `x` below -87.3 gives 0; NaN stays NaN.
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kExpLowest = -87.3f;
constexpr float kExpPoly[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

template <class V>
inline typename V::Reg exp_poly(typename V::Reg x, typename V::Reg n) {
  using R = typename V::Reg;
  const R r = V::fma(n, V::set1(-kLn2Low), V::fma(n, V::set1(-kLn2High), x));
  R p = V::set1(kExpPoly[0]);
  for (int i = 1; i < 6; ++i) p = V::fma(p, r, V::set1(kExpPoly[i]));
  return V::fma(V::mul(p, r), r, V::add(r, V::set1(1.0f)));
}

template <class V>
constexpr Variant make_variant(const char* name) {
  return {name, {attend_run<V, float>, attend_run<V, Half>, attend_run<V, BFloat>}};
}

}  // namespace
}  // namespace rheo
