// Random work for the worker pool and every kernel variant, against a plain double oracle; built under
// sanitizers by tests/test_sanitizers.py. Usage: stress SECONDS SEED
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "attn_gate.h"
#include "block_attention.h"
#include "cpu_features.h"
#include "doorbell.h"
#include "half.h"
#include "plan.h"
#include "quick_keys.h"
#include "score.h"
#include "stream.h"
#include "thread_pool.h"

using namespace rheo;

namespace {

struct Random {
  std::mt19937 engine;
  explicit Random(unsigned seed) : engine(seed) {}
  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
  float normal() { return std::normal_distribution<float>()(engine); }
};

[[noreturn]] void fail(const char* what, const char* variant, double got, double expected) {
  std::fprintf(stderr, "%s of %s is %.9g, expected %.9g\n", what, variant, got, expected);
  std::exit(1);
}

// Exactly as large as it must be, so that a sanitizer sees every read past the end.
struct Store {
  DType dtype;
  int blocks, dim;
  std::vector<float> wide;
  std::vector<char> bytes;

  Store(Random& random, DType dtype, int blocks, int dim) : dtype(dtype), blocks(blocks), dim(dim) {
    wide.resize(static_cast<size_t>(blocks) * 2 * kBlockTokens * dim);
    bytes.resize(wide.size() * (dtype == DType::kFloat32 ? 4 : 2));
    for (size_t i = 0; i < wide.size(); ++i) {
      const float x = random.normal();
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (dtype == DType::kFloat32) {
        std::memcpy(&bytes[4 * i], &x, 4);
        wide[i] = x;
      } else {  // truncated; for halves, a normal number of the same sign
        const uint16_t half = static_cast<uint16_t>(dtype == DType::kBFloat16 ? bits >> 16 : (bits >> 16 & 0x8000) | 0x3800 | (bits >> 13 & 0x3ff));
        std::memcpy(&bytes[2 * i], &half, 2);
        wide[i] = dtype == DType::kBFloat16 ? widen(BFloat{half}) : widen(Half{half});
      }
    }
  }

