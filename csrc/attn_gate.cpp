#include "attn_gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "block_attention.h"
#include "clones.h"
#include "thread_pool.h"

namespace rheo {
namespace {

constexpr float kEpsilon = 1e-6f;

// out[j] = sum_i x[i] * w[i, j], in the order of i whatever the vectors.
RHEO_CLONES void multiply(const float* x, const float* w, int inputs, int outputs, float* out) {
  for (int j = 0; j < outputs; ++j) out[j] = 0.0f;
  for (int i = 0; i < inputs; ++i) {
    const float xi = x[i];
    const float* row = w + static_cast<int64_t>(i) * outputs;
    for (int j = 0; j < outputs; ++j) out[j] += xi * row[j];
  }
}

// NaN wins and stays, as in torch.
RHEO_CLONES void fold(const float* key, int dim, float* high, float* low, float* sum) {
  for (int j = 0; j < dim; ++j) {
    const float x = key[j];
    high[j] = x > high[j] || x != x ? x : high[j];
    low[j] = x < low[j] || x != x ? x : low[j];
    sum[j] += x;
  }
}

void finish(const Projection& p, int64_t position, float* out) {
  const int dim = p.gate_dim;
  if (p.norm != nullptr) {
    float squares = 0.0f;
    for (int j = 0; j < dim; ++j) squares += out[j] * out[j];
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(dim) + kEpsilon);
    for (int j = 0; j < dim; ++j) out[j] = out[j] * scale * p.norm[j];
  }
  if (p.rope != nullptr) {
    const int half = dim / 2;
    const float* cosine = p.rope + position * dim;
    const float* sine = cosine + half;
    for (int j = 0; j < half; ++j) {
      const float a = out[j], b = out[j + half];
      out[j] = a * cosine[j] - b * sine[j];
      out[j + half] = b * cosine[j] + a * sine[j];
    }
  }
}

void require(int64_t value, int64_t low, int64_t high, const char* name) {
  if (value < low || value >= high)
    throw std::out_of_range(std::string(name) + " is " + std::to_string(value) + ", not in [" + std::to_string(low) + ", " + std::to_string(high) + ")");
}

void check(const Projection& p, const GateKeysArgs& a) {
  for (int64_t i = 0; i < a.count; ++i) {
    require(a.pages[i], 0, a.all_pages, "page");
    require(a.requests[i], 0, a.slots, "request");
    require(a.filled[i], 1, kBlockTokens + 1, "filled");
    require(a.before[i], 0, a.filled[i], "before");
    require(a.token[i], 0, a.tokens - (a.filled[i] - a.before[i]) + 1, "token");
    if (p.rope != nullptr) require(a.at[i], 0, p.positions, "position");
  }
}

void key_of(const Projection& p, const GateKeysArgs& a, int64_t i, int head) {
  float fresh[3 * kMaxDim];
  const int dim = a.dim;
  float* const stored = a.running + (a.requests[i] * a.kv_heads + head) * 3 * dim;
  const bool complete = a.filled[i] == kBlockTokens;
  // A page that is complete at once needs no memory of its tokens.
  float* const high = complete ? fresh : stored;
  float* const low = high + dim;
  float* const sum = low + dim;
  if (a.before[i] == 0) {
    std::fill(high, low, -std::numeric_limits<float>::infinity());
    std::fill(low, sum, std::numeric_limits<float>::infinity());
    std::fill(sum, sum + dim, 0.0f);
  } else if (complete) {
    std::copy(stored, stored + 3 * dim, fresh);
  }
  for (int t = 0; t < a.filled[i] - a.before[i]; ++t)
    fold(a.plain + ((a.token[i] + t) * a.kv_heads + head) * dim, dim, high, low, sum);
  float* const out = a.quick + (a.pages[i] * a.kv_heads + head) * p.gate_dim;
  if (!complete) {
    std::fill(out, out + p.gate_dim, 0.0f);
    return;
  }
  float pooled[3 * kMaxDim];
  float* to = pooled;
  if (a.parts & kPoolMax) to = std::copy(high, low, to);
  if (a.parts & kPoolMin) to = std::copy(low, sum, to);
  if (a.parts & kPoolAvg)
    for (int j = 0; j < dim; ++j) *to++ = sum[j] / static_cast<float>(kBlockTokens);
  multiply(pooled, p.weights + static_cast<int64_t>(head) * p.inputs * p.gate_dim, p.inputs, p.gate_dim, out);
  finish(p, a.at[i], out);
}

}  // namespace

void gate_keys(const Projection& p, const GateKeysArgs& a, ThreadPool& pool) {
  check(p, a);
  const int64_t cost = kBlockTokens * a.dim + static_cast<int64_t>(p.inputs) * p.gate_dim / 8;
  // A page that became complete reads the running values that the request's next page then overwrites.
  for (const bool complete : {true, false})
    for_each(pool, static_cast<int>(a.count) * a.kv_heads, cost, [&](int i) {
      if ((a.filled[i / a.kv_heads] == kBlockTokens) == complete) key_of(p, a, i / a.kv_heads, i % a.kv_heads);
    });
}

void gate_queries(const Projection& p, const float* plain, const int64_t* positions, float* out, int batch, int kv_heads,
                  int group, int dim, ThreadPool& pool) {
  if (p.rope != nullptr)
    for (int b = 0; b < batch; ++b) require(positions[b], 0, p.positions, "position");
  const bool average = p.weights == nullptr || p.inputs == dim;
  for_each(pool, batch * kv_heads, static_cast<int64_t>(p.inputs) * p.gate_dim / 8, [&](int i) {
    const float* x = plain + static_cast<int64_t>(i) * group * dim;
    float* const to = out + static_cast<int64_t>(i) * p.gate_dim;
    float mean[kMaxDim];
    if (average) {
      for (int j = 0; j < dim; ++j) {
        float sum = 0.0f;
        for (int g = 0; g < group; ++g) sum += x[g * dim + j];
        mean[j] = sum / static_cast<float>(group);
      }
      x = mean;
    }
    if (p.weights == nullptr)
      std::copy(x, x + dim, to);
    else
      multiply(x, p.weights + static_cast<int64_t>(i % kv_heads) * p.inputs * p.gate_dim, p.inputs, p.gate_dim, to);
    finish(p, positions[i / kv_heads], to);
  });
}

}  // namespace rheo
