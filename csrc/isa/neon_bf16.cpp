// NEON with BF16: logits of bf16 keys by bfmmla, which multiplies 2 keys with 2 heads, 4 components at a time.
// Values are widened and multiplied in fp32, so that the weights are not rounded.
#include "neon.h"
#include "variants.h"

namespace rheo {
namespace {

inline uint16_t round_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

class MmlaLogits {
 public:
  explicit MmlaLogits(const Run& run)
      : width(run.group <= 2 ? 2 : round_up(run.group, Neon::kWidth)), dim_(run.dim), pairs_(width / 2) {
    __builtin_memset(query_, 0, sizeof query_);
    for (int h = 0; h < run.group; ++h)
      for (int j = 0; j < dim_; ++j) {
        const float x = run.q[h * dim_ + j];
        const uint16_t first = round_to_bf16(x);
        const float left = x - widen(BFloat{first});
        // The first term already carries an infinity or a NaN, for which `left` is no number.
        const uint16_t second = left == left ? round_to_bf16(left) : 0;
        at(0, h, j) = first;
        at(1, h, j) = second;
        if ((second & 0x7fff) != 0) terms_ = 2;
      }
  }

  const int width;  // heads a row of logits

  void logits(const BFloat* keys, int tokens, float* out, Ahead& ahead) const {
    for (int t = 0; t < tokens; t += 8)
      for (int pair = 0; pair < pairs_;) pair += pairs_ - pair >= 4 ? tile<4>(keys, t, pair, out, ahead)
                                               : pairs_ - pair >= 2 ? tile<2>(keys, t, pair, out, ahead)
                                                                    : tile<1>(keys, t, pair, out, ahead);
  }

 private:
  // Logits of keys [t, t + 8) and P pairs of heads; returns P.
  template <int P>
  int tile(const BFloat* keys, int t, int pair, float* out, Ahead& ahead) const {
    float32x4_t acc[4][P];
    for (auto& row : acc)
      for (auto& a : row) a = vdupq_n_f32(0.0f);
    for (int j = 0; j < dim_; j += 8) {
      for (int k = 0; k < 4; ++k) {
        const uint16_t* row = &keys[static_cast<int64_t>(t + 2 * k) * dim_ + j].bits;
        const uint64x2_t a = vreinterpretq_u64_u16(vld1q_u16(row)), b = vreinterpretq_u64_u16(vld1q_u16(row + dim_));
        const bfloat16x8_t low = vreinterpretq_bf16_u64(vtrn1q_u64(a, b)), high = vreinterpretq_bf16_u64(vtrn2q_u64(a, b));
        for (int term = 0; term < terms_; ++term)
          for (int p = 0; p < P; ++p) {
            const uint16_t* q = query_ + ((term * pairs_ + pair + p) * dim_ + j) * 2;
            acc[k][p] = vbfmmlaq_f32(acc[k][p], low, vreinterpretq_bf16_u16(vld1q_u16(q)));
            acc[k][p] = vbfmmlaq_f32(acc[k][p], high, vreinterpretq_bf16_u16(vld1q_u16(q + 8)));
          }
      }
      ahead.steps(2);
    }
    for (int k = 0; k < 4; ++k)
      for (int p = 0; p < P; ++p) {
        float* to = out + (t + 2 * k) * width + 2 * (pair + p);
        vst1_f32(to, vget_low_f32(acc[k][p]));
        vst1_f32(to + width, vget_high_f32(acc[k][p]));
      }
    return P;
  }

  // [term][pair of heads][4 components][head of the pair][component]
  uint16_t& at(int term, int head, int j) {
    return query_[((term * pairs_ + head / 2) * dim_ + j / 4 * 4) * 2 + head % 2 * 4 + j % 4];
  }

  const int dim_, pairs_;
  int terms_ = 1;
  alignas(64) uint16_t query_[2 * kMaxGroup * kMaxDim];
};

}  // namespace

const Variant kNeonBf16 = {"neon_bf16",
                           {attend_run<FmaMath<Neon, float>>, attend_run<FmaMath<Neon, Half>>,
                            attend_run<FmaMath<Neon, BFloat, MmlaLogits>>}};

}  // namespace rheo
