// NEON (aarch64): 4 floats a register, 32 registers, so tiles of 4 heads x 4 keys.
#include <arm_neon.h>

#include "attend_run.h"
#include "variants.h"

namespace rheo {
namespace {

struct Neon {
  using Reg = float32x4_t;
  static constexpr int kWidth = 4;
  static constexpr int kHeads = 4;

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
  static Reg exp(Reg x) {
    const Reg n = vrndnq_f32(vmulq_n_f32(x, kLog2e));
    const int32x4_t i = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    const Reg y = vmulq_f32(exp_poly<Neon>(x, n), vreinterpretq_f32_s32(vshlq_n_s32(i, 23)));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, set1(kExpLowest))));
  }
  static float sum(Reg x) { return vaddvq_f32(x); }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
};

}  // namespace

const Variant kNeon = make_variant<Neon>("neon");

}  // namespace rheo