  const float* row(int block, int kind, int token) const {
    return wide.data() + ((static_cast<int64_t>(block) * 2 + kind) * kBlockTokens + token) * dim;
  }
};

void try_attention(Random& random, ThreadPool& pool, Workspace& workspace) {
  const auto variants = runnable_variants();
  const Variant& variant = *variants[random.between(0, static_cast<int>(variants.size()) - 1)];
  const bool has_long = random.between(0, 19) == 0;  // of more than 2,175 blocks tasks are longer
  const int batch = has_long ? 1 : random.between(1, 3), kv_heads = has_long ? 1 : random.between(1, 3);
  const int group = random.between(1, has_long ? 2 : 16);
  const int dim = 16 * random.between(1, has_long ? 2 : 16), pairs = batch * kv_heads;
  const int max_list = has_long ? 2300 : random.between(1, 12);
  const Store store(random, static_cast<DType>(random.between(0, 2)), random.between(std::min(max_list, 12), 20), dim);
  std::vector<float> q(static_cast<size_t>(pairs) * group * dim), out(q.size()), lse(static_cast<size_t>(pairs) * group);
  for (float& x : q) x = random.normal();
  std::vector<int32_t> lists[2], counts[2], last[2];
  AttendArgs args{};
  args.num_tiers = random.between(1, 2);
  for (int t = 0; t < args.num_tiers; ++t) {
    for (int i = 0; i < pairs * max_list; ++i) lists[t].push_back(random.between(0, store.blocks - 1));
    for (int i = 0; i < pairs; ++i) {
      counts[t].push_back(random.between(0, 3) == 0 ? 0 : random.between(0, max_list));
      last[t].push_back(random.between(1, kBlockTokens));
    }
    args.tiers[t] = {store.bytes.data(), store.blocks, lists[t].data(), counts[t].data(), last[t].data(), max_list};
  }
  args.q = q.data(), args.out = out.data(), args.lse = lse.data();
  args.batch = batch, args.kv_heads = kv_heads, args.group = group, args.dim = dim;
  args.scale = 1.0f / std::sqrt(static_cast<float>(dim)), args.dtype = store.dtype;
  if (random.between(0, 9) == 0) {  // what is wrong must be refused, and leave the pool usable
    lists[0][0] = store.blocks;
    counts[0][0] = std::max(counts[0][0], 1);
    try {
      attend(args, variant, pool, workspace);
    } catch (const std::out_of_range&) {
      return;
    }
    fail("a block outside the store", variant.name, 0, 1);
  }
  attend(args, variant, pool, workspace);
  for (int pair = 0; pair < pairs; ++pair)
    for (int h = 0; h < group; ++h) {
      const float* query = q.data() + (pair * group + h) * dim;
      double sum = 0.0;
      std::vector<double> expected(dim);
      for (int t = 0; t < args.num_tiers; ++t)
        for (int b = 0; b < counts[t][pair]; ++b)
          for (int token = 0; token < (b + 1 == counts[t][pair] ? last[t][pair] : kBlockTokens); ++token) {
            const int block = lists[t][pair * max_list + b];
            double logit = 0.0;
            for (int j = 0; j < dim; ++j) logit += static_cast<double>(query[j]) * store.row(block, 0, token)[j];
            const double weight = std::exp(logit * args.scale);
            sum += weight;
            for (int j = 0; j < dim; ++j) expected[j] += weight * store.row(block, 1, token)[j];
          }
      const double got = lse[pair * group + h], want = std::log(sum);
      if (!(got == want || std::fabs(got - want) <= 1e-4)) fail("an LSE", variant.name, got, want);
      for (int j = 0; j < dim; ++j) {
        const double value = sum == 0.0 ? 0.0 : expected[j] / sum, is = out[(pair * group + h) * dim + j];
        if (!(std::fabs(is - value) <= 1e-4)) fail("an output", variant.name, is, value);
      }
    }
}

// Rings as a GPU would, by stores, and compares with a call.
void try_doorbell(Random& random, Workspace& workspace) {
  constexpr int kPairs = 2, kGroup = 4, kDim = 64, kList = 3;
  const Store stores[2] = {Store(random, DType::kBFloat16, 6, kDim), Store(random, DType::kBFloat16, 6, kDim)};
  std::vector<float> q(kPairs * kGroup * kDim), out(q.size()), lse(kPairs * kGroup);
  int32_t lists[kPairs * kList], counts[kPairs], last[kPairs], batch = 1;
  std::vector<AttendArgs> layers;
  for (const Store& store : stores) {
    AttendArgs args{};
    args.q = q.data(), args.out = out.data(), args.lse = lse.data();
    args.tiers[0] = {store.bytes.data(), store.blocks, lists, counts, last, kList};
    args.num_tiers = 1, args.batch = 1, args.kv_heads = kPairs, args.group = kGroup, args.dim = kDim;
    args.scale = 0.1f, args.dtype = store.dtype;
    layers.push_back(args);
  }
  Bell bell{};
  const Variant& variant = choose_variant("");
  const int threads = random.between(1, 3);
  Doorbell doorbell(layers, &batch, &bell, variant, threads, {});
  ThreadPool pool(threads, {});
  for (uint64_t number = 1; number <= 6; ++number) {
    if (number % 2 == 1) doorbell.expect(2);
    for (float& x : q) x = random.normal();
    for (int32_t& id : lists) id = random.between(0, 5);
    for (int i = 0; i < kPairs; ++i) counts[i] = random.between(0, kList), last[i] = random.between(1, kBlockTokens);
    bell.asked.store(number, std::memory_order_release);
    while (bell.answered.load(std::memory_order_acquire) != number) relax();
    const std::vector<float> got = out;
    attend(layers[(number - 1) % 2], variant, pool, workspace);
    if (got != out) fail("an answer", "the doorbell", got[0], out[0]);
  }
  if (!doorbell.failure().empty()) fail("a failure", "the doorbell", 1, 0);
}

void try_planning(Random& random, ThreadPool& pool) {
  const int batch = random.between(1, 4), kv_heads = random.between(1, 4), group = random.between(1, 4);
  const int width = random.between(1, 300), all_pages = width + random.between(0, 50), dim = 16 * random.between(1, 8);
  std::vector<int64_t> pages;
  std::vector<int32_t> n_pages, tail, frame_of, filled;
  for (int b = 0; b < batch; ++b) {
    for (int p = 0; p < width; ++p) pages.push_back((p + b) % all_pages);
    n_pages.push_back(random.between(1, width));
    tail.push_back(random.between(1, kBlockTokens));
  }
  for (int i = 0; i < all_pages * kv_heads; ++i) frame_of.push_back(random.between(-1, 99));
  const PageTable table{pages.data(), n_pages.data(), batch, width, all_pages};
  const size_t rows = static_cast<size_t>(batch) * kv_heads;
  std::vector<float> q(rows * group * 2 * dim), quick(static_cast<size_t>(all_pages) * kv_heads * 2 * dim);
  std::vector<float> scores(rows * width), importance(static_cast<size_t>(all_pages) * kv_heads, 1.0f);
  for (float& x : q) x = random.normal();
  std::vector<float> host(static_cast<size_t>(width) * kv_heads * 2 * kBlockTokens * dim, 0.5f);
  for (int p = 0; p < width; ++p) filled.push_back(random.between(1, kBlockTokens));
  std::vector<int64_t> written(width);
  for (int p = 0; p < width; ++p) written[p] = p;
  pool_keys(Pooling::kMaxMin, {host.data(), written.data(), filled.data(), quick.data(), width, width, kv_heads, dim, DType::kFloat32}, pool);
  for (int i = 0; i < width * kv_heads * 2 * dim; ++i)
    if (quick[i] != 0.5f) fail("a gate key", "pool_keys", quick[i], 0.5);
  score(table, q.data(), quick.data(), scores.data(), kv_heads, group, 2 * dim, 0.1f, pool);
  std::vector<uint8_t> chosen(rows * width, 2);
  std::vector<int32_t> blocks[2], counts[2], last[2];
  std::vector<int32_t> budgets;
  for (int b = 0; b < batch; ++b) budgets.push_back(random.between(0, width));
  const int32_t* const own = random.between(0, 1) == 0 ? nullptr : budgets.data();
  PlanArgs args{table, scores.data(), own, tail.data(), frame_of.data(), kv_heads, {}, {}, chosen.data()};
  for (int i = 0; i < 2; ++i) {
    blocks[i].resize(rows * width), counts[i].resize(rows), last[i].resize(rows);
    (i == 0 ? args.device : args.host) = {blocks[i].data(), counts[i].data(), last[i].data()};
  }
  plan({static_cast<Select>(random.between(0, 3)), 1, 2, random.between(0, width), -3.0f, false}, args, pool);
  for (const uint8_t mark : chosen)
    if (mark > 1) fail("a mark", "plan", mark, 1);
  record(table, scores.data(), random.between(0, 1) ? chosen.data() : nullptr, importance.data(), kv_heads, 0.9f, pool);
  for (size_t i = 0; i < rows; ++i)
    if (counts[0][i] + counts[1][i] > n_pages[i / kv_heads]) fail("a count", "plan", counts[0][i] + counts[1][i], n_pages[i / kv_heads]);
}

// A gate whose key is the largest key of its page, token by token and at once.
void try_gate(Random& random, ThreadPool& pool) {
  const int kv_heads = random.between(1, 3), dim = 16 * random.between(1, 4), count = random.between(1, 20);
  std::vector<float> weights(static_cast<size_t>(kv_heads) * dim * dim);
  for (int h = 0; h < kv_heads; ++h)
    for (int j = 0; j < dim; ++j) weights[(static_cast<size_t>(h) * dim + j) * dim + j] = 1.0f;
  const Projection projection{weights.data(), nullptr, nullptr, dim, dim, 0};
  std::vector<float> running(static_cast<size_t>(count) * kv_heads * 3 * dim), quick(static_cast<size_t>(count) * kv_heads * dim);
  std::vector<float> top(quick.size(), -1e30f);
  std::vector<int32_t> before(count, 0), filled(count, 0);
  std::vector<int64_t> pages(count), requests(count), at(count, 0), token(count);
  for (int p = 0; p < count; ++p) pages[p] = p, requests[p] = count - 1 - p;
  while (filled[0] < kBlockTokens) {
    const int more = std::min(random.between(1, 40), kBlockTokens - filled[0]);
    std::vector<float> plain(static_cast<size_t>(count) * more * kv_heads * dim);
    for (float& x : plain) x = random.normal();
    for (int p = 0; p < count; ++p) {
      before[p] = filled[p], filled[p] += more, token[p] = static_cast<int64_t>(p) * more;
      for (int t = 0; t < more; ++t)
        for (int i = 0; i < kv_heads * dim; ++i)
          top[p * kv_heads * dim + i] = std::max(top[p * kv_heads * dim + i], plain[(p * more + t) * kv_heads * dim + i]);
    }
    gate_keys(projection, {plain.data(), pages.data(), token.data(), requests.data(), at.data(), before.data(), filled.data(),
                           running.data(), quick.data(), static_cast<int64_t>(count) * more, count, count, count, kv_heads, dim, kPoolMax}, pool);
  }
  for (size_t i = 0; i < quick.size(); ++i)
    if (quick[i] != top[i]) fail("a key", "gate_keys", quick[i], top[i]);
  std::vector<float> out(quick.size());
  gate_queries(projection, top.data(), at.data(), out.data(), count, kv_heads, 1, dim, pool);
  for (size_t i = 0; i < out.size(); ++i)
    if (out[i] != top[i]) fail("a query", "gate_queries", out[i], top[i]);
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10.0;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  ThreadPool shared(3, {});
  std::vector<std::thread> callers;
  std::atomic<int> rounds{0};
  for (unsigned i = 0; i < 2; ++i)  // two callers of one pool, each also with pools that come and go
    callers.emplace_back([&, i] {
      Random random(seed * 2 + i);
      Workspace workspace;
      while (std::chrono::steady_clock::now() < end) {
        try_attention(random, shared, workspace);
        try_planning(random, shared);
        try_gate(random, shared);
        try_doorbell(random, workspace);
        ThreadPool own(random.between(1, 9), {});
        try_attention(random, own, workspace);
        std::vector<char> memory(3 << 20);
        first_touch(memory.data(), static_cast<int64_t>(memory.size()), own);
        if (stream_read(memory.data(), static_cast<int64_t>(memory.size()), shared) != 0) fail("a sum", "stream_read", 1, 0);
        ++rounds;
      }
    });
  for (std::thread& caller : callers) caller.join();
  std::printf("%d rounds\n", rounds.load());
}
