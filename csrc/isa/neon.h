// NEON (aarch64): 4 floats a register, 32 registers. Shared by the variants that add to it.
#pragma once

#include <arm_neon.h>

#include "fma.h"

namespace rheo {
namespace {

struct Neon {
  using Reg = float32x4_t;
  static constexpr int kWidth = 4;
  static constexpr int kTokens = 16;
  static constexpr int kHeads = 8;

  static Reg zero() { return vdupq_n_f32(0.0f); }
  static Reg set1(float x) { return vdupq_n_f32(x); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load(const Half* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
  }
  static Reg load(const BFloat* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
  static void store(float* p, Reg x) { vst1q_f32(p, x); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg max(Reg x, Reg otherwise) { return vmaxnmq_f32(x, otherwise); }  // a number wins over NaN
  static Reg round(Reg x) { return vrndnq_f32(x); }
  static Reg scale2(Reg y, Reg n, Reg x) {
    const int32x4_t i = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    const Reg scaled = vmulq_f32(y, vreinterpretq_f32_s32(vshlq_n_s32(i, 23)));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(scaled), vcltq_f32(x, set1(kExpLowest))));
  }
  template <int F>
  static Reg spread(const float* p) {
    if constexpr (F == 1) return vld1q_dup_f32(p);
    else if constexpr (F == 2) return vcombine_f32(vld1_f32(p), vld1_f32(p));
    else return vld1q_f32(p);
  }
  static Reg fold(Reg a, Reg b) { return vpaddq_f32(a, b); }
};

}  // namespace
}  // namespace rheo
