// The worker pool driven without Python: requests and answers are numbers in memory that a GPU maps too.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "block_attention.h"
#include "thread_pool.h"

namespace rheo {

// Request n (1, 2, 3, ...) is for attention number (n - 1) modulo how many there are: the layers of a step in turn.
// Whoever asks fills what the attention points to, then writes n to `asked`, with no request still unanswered; the
// results are there when `answered` is n. Numbers may be passed over: those requests count as answered. A request with
// nothing to visit need not be waited for: what is written meanwhile is read again for the next one. A request that fails
// is answered too; `failed` is the number of the first. Requests are expected long before they come where other work is
// in front of the step that asks: whoever asks may write to `begun`, as a step begins, the number of the last request
// before it. Until then the threads sleep. (INT64_MAX: all have begun.)
struct Bell {
  alignas(64) std::atomic<uint64_t> asked;
  alignas(64) std::atomic<uint64_t> answered;
  alignas(64) std::atomic<uint64_t> failed;
  alignas(64) std::atomic<uint64_t> begun;
};

class Doorbell {
 public:
  // The first thread of the pool, pinned to cpus[0], waits for requests; `batch` is read at each request and may
  // change from one to the next. All pointers must stay valid. Throws as ThreadPool does.
  Doorbell(std::vector<AttendArgs> attentions, const int32_t* batch, Bell* bell, const Variant& variant, int threads,
           const std::vector<int>& cpus);
  ~Doorbell();
  Doorbell(const Doorbell&) = delete;
  Doorbell& operator=(const Doorbell&) = delete;

  // Says that `count` more requests will come. Threads poll for these, and sleep at other times.
  void expect(uint64_t count);

  // How long it took to answer all requests so far.
  double busy_seconds() const;

  // The first failure, as text; empty if there was none.
  std::string failure();

 private:
  void stop();
  void serve();
  void answer(uint64_t number);
  bool awaits_request() const;
  bool has_begun(uint64_t answered) const;

  const std::vector<AttendArgs> attentions_;
  const int32_t* batch_;
  Bell* bell_;
  const Variant& variant_;
  ThreadPool pool_;
  Workspace workspace_;
  std::atomic<uint64_t> expected_{0};
  std::atomic<int64_t> busy_ns_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::string failure_;
  std::thread server_;
};

}  // namespace rheo
