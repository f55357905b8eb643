// Python bindings. Tensors cross as addresses and shapes, so that neither torch nor CUDA is
// needed to build; rheoserve_sgl/ops checks dtypes and contiguity before it takes an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <memory>
#include <mutex>

#include "append.h"
#include "attn_gate.h"
#include "block_attention.h"
#include "cpu_features.h"
#include "doorbell.h"
#include "numa.h"
#include "plan.h"
#include "quick_keys.h"
#include "score.h"
#include "self_test.h"
#include "stream.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address, const char* name) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " is a null address");
  return reinterpret_cast<T*>(address);
}

void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

rheo::DType dtype_of(int dtype) {
  require(dtype >= 0 && dtype <= 2, "dtype is " + std::to_string(dtype) + "; legal: 0 fp32, 1 fp16, 2 bf16");
  return static_cast<rheo::DType>(dtype);
}

// (blocks, num_blocks, lists, counts, last_len, max_list)
using TierTuple = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, int>;
// (q, tiers, dtype, out, lse, (batch, kv_heads, group, dim), scale)
using AttentionTuple =
    std::tuple<uintptr_t, std::vector<TierTuple>, int, uintptr_t, uintptr_t, std::array<int, 4>, float>;

rheo::AttendArgs attend_args(const AttentionTuple& attention) {
  const auto& [q, tiers, dtype, out, lse, sizes, scale] = attention;
  const auto& [batch, kv_heads, group, dim] = sizes;
  rheo::AttendArgs args{};
  args.dtype = dtype_of(dtype);
  require(batch >= 0 && kv_heads >= 1, "a size is negative");
  require(group >= 1 && group <= rheo::kMaxGroup, "group is " + std::to_string(group) + "; legal: 1 to 16");
  require(dim >= rheo::kDimStep && dim <= rheo::kMaxDim && dim % rheo::kDimStep == 0,
          "dim is " + std::to_string(dim) + "; legal: multiples of 16 up to 256");
  require(!tiers.empty() && tiers.size() <= rheo::kMaxTiers,
          "tiers has " + std::to_string(tiers.size()) + " entries; legal: 1 or 2");
  args.batch = batch;
  args.kv_heads = kv_heads;
  args.group = group;
  args.dim = dim;
  args.scale = scale;
  args.num_tiers = static_cast<int>(tiers.size());
  if (batch == 0) return args;
  args.q = pointer<const float>(q, "q");
  args.out = pointer<float>(out, "out");
  args.lse = pointer<float>(lse, "lse");
  for (int t = 0; t < args.num_tiers; ++t) {
    const auto& [blocks, num_blocks, lists, counts, last_len, max_list] = tiers[t];
    require(num_blocks >= 0 && max_list >= 0, "a tier's size is negative");
    args.tiers[t] = {num_blocks == 0 ? nullptr : pointer<const void>(blocks, "blocks"), num_blocks,
                     max_list == 0 ? nullptr : pointer<const int32_t>(lists, "lists"),
                     pointer<const int32_t>(counts, "counts"), pointer<const int32_t>(last_len, "last_len"), max_list};
  }
  return args;
}

int check_threads(int threads) {
  require(threads >= 1 && threads <= 1024, "threads is " + std::to_string(threads) + "; legal: 1 to 1024");
  return threads;
}

class Workers {
 public:
  Workers(int threads, const std::string& variant)
      : variant_(rheo::choose_variant(variant)), pool_(check_threads(threads), {}) {}

  const char* variant() const { return variant_.name; }
  int threads() const { return pool_.size(); }
  rheo::ThreadPool& pool() { return pool_; }

  void attend(const AttentionTuple& attention) {
    const rheo::AttendArgs args = attend_args(attention);
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> one_caller(mutex_);
    rheo::attend(args, variant_, pool_, workspace_);
  }

  uint64_t stream_read(uintptr_t data, int64_t bytes) {
    require(bytes >= 0 && bytes % (1 << 20) == 0, "bytes is " + std::to_string(bytes) + "; legal: multiples of 1 MiB");
    py::gil_scoped_release release;
    return rheo::stream_read(pointer<const void>(data, "data"), bytes, pool_);
  }

  void keep_polling(bool on) { pool_.keep_polling(on); }

