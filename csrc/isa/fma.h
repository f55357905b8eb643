// Products by fused multiply-add in fp32, for any KV dtype.
//
// V offers: Reg, kWidth (floats a register), kTokens (keys a tile), kHeads (query heads a value tile), zero,
// set1, load(const T*) for float / half / bf16, store, fma, mul, add, max(x, or else this), round, scale2,
// spread<F>(p) (the F floats at p, again and again) and fold(a, b) (sums of neighbours: a's, then b's).
// One whose words of a key are two bf16 each, kParts = 2, offers low(words) and high(words): either of them as floats.
#pragma once

#include "body.h"

namespace rheo {
namespace {

template <class V>
constexpr int parts() {
  if constexpr (requires { V::kParts; }) return V::kParts;
  else return 1;
}

// Dot products of a group's queries with keys of `words` floats, or pairs of bf16. A lane is one head's product with every
// F-th component, F being how often the group fits into a register: a key is loaded and multiplied once for
// all heads, and only log2(F) additions across lanes are left at the end.
//
// `Bytes` of memory are a word: as many lines are asked for as are read, up to four at a step, until there are no more.
template <class V, int Bytes = sizeof(float)>
class Dots {
  static constexpr int kParts = parts<V>();

 public:
  Dots(int group, int words) : copies_(copies(group, words)), width(round_up(group, V::kWidth / copies_)), words_(words) {
    if (group < width) fill(query_, width * words * kParts, 0.0f);
  }

 private:
  const int copies_;

 public:
  const int width;  // heads a row of logits

  void set_query(int head, const float* q) {
    float* to = query_ + (head / V::kWidth * V::kWidth * words_) * kParts + head % V::kWidth * copies_;
    for (int j = 0; j < words_; j += copies_)
      for (int part = 0; part < kParts; ++part, to += V::kWidth)
        for (int f = 0; f < copies_; ++f) to[f] = q[(j + f) * kParts + part];
  }

  // Products with V::kTokens keys, to out [kTokens][width]; `add` to what is there.
  void tile(const float* keys, float* out, bool add, Ahead& ahead) const {
    switch (copies_) {
      case 1: return strided<1>(keys, out, add, ahead);
      case 2: return strided<2>(keys, out, add, ahead);
      case 4: return strided<4>(keys, out, add, ahead);
      case 8: return strided<8>(keys, out, add, ahead);
      default: return strided<16>(keys, out, add, ahead);
    }
  }

 private:
  static int copies(int group, int words) {
    int f = V::kWidth;
    while (f > 1 && (f * group > V::kWidth || words % f)) f /= 2;
    return f;
  }

  // A stride known to the compiler makes every key of a tile one address with a constant offset.
  template <int F>
  void strided(const float* keys, float* out, bool add, Ahead& ahead) const {
    if constexpr (F <= V::kWidth) {
      if (words_ == 32) products<F>(keys, Constant<32>(), out, add, ahead);
      else if (words_ == 64) products<F>(keys, Constant<64>(), out, add, ahead);
      else if (words_ == 128) products<F>(keys, Constant<128>(), out, add, ahead);
      else products<F>(keys, words_, out, add, ahead);
    }
  }

  template <int N>
  struct Constant {
    constexpr operator int() const { return N; }
  };

  template <int F, class Stride>
  void products(const float* keys, Stride words, float* out, bool add, Ahead& ahead) const {
    constexpr int kRead = F * Bytes * V::kTokens;  // bytes, by a step
    constexpr int kLines = kRead < 64 ? 1 : kRead < 256 ? kRead / 64 : 4;
    constexpr int kSteps = kRead < 64 ? 64 / kRead : 1;
    Ahead next = ahead;  // in registers
    for (int c = 0; c < width; c += V::kWidth) {
      typename V::Reg acc[V::kTokens];
      for (int i = 0; i < V::kTokens; ++i) acc[i] = V::zero();
      const float* q = query_ + c * words * kParts;
      for (int j = 0; j < words;) {
        for (int step = 0; step < kSteps; ++step, j += F, q += V::kWidth * kParts) multiply<F>(q, keys + j, words, acc);
        next.steps(kLines);
      }
      fold_all<F, V::kTokens>(acc);
      for (int i = 0; i < V::kTokens / F; ++i) {
        float* to = out + (F == 1 ? i * width + c : i * V::kWidth);
        V::store(to, add ? V::add(V::load(to), acc[i]) : acc[i]);
      }
    }
    ahead = next;
  }

  template <int F, class Stride>
  [[gnu::always_inline]] static void multiply(const float* q, const float* keys, Stride words, typename V::Reg* acc) {
    const typename V::Reg first = V::load(q);
    if constexpr (kParts == 1) {
      for (int i = 0; i < V::kTokens; ++i) acc[i] = V::fma(first, V::template spread<F>(keys + i * words), acc[i]);
    } else {
      const typename V::Reg second = V::load(q + V::kWidth);
      for (int i = 0; i < V::kTokens; ++i) {
        const typename V::Reg pair = V::template spread<F>(keys + i * words);
        acc[i] = V::fma(second, V::high(pair), V::fma(first, V::low(pair), acc[i]));
      }
    }
  }

  template <int F, int N>
  [[gnu::always_inline]] static void fold_all(typename V::Reg* acc) {
    if constexpr (F > 1) {
      for (int i = 0; i < N / 2; ++i) acc[i] = V::fold(acc[2 * i], acc[2 * i + 1]);
      fold_all<F / 2, N / 2>(acc);
    }
  }

