// Python bindings. Tensors cross as addresses and shapes, so that neither torch nor CUDA is
// needed to build; rheoserve_sgl/ops checks dtypes and contiguity before it takes an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "block_attention.h"
#include "cpu_features.h"
#include "plan.h"
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

class Attention {
 public:
  Attention(int threads, const std::string& variant) : variant_(rheo::choose_variant(variant)) {
    require(threads >= 1 && threads <= 1024, "threads is " + std::to_string(threads) + "; legal: 1 to 1024");
    pool_ = std::make_unique<rheo::ThreadPool>(threads);
  }

  const char* variant() const { return variant_.name; }
  int threads() const { return pool_->size(); }

  void attend(uintptr_t q, uintptr_t blocks, int64_t num_blocks, int dtype, uintptr_t lists, uintptr_t counts,
              uintptr_t last_len, uintptr_t out, uintptr_t lse, int batch, int kv_heads, int group, int dim,
              int max_list, float scale) {
    require(dtype >= 0 && dtype <= 2, "dtype is " + std::to_string(dtype) + "; legal: 0 fp32, 1 fp16, 2 bf16");
    require(batch >= 0 && kv_heads >= 1 && max_list >= 0 && num_blocks >= 0, "a size is negative");
    require(group >= 1 && group <= rheo::kMaxGroup, "group is " + std::to_string(group) + "; legal: 1 to 16");
    require(dim >= rheo::kDimStep && dim <= rheo::kMaxDim && dim % rheo::kDimStep == 0,
            "dim is " + std::to_string(dim) + "; legal: multiples of 16 up to 256");
    if (batch == 0) return;
    rheo::AttendArgs args;
    args.q = pointer<const float>(q, "q");
    args.blocks = num_blocks == 0 ? nullptr : pointer<const void>(blocks, "blocks");
    args.lists = max_list == 0 ? nullptr : pointer<const int32_t>(lists, "lists");
    args.counts = pointer<const int32_t>(counts, "counts");
    args.last_len = pointer<const int32_t>(last_len, "last_len");
    args.out = pointer<float>(out, "out");
    args.lse = pointer<float>(lse, "lse");
    args.num_blocks = num_blocks;
    args.batch = batch;
    args.kv_heads = kv_heads;
    args.group = group;
    args.dim = dim;
    args.max_list = max_list;
    args.scale = scale;
    args.dtype = static_cast<rheo::DType>(dtype);
    py::gil_scoped_release release;
    rheo::attend(args, variant_, *pool_);
  }

 private:
  const rheo::Variant& variant_;
  std::unique_ptr<rheo::ThreadPool> pool_;
};

void merge(uintptr_t out_a, uintptr_t lse_a, uintptr_t out_b, uintptr_t lse_b, uintptr_t out, uintptr_t lse,
           int64_t rows, int dim) {
  if (rows == 0) return;
  py::gil_scoped_release release;
  rheo::merge(pointer<const float>(out_a, "out_a"), pointer<const float>(lse_a, "lse_a"),
              pointer<const float>(out_b, "out_b"), pointer<const float>(lse_b, "lse_b"),
              pointer<float>(out, "out"), pointer<float>(lse, "lse"), rows, dim);
}

void plan(int select, int sink_pages, int window_pages, int budget_pages, float log_threshold, bool selected_only,
          uintptr_t scores, uintptr_t pages, uintptr_t n_pages, uintptr_t tail_len, uintptr_t frame_of,
          const std::vector<uintptr_t>& outputs, int batch, int kv_heads, int max_pages, int64_t all_pages) {
  require(select >= 0 && select <= 3, "select is " + std::to_string(select) + "; legal: 0 to 3");
  require(outputs.size() == 6, "outputs has " + std::to_string(outputs.size()) + " addresses; expected 6");
  require(batch >= 0 && kv_heads >= 1 && max_pages >= 1 && all_pages >= 1, "a size is negative or zero");
  if (batch == 0) return;
  const auto kind = static_cast<rheo::Select>(select);
  const bool scored = kind == rheo::Select::kBudget || kind == rheo::Select::kThreshold;
  rheo::PlanArgs args;
  args.scores = scored ? pointer<const float>(scores, "scores") : nullptr;
  args.pages = pointer<const int64_t>(pages, "pages");
  args.n_pages = pointer<const int32_t>(n_pages, "n_pages");
  args.tail_len = pointer<const int32_t>(tail_len, "tail_len");
  args.frame_of = pointer<const int32_t>(frame_of, "frame_of");
  args.batch = batch;
  args.kv_heads = kv_heads;
  args.max_pages = max_pages;
  args.all_pages = all_pages;
  rheo::Visit* visits[2] = {&args.device, &args.host};
  for (int i = 0; i < 2; ++i)
    *visits[i] = {pointer<int32_t>(outputs[3 * i], "blocks"), pointer<int32_t>(outputs[3 * i + 1], "count"),
                  pointer<int32_t>(outputs[3 * i + 2], "last_len")};
  py::gil_scoped_release release;
  rheo::plan({kind, sink_pages, window_pages, budget_pages, log_threshold, selected_only}, args);
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
  m.def("cpu_variants", &cpu_variants, "Variants this machine can run, best first.");
  m.def("merge", &merge, "Log-sum-exp merge of two partial attentions.");
  m.def("plan", &plan, "Selection of blocks and its split by residency.", py::kw_only(), py::arg("select"),
        py::arg("sink_pages"), py::arg("window_pages"), py::arg("budget_pages"), py::arg("log_threshold"),
        py::arg("selected_only"), py::arg("scores"), py::arg("pages"), py::arg("n_pages"), py::arg("tail_len"),
        py::arg("frame_of"), py::arg("outputs"), py::arg("batch"), py::arg("kv_heads"), py::arg("max_pages"),
        py::arg("all_pages"));
  py::class_<Attention>(m, "Attention", "A worker pool and a kernel variant.")
      .def(py::init<int, const std::string&>(), py::arg("threads"), py::arg("variant") = "")
      .def_property_readonly("variant", &Attention::variant)
      .def_property_readonly("threads", &Attention::threads)
      .def("attend", &Attention::attend, py::kw_only(), py::arg("q"), py::arg("blocks"), py::arg("num_blocks"),
           py::arg("dtype"), py::arg("lists"), py::arg("counts"), py::arg("last_len"), py::arg("out"), py::arg("lse"),
           py::arg("batch"), py::arg("kv_heads"), py::arg("group"), py::arg("dim"), py::arg("max_list"),
           py::arg("scale"));
}