  void touch(uintptr_t data, int64_t bytes) {
    py::gil_scoped_release release;
    rheo::first_touch(pointer<void>(data, "data"), bytes, pool_);
  }

 private:
  const rheo::Variant& variant_;
  std::mutex mutex_;
  rheo::Workspace workspace_;
  rheo::ThreadPool pool_;
};

std::unique_ptr<rheo::Doorbell> make_doorbell(const std::vector<AttentionTuple>& attentions, uintptr_t batch, uintptr_t bell,
                                              int threads, const std::string& variant, const std::vector<int>& cpus,
                                              const py::object&) {
  std::vector<rheo::AttendArgs> all;
  for (const AttentionTuple& attention : attentions) all.push_back(attend_args(attention));
  require(bell % alignof(rheo::Bell) == 0, "bell is not at a multiple of 64 bytes");
  return std::make_unique<rheo::Doorbell>(std::move(all), pointer<const int32_t>(batch, "batch"),
                                          pointer<rheo::Bell>(bell, "bell"), rheo::choose_variant(variant),
                                          check_threads(threads), cpus);
}

rheo::PageTable table(uintptr_t pages, uintptr_t n_pages, int batch, int max_pages, int64_t all_pages) {
  require(batch >= 1 && max_pages >= 1 && all_pages >= 1, "a size of the page table is not positive");
  return {pointer<const int64_t>(pages, "pages"), pointer<const int32_t>(n_pages, "n_pages"), batch, max_pages, all_pages};
}

void plan(Workers& workers, int select, int sink_pages, int window_pages, int budget_pages, uintptr_t budgets, float log_threshold, bool selected_only,
          uintptr_t scores, uintptr_t pages, uintptr_t n_pages, uintptr_t tail_len, uintptr_t frame_of,
          const std::vector<uintptr_t>& outputs, uintptr_t chosen, int batch, int kv_heads, int max_pages, int64_t all_pages) {
  require(select >= 0 && select <= 3, "select is " + std::to_string(select) + "; legal: 0 to 3");
  require(outputs.size() == 6, "outputs has " + std::to_string(outputs.size()) + " addresses; expected 6");
  require(batch >= 0 && kv_heads >= 1 && max_pages >= 1 && all_pages >= 1, "a size is negative or zero");
  if (batch == 0) return;
  const auto kind = static_cast<rheo::Select>(select);
  const bool scored = kind == rheo::Select::kBudget || kind == rheo::Select::kThreshold;
  rheo::PlanArgs args;
  args.table = table(pages, n_pages, batch, max_pages, all_pages);
  args.scores = scored ? pointer<const float>(scores, "scores") : nullptr;
  args.budgets = reinterpret_cast<const int32_t*>(budgets);
  args.tail_len = pointer<const int32_t>(tail_len, "tail_len");
  args.frame_of = pointer<const int32_t>(frame_of, "frame_of");
  args.kv_heads = kv_heads;
  args.chosen = pointer<uint8_t>(chosen, "chosen");
  rheo::Visit* visits[2] = {&args.device, &args.host};
  for (int i = 0; i < 2; ++i)
    *visits[i] = {pointer<int32_t>(outputs[3 * i], "blocks"), pointer<int32_t>(outputs[3 * i + 1], "count"),
                  pointer<int32_t>(outputs[3 * i + 2], "last_len")};
  py::gil_scoped_release release;
  rheo::plan({kind, sink_pages, window_pages, budget_pages, log_threshold, selected_only}, args, workers.pool());
}

void score(Workers& workers, uintptr_t pages, uintptr_t n_pages, int batch, int max_pages, int64_t all_pages, uintptr_t gate_q,
           uintptr_t quick, uintptr_t scores, int kv_heads, int group, int key_dim, float scale) {
  require(key_dim % rheo::kDimStep == 0, "key_dim is " + std::to_string(key_dim) + "; legal: multiples of 16");
  const rheo::PageTable rows = table(pages, n_pages, batch, max_pages, all_pages);
  py::gil_scoped_release release;
  rheo::score(rows, pointer<const float>(gate_q, "gate_q"), pointer<const float>(quick, "quick"),
              pointer<float>(scores, "scores"), kv_heads, group, key_dim, scale, workers.pool());
}

