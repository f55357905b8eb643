// One run of blocks, written once and compiled by each isa/*.cpp with its own flags.
//
// Query heads lie in the lanes of a register: the logits of a block are [64][width] floats with
// `width` heads a row, so that maxima and sums over tokens need no shuffles, and a key is read from
// memory once for all heads. While one half of a block is worked on, the next half (V after K, then
// the next block's K) is fetched line by line.
//
// Everything is in an anonymous namespace: two translation units built with different flags must
// never share an inline function. For the same reason nothing here calls the standard library's templates.
#pragma once

#include <limits>
#include <math.h>

#include "../block_attention.h"
#include "../half.h"

namespace rheo {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kHighest = std::numeric_limits<float>::max();

// What will be read next, in one or two pieces; each `step` asks for one cache line, into L2: L1 has no room for it
// beside what is being read, where two threads share a core. Always inlined: a call between multiplications makes the
// compiler put all sums into memory and back.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  const char* then = nullptr;
  const char* then_end = nullptr;

  [[gnu::always_inline]] void step() {
    if (at >= end) {
      if (then >= then_end) return;
      at = then;
      end = then = then_end;
    }
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }

  [[gnu::always_inline]] void steps(int n) {
    if (end - at < 64 * n) {
      if (at < end || then < then_end)
        for (int i = 0; i < n; ++i) step();
      return;
    }
    for (int i = 0; i < n; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += 64 * n;
  }

  // All that is left.
  void rest() {
    while (at < end || then < then_end) step();
  }
};

inline void fill(float* p, int n, float x) {
  for (int i = 0; i < n; ++i) p[i] = x;
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// exp(x) for x <= 0 by range reduction and a degree-5 polynomial (Cephes expf coefficients), about
// 2 ulp. V::scale2 multiplies by 2^n and gives 0 where x is below kExpLowest; NaN stays NaN.
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kExpLowest = -87.3f;
constexpr float kExpPoly[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

template <class V>
inline typename V::Reg exp_negative(typename V::Reg x) {
  using R = typename V::Reg;
  const R n = V::round(V::mul(x, V::set1(kLog2e)));
  const R r = V::fma(n, V::set1(-kLn2Low), V::fma(n, V::set1(-kLn2High), x));
  R p = V::set1(kExpPoly[0]);
  for (int i = 1; i < 6; ++i) p = V::fma(p, r, V::set1(kExpPoly[i]));
  return V::scale2(V::fma(V::mul(p, r), r, V::add(r, V::set1(1.0f))), n, x);
}

// The same to 3e-6, a third cheaper: of KV of 16 bits, which is itself rounded a thousand times coarser, that is enough.
// Rounded by what fp32 has no bits for.
constexpr float kRoundAway = 12582912.0f;  // 1.5 x 2^23
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kExpShort[5] = {4.1513815e-2f, 1.6787497e-1f, 5.0003015e-1f, 9.9996682e-1f, 1.0f};  // minimax

template <class V>
inline typename V::Reg exp_short(typename V::Reg x) {
  using R = typename V::Reg;
  const R n = V::add(V::fma(x, V::set1(kLog2e), V::set1(kRoundAway)), V::set1(-kRoundAway));
  const R r = V::fma(n, V::set1(-kLn2), x);
  R p = V::set1(kExpShort[0]);
  for (int i = 1; i < 5; ++i) p = V::fma(p, r, V::set1(kExpShort[i]));
  return V::scale2(p, n, x);
}

// Turns logits [64][width], still without the softmax scale, into exp(scaled logit - running max) and adds
// them to the running sums; `rescale` is what the older part of the state must be multiplied by. A NaN logit is
// lost in the maximum but not in the exponential, so it reaches the sum and poisons its own head only.
// A row of fewer heads than lanes shares a register with the next rows.
template <class V, bool Short>
inline void soften(float* logits, int width, const Run& run, int tokens, const State& state, float* rescale, Ahead& ahead) {
  using R = typename V::Reg;
  constexpr int kMaxRegs = kMaxGroup / V::kWidth > 1 ? kMaxGroup / V::kWidth : 1;
  const int total = kBlockTokens * width;
  fill(logits + tokens * width, total - tokens * width, kLowest);
  const int regs = width > V::kWidth ? width / V::kWidth : 1;  // registers before the heads repeat
  const int step = regs * V::kWidth;                           // lanes, some of them of the same head
  const int quarter = total / 4;                               // four chains, to hide latency
  alignas(64) float lanes[kMaxRegs * V::kWidth];
  for (int r = 0; r < step; r += V::kWidth) {
    R top[4] = {V::set1(kLowest), V::set1(kLowest), V::set1(kLowest), V::set1(kLowest)};
    for (int i = r; i < quarter; i += step)
      for (int c = 0; c < 4; ++c) top[c] = V::max(V::load(logits + c * quarter + i), top[c]);
    V::store(lanes + r, V::max(V::max(top[0], top[1]), V::max(top[2], top[3])));
  }
  alignas(64) float best[kMaxGroup] = {}, old[kMaxGroup] = {}, shift[kMaxGroup] = {};
  for (int h = 0; h < run.group; ++h) {
    best[h] = lanes[h];
    for (int i = h + width; i < step; i += width) best[h] = lanes[i] > best[h] ? lanes[i] : best[h];
    old[h] = state.max[h];
  }
  for (int h = 0; h < run.group; h += V::kWidth) {
    const R before = V::load(old + h);
    const R top = V::max(V::mul(V::load(best + h), V::set1(run.scale)), before);
    // Nothing but -inf so far (possible only with infinite keys): a finite shift, so that exp(-inf) = 0 remains.
    const R minus = V::mul(V::max(top, V::set1(-kHighest)), V::set1(-1.0f));
    V::store(best + h, top);
    V::store(shift + h, minus);
    V::store(rescale + h, exp_negative<V>(V::add(before, minus)));
  }
  for (int h = 0; h < run.group; ++h) state.max[h] = best[h];
  for (int i = 0; i < step; ++i) lanes[i] = shift[i % width];
  const R scale = V::set1(run.scale);
  for (int r = 0; r < step; r += V::kWidth) {
    const R minus = V::load(lanes + r);
    R sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int i = r; i < quarter; i += step) {
      for (int c = 0; c < 4; ++c) {
        float* at = logits + c * quarter + i;
        const R x = V::fma(V::load(at), scale, minus);
        const R e = Short ? exp_short<V>(x) : exp_negative<V>(x);
        V::store(at, e);
        sum[c] = V::add(sum[c], e);
      }
      ahead.steps(4);
    }
    V::store(lanes + r, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
  }
  for (int h = 0; h < run.group; ++h) {
    float sum = 0.0f;
    for (int i = h; i < step; i += width) sum += lanes[i];
    state.sum[h] = state.sum[h] * rescale[h] + sum;
  }
}

// Math offers Element, Vector, kEarly, width and, made for one run: begin(acc) and finish() around the blocks of a
// state, logits(keys, tokens, out, ahead) and values(weights, values, tokens, rescale, ahead).
//
// While values are multiplied, the next block's keys are fetched, and kEarly 256ths of its values, the rest of
// which is fetched while the next keys are multiplied: so that lines are asked for at an even rate, whichever
// phase is longer. (A core has few line fill buffers; asking for more at once stalls it.) What a phase had no steps for
// is asked for at its end.
template <class Math>
void attend_run(const Run& run) {
  using T = typename Math::Element;
  const int64_t half = static_cast<int64_t>(kBlockTokens) * run.dim;
  const int64_t half_bytes = half * static_cast<int64_t>(sizeof(T));
  const T* blocks = static_cast<const T*>(run.blocks);
  const int64_t early = half_bytes / 256 * Math::kEarly;
  const auto block = [&](int b) { return blocks + 2 * half * run.ids[b]; };
  // While the kernel is set up; after another run of this thread they are there.
  const char* first = reinterpret_cast<const char*>(block(0));
  Ahead{first, first + half_bytes}.steps(static_cast<int>(half_bytes / 64));
  alignas(64) float weights[kBlockTokens * kMaxGroup];
  alignas(64) float rescale[kMaxGroup];
  Math math(run);
  State state{};
  int until = 0, task = 0;
  for (int b = 0; b < run.count; ++b) {
    if (b == until) {
      if (b > 0) math.finish();
      state = State::at(run.states + task * State::floats(run.group, run.dim), run.group);
      until += run.tasks[task++].count;
      fill(state.max, run.group, kLowest);
      fill(state.sum, run.group, 0.0f);
      math.begin(state.acc);
    }
    const T* keys = block(b);
    const int tokens = b + 1 == run.count ? run.last_len : kBlockTokens;
    const char* values = reinterpret_cast<const char*>(keys + half);
    Ahead ahead{values + (b == 0 ? 0 : early), values + tokens * run.dim * static_cast<int64_t>(sizeof(T))};
    math.logits(keys, tokens, weights, ahead);
    soften<typename Math::Vector, sizeof(T) == 2>(weights, math.width, run, tokens, state, rescale, ahead);
    ahead.rest();
    const char* following = static_cast<const char*>(b + 1 < run.count ? block(b + 1) : run.next(run.of));
    Ahead next;
    if (following != nullptr) next = {following, following + half_bytes, following + half_bytes, following + half_bytes + early};
    math.values(weights, keys + half, tokens, rescale, next);
    next.rest();
  }
  math.finish();
}

}  // namespace
}  // namespace rheo