  const int words_;
  alignas(64) float query_[kMaxGroup * kMaxDim];
};

template <class V, class T>
class FmaLogits {
 public:
  explicit FmaLogits(const Run& run) : dots_(run.group, run.dim), width(dots_.width), dim_(run.dim) {
    for (int h = 0; h < run.group; ++h) dots_.set_query(h, run.q + h * dim_);
  }

 private:
  Dots<V, sizeof(T)> dots_;

 public:
  const int width;

  void logits(const T* keys, int tokens, float* out, Ahead& ahead) const {
    alignas(64) float wide[sizeof(T) == sizeof(float) ? 1 : V::kTokens * kMaxDim];
    for (int t = 0; t < tokens; t += V::kTokens)
      dots_.tile(widen_rows(keys + static_cast<int64_t>(t) * dim_, wide), out + t * width, false, ahead);
  }

 private:
  const float* widen_rows(const float* keys, float*) const { return keys; }
  template <class S>
  const float* widen_rows(const S* keys, float* wide) const {
    for (int i = 0; i < V::kTokens * dim_; i += V::kWidth) V::store(wide + i, V::load(keys + i));
    return wide;
  }

  const int dim_;
};

// Values: out[h] = out[h] * rescale[h] + sum_t weights[t][h] * values[t], in strips of the dim.
// Over all passes as many lines are asked for as the values have, of which only the first pass reads from memory, and
// Pace - 1 more at each turn.
template <class V, class T, int Pace = 1>
class FmaValues {
 public:
  FmaValues(const Run& run, int width)
      : width_(width), group_(run.group), dim_(run.dim), passes_((run.group + V::kHeads - 1) / V::kHeads) {}

  // Sums are kept here: the state's own lines were written or read last by another thread.
  void begin(float* acc) {
    out_ = acc;
    fill(sums_, group_ * dim_, 0.0f);
  }

  void values(const float* weights, const T* values, int tokens, const float* rescale, Ahead& ahead) {
    int head = 0;
    for (; head + V::kHeads <= group_; head += V::kHeads) tile<V::kHeads>(head, weights, values, tokens, rescale, ahead);
    rest<V::kHeads - 1>(head, weights, values, tokens, rescale, ahead);
  }

  void finish() const {
    for (int i = 0; i < group_ * dim_; i += V::kWidth) V::store(out_ + i, V::load(sums_ + i));
  }

 private:
  template <int H>
  void rest(int head, const float* weights, const T* values, int tokens, const float* rescale, Ahead& ahead) {
    if constexpr (H > 0) {
      if (group_ - head == H) return tile<H>(head, weights, values, tokens, rescale, ahead);
      rest<H - 1>(head, weights, values, tokens, rescale, ahead);
    }
  }

  template <int H>
  void tile(int head, const float* weights, const T* values, int tokens, const float* rescale, Ahead& ahead) {
    // Half the accumulators' registers for many heads, all of them wide for few.
    constexpr int kRegs = H <= V::kHeads / 2 ? 4 : 2;
    int j = 0;
    for (; j + kRegs * V::kWidth <= dim_; j += kRegs * V::kWidth)
      strip<H, kRegs>(head, j, weights, values, tokens, rescale, ahead);
    for (; j < dim_; j += V::kWidth) strip<H, 1>(head, j, weights, values, tokens, rescale, ahead);
  }

  template <int H, int N>
  void strip(int head, int j, const float* weights, const T* values, int tokens, const float* rescale, Ahead& ahead) {
    typename V::Reg acc[H][N];
    float* out = sums_ + head * dim_ + j;
    for (int h = 0; h < H; ++h) {
      const typename V::Reg r = V::set1(rescale[head + h]);
      for (int n = 0; n < N; ++n) acc[h][n] = V::mul(r, V::load(out + h * dim_ + n * V::kWidth));
    }
    constexpr int kRead = N * V::kWidth * static_cast<int>(sizeof(T));  // bytes, of a token
    constexpr int kLines = (kRead < 64 ? 1 : kRead / 64) + Pace - 1;
    const int turns = (kRead < 64 ? 64 / kRead : 1) * passes_;
    Ahead next = ahead;  // in registers
    int until = turns;
    for (int t = 0; t < tokens; ++t) {
      typename V::Reg v[N];
      for (int n = 0; n < N; ++n) v[n] = V::load(values + static_cast<int64_t>(t) * dim_ + j + n * V::kWidth);
      for (int h = 0; h < H; ++h) {
        const typename V::Reg w = V::set1(weights[t * width_ + head + h]);
        for (int n = 0; n < N; ++n) acc[h][n] = V::fma(w, v[n], acc[h][n]);
      }
      if (--until == 0) {
        next.steps(kLines);
        until = turns;
      }
    }
    ahead = next;
    for (int h = 0; h < H; ++h)
      for (int n = 0; n < N; ++n) V::store(out + h * dim_ + n * V::kWidth, acc[h][n]);
  }

  const int width_, group_, dim_, passes_;
  float* out_ = nullptr;
  alignas(64) float sums_[kMaxGroup * kMaxDim];
};

template <class V, class T, class Logits = FmaLogits<V, T>>
struct FmaMath : Logits, FmaValues<V, T> {
  using Element = T;
  using Vector = V;
  static constexpr int kEarly = 0;
  explicit FmaMath(const Run& run) : Logits(run), FmaValues<V, T>(run, Logits::width) {}
};

template <class V>
constexpr Variant make_variant(const char* name) {
  return {name, {attend_run<FmaMath<V, float>>, attend_run<FmaMath<V, Half>>, attend_run<FmaMath<V, BFloat>>}};
}

}  // namespace
}  // namespace rheo