void record(Workers& workers, uintptr_t pages, uintptr_t n_pages, int batch, int max_pages, int64_t all_pages, uintptr_t scores,
            uintptr_t chosen, uintptr_t importance, int kv_heads, float weight) {
  const rheo::PageTable rows = table(pages, n_pages, batch, max_pages, all_pages);
  py::gil_scoped_release release;
  rheo::record(rows, pointer<const float>(scores, "scores"), reinterpret_cast<const uint8_t*>(chosen),
               pointer<float>(importance, "importance"), kv_heads, weight, workers.pool());
}

void append(uintptr_t host, uintptr_t frames, uintptr_t frame_of, uintptr_t loc, uintptr_t k, uintptr_t v,
            int64_t k_stride, int64_t v_stride, int64_t tokens, int64_t all_pages, int kv_heads, int row) {
  if (tokens == 0) return;
  const rheo::AppendArgs args{pointer<char>(host, "host"), pointer<char>(frames, "frames"),
                              pointer<const int32_t>(frame_of, "frame_of"), pointer<const int64_t>(loc, "loc"),
                              pointer<const char>(k, "k"), pointer<const char>(v, "v"),
                              k_stride, v_stride, tokens, all_pages, kv_heads, row};
  py::gil_scoped_release release;
  rheo::append(args);
}

void check_dim(int dim) {
  require(dim >= 1 && dim <= rheo::kMaxDim, "dim is " + std::to_string(dim) + "; legal: 1 to 256");
}

void pool_keys(Workers& workers, int pooling, uintptr_t host, int dtype, uintptr_t pages, uintptr_t filled, uintptr_t quick, int64_t count,
               int64_t all_pages, int kv_heads, int dim) {
  require(pooling == 0 || pooling == 1, "pooling is " + std::to_string(pooling) + "; legal: 0 max and min, 1 mean");
  check_dim(dim);
  const rheo::DType kv_dtype = dtype_of(dtype);
  if (count == 0) return;
  const rheo::PoolKeysArgs args{pointer<const void>(host, "host"), pointer<const int64_t>(pages, "pages"),
                                pointer<const int32_t>(filled, "filled"), pointer<float>(quick, "quick"),
                                count, all_pages, kv_heads, dim, kv_dtype};
  py::gil_scoped_release release;
  rheo::pool_keys(static_cast<rheo::Pooling>(pooling), args, workers.pool());
}

// (weights, norm, rope, inputs, gate_dim, positions); 0 for what is left out
using ProjectionTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int, int, int64_t>;

rheo::Projection projection_of(const ProjectionTuple& projection) {
  const auto& [weights, norm, rope, inputs, gate_dim, positions] = projection;
  require(gate_dim >= 16 && gate_dim <= rheo::kMaxGateDim && gate_dim % 16 == 0,
          "gate_dim is " + std::to_string(gate_dim) + "; legal: multiples of 16 up to 256");
  return {reinterpret_cast<const float*>(weights), reinterpret_cast<const float*>(norm),
          reinterpret_cast<const float*>(rope), inputs, gate_dim, positions};
}

// indices: pages, token, requests, at [count] int64; fills: before, filled [count] int32
void gate_keys(Workers& workers, const ProjectionTuple& projection, uintptr_t plain, const std::array<uintptr_t, 4>& indices,
               const std::array<uintptr_t, 2>& fills, uintptr_t running, uintptr_t quick, int64_t tokens, int64_t count,
               int64_t slots, int64_t all_pages, int kv_heads, int dim, int parts) {
  const rheo::Projection p = projection_of(projection);
  check_dim(dim);
  require(parts >= 1 && parts <= 7, "parts is " + std::to_string(parts) + "; legal: 1 to 7");
  require(p.weights != nullptr && p.inputs == dim * __builtin_popcount(parts), "the weights do not fit the pooled keys");
  if (count == 0) return;
  const rheo::GateKeysArgs args{pointer<const float>(plain, "plain"), pointer<const int64_t>(indices[0], "pages"),
                                pointer<const int64_t>(indices[1], "token"), pointer<const int64_t>(indices[2], "requests"),
                                pointer<const int64_t>(indices[3], "at"), pointer<const int32_t>(fills[0], "before"),
                                pointer<const int32_t>(fills[1], "filled"), pointer<float>(running, "running"),
                                pointer<float>(quick, "quick"), tokens, count, slots, all_pages, kv_heads, dim, parts};
  py::gil_scoped_release release;
  rheo::gate_keys(p, args, workers.pool());
}

