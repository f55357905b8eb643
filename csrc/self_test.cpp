#include "self_test.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "isa/variants.h"
#include "thread_pool.h"

namespace rheo {
namespace {

constexpr int kBlocks = 5, kPairs = 2, kList = 3, kDim = 80;  // 80: the tiles' cut step too

// Numbers of both signs in [1/8, 1/2), in any of the dtypes: a linear congruential generator's bits.
std::vector<char> random_numbers(DType dtype, size_t count) {
  std::vector<char> bytes(count * 4);
  uint32_t seed = 1;
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const uint32_t sign = seed >> 31, exponent = seed >> 29 & 1u, fraction = seed >> 8;
    if (dtype == DType::kFloat32) {
      reinterpret_cast<uint32_t*>(bytes.data())[i] = sign << 31 | (124 + exponent) << 23 | (fraction & 0x7fffff);
    } else {
      const uint32_t half = dtype == DType::kFloat16 ? sign << 15 | (12 + exponent) << 10 | (fraction & 0x3ff)
                                                     : sign << 15 | (124 + exponent) << 7 | (fraction & 0x7f);
      reinterpret_cast<uint16_t*>(bytes.data())[i] = static_cast<uint16_t>(half);
    }
  }
  return bytes;
}

std::vector<float> run(const Variant& variant, DType dtype, int group) {
  const std::vector<char> q = random_numbers(DType::kFloat32, kPairs * group * kDim);
  const std::vector<char> blocks = random_numbers(dtype, kBlocks * 2 * kBlockTokens * kDim);
  const int32_t lists[kPairs * kList] = {4, 0, 2, 1, 3, 0}, counts[kPairs] = {3, 2}, last_len[kPairs] = {17, 64};
  std::vector<float> out(kPairs * group * kDim), lse(kPairs * group);
  AttendArgs args{};
  args.q = reinterpret_cast<const float*>(q.data());
  args.tiers[0] = {blocks.data(), kBlocks, lists, counts, last_len, kList};
  args.num_tiers = 1;
  args.out = out.data();
  args.lse = lse.data();
  args.batch = 1;
  args.kv_heads = kPairs;
  args.group = group;
  args.dim = kDim;
  args.scale = 1.0f;
  args.dtype = dtype;
  ThreadPool alone(1, {});
  Workspace workspace;
  attend(args, variant, alone, workspace);
  out.insert(out.end(), lse.begin(), lse.end());
  return out;
}

}  // namespace

void self_test(const Variant& variant) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const int group : {1, 3, 8, 16}) {
      const std::vector<float> got = run(variant, dtype, group), expected = run(kScalar, dtype, group);
      for (size_t i = 0; i < got.size(); ++i)
        if (!(std::fabs(got[i] - expected[i]) <= 1e-4f * (1.0f + std::fabs(expected[i]))))
          throw std::runtime_error(std::string("CPU variant ") + variant.name + " computes " + std::to_string(got[i]) +
                                   " where the scalar one has " + std::to_string(expected[i]) + " (dtype " +
                                   std::to_string(static_cast<int>(dtype)) + ", group " + std::to_string(group) + ")");
    }
}

}  // namespace rheo