void gate_queries(Workers& workers, const ProjectionTuple& projection, uintptr_t plain, uintptr_t positions, uintptr_t out,
                  int batch, int kv_heads, int group, int dim) {
  const rheo::Projection p = projection_of(projection);
  check_dim(dim);
  require(p.weights == nullptr ? p.gate_dim == dim : p.inputs == dim || p.inputs == group * dim,
          "the weights do not fit the queries");
  if (batch == 0) return;
  py::gil_scoped_release release;
  rheo::gate_queries(p, pointer<const float>(plain, "plain"), pointer<const int64_t>(positions, "positions"),
                     pointer<float>(out, "out"), batch, kv_heads, group, dim, workers.pool());
}

std::vector<std::string> cpu_variants() {
  std::vector<std::string> names;
  for (const rheo::Variant* variant : rheo::runnable_variants()) names.emplace_back(variant->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "RheoServe's CPU kernels.";
  m.attr("BLOCK_TOKENS") = rheo::kBlockTokens;
  m.def("self_test", [](const std::string& variant) { rheo::self_test(rheo::choose_variant(variant)); },
        "Compares a variant with the scalar one on small inputs.");
  m.def("cpu_variants", &cpu_variants, "Variants this machine can run, best first.");
  m.def(
      "interleave", [](uintptr_t data, size_t bytes) { return rheo::interleave(pointer<void>(data, "data"), bytes); },
      "Spreads untouched memory over the NUMA nodes; returns how many there are.");
  m.def("append", &append, "Writes new tokens into the host store and into resident frames.");
  py::class_<Workers>(m, "Workers", "A worker pool and a kernel variant.")
      .def(py::init<int, const std::string&>(), py::arg("threads"), py::arg("variant") = "")
      .def_property_readonly("variant", &Workers::variant)
      .def_property_readonly("threads", &Workers::threads)
      .def("plan", &plan, "Selection of blocks and its split by residency.", py::kw_only(), py::arg("select"),
           py::arg("sink_pages"), py::arg("window_pages"), py::arg("budget_pages"), py::arg("budgets"), py::arg("log_threshold"),
           py::arg("selected_only"), py::arg("scores"), py::arg("pages"), py::arg("n_pages"), py::arg("tail_len"),
           py::arg("frame_of"), py::arg("outputs"), py::arg("chosen"), py::arg("batch"), py::arg("kv_heads"), py::arg("max_pages"),
           py::arg("all_pages"))
      .def("score", &score, "Gate scores over a page table.")
      .def("record", &record, "Accumulates gate scores and selections into the importance of blocks.")
      .def("pool_keys", &pool_keys, "Gate keys of pages, pooled from their stored K.")
      .def("gate_keys", &gate_keys, "Keys of the learned gate for pages that tokens were written to.")
      .def("gate_queries", &gate_queries, "Queries of the learned gate.")
      .def("stream_read", &Workers::stream_read, py::arg("data"), py::arg("bytes"),
           "Reads memory on all threads, and sums it: the rate that attention is measured against.")
      .def("keep_polling", &Workers::keep_polling, py::arg("on"),
           "Whether idle threads poll for work instead of sleeping, as between a decode step's requests.")
      .def("touch", &Workers::touch, py::arg("data"), py::arg("bytes"),
           "Writes zeros to memory that is zero already, so that all its pages are mapped.")
      .def("attend", &Workers::attend, "Attention over listed blocks.", py::arg("attention"));
  py::class_<rheo::Doorbell>(m, "Doorbell", "A worker pool that is asked through memory.")
      .def(py::init(&make_doorbell), py::arg("attentions"), py::arg("batch"), py::arg("bell"), py::arg("threads"),
           py::arg("variant"), py::arg("cpus"), py::arg("memory"),
           py::keep_alive<1, 8>())  // `memory` lives until the threads have ended
      .def("expect", &rheo::Doorbell::expect, "Requests that will come.", py::arg("count"))
      .def("busy_seconds", &rheo::Doorbell::busy_seconds, "Time it took to answer all requests so far.")
      .def("failure", &rheo::Doorbell::failure, "The first failure, or an empty string.");
  m.attr("BELL_BYTES") = sizeof(rheo::Bell);
  m.attr("BELL_STRIDE") = offsetof(rheo::Bell, answered);
}
