#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <system_error>

namespace rheo {
namespace {

constexpr int kCountShift = 24, kRoundShift = 48;
constexpr uint64_t kField = (uint64_t{1} << 24) - 1;
// The caller polls this often for the last tasks before it sleeps: some tens of microseconds, about what
// waking up would cost.
constexpr int kPolls = 2000;
// A worker polls this often for the next round before it sleeps.
constexpr int kIdlePolls = 1000;

}  // namespace

void pin(std::thread& thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  const int error = pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
  if (error != 0) throw std::system_error(error, std::generic_category(), "cannot pin a worker to processor " + std::to_string(cpu));
}

ThreadPool::ThreadPool(int threads, const std::vector<int>& cpus) {
  try {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this] { work(); });
      if (!cpus.empty()) pin(workers_.back(), cpus[i % cpus.size()]);
    }
  } catch (...) {
    stop();  // a constructor that throws runs no destructor
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run(int count, const Work& task, int first) {
  if (count <= 0) return;
  if (count > kMaxTasks) throw std::length_error("too many tasks for one round: " + std::to_string(count));
  std::lock_guard<std::mutex> one_caller(caller_);
  task_ = &task;
  error_ = nullptr;
  done_.store(0, std::memory_order_relaxed);
  first_.store(count < 2 * size() ? 1 : first, std::memory_order_relaxed);
  tickets_.store(++round_ << kRoundShift | static_cast<uint64_t>(count) << kCountShift, std::memory_order_release);
  // Waking a thread costs more than a task is worth when there is only one.
  if (count > 1 && !workers_.empty()) {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  drain();
  for (int polls = 0;;) {
    const int done = done_.load(std::memory_order_acquire);
    if (done == count) break;
    if (++polls < kPolls) relax();
    else done_.wait(done, std::memory_order_acquire);
  }
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::keep_polling(bool on) {
  // (Writing what has not changed would take the line from those that poll.)
  if (polling_.load(std::memory_order_relaxed) == on || polling_.exchange(on) || !on) return;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
}

void ThreadPool::work() {
  for (;;) {
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    drain();
    for (int polls = 0; epoch_.load(std::memory_order_relaxed) == epoch; relax()) {
      if (polls < kIdlePolls) ++polls;
      else if (!polling_.load(std::memory_order_relaxed)) break;
    }
    // (Waiting counts the waiters, on one line for all, even where nothing is to be waited for.)
    if (epoch_.load(std::memory_order_relaxed) == epoch) epoch_.wait(epoch, std::memory_order_acquire);
  }
}

ThreadPool::Ticket ThreadPool::draw(int some) {
  uint64_t ticket = tickets_.load(std::memory_order_relaxed);
  const auto count_of = [](uint64_t of) { return static_cast<int>(of >> kCountShift & kField); };
  const auto index_of = [](uint64_t of) { return static_cast<int>(of & kField); };
  // Not drawing where there is nothing keeps the index within its field, however often threads look.
  if (index_of(ticket) >= count_of(ticket)) return {-1, Next::kUndrawn, 0};
  ticket = tickets_.fetch_add(some, std::memory_order_acq_rel);
  const int count = count_of(ticket), index = index_of(ticket);
  return {index < count ? index : -1, some == 2 && index + 1 < count ? index + 1 : Next::kUndrawn, count};
}

void ThreadPool::drain() {
  // All tickets of a thread are of one round, which cannot end before this thread tells what it did.
  const Ticket first = draw(first_.load(std::memory_order_relaxed));
  int now = first.index, known = first.next, done = 0;
  while (now >= 0) {
    Next next(*this, known);
    known = Next::kUndrawn;
    try {
      (*task_)(now, next);
    } catch (...) {
      std::lock_guard<std::mutex> lock(failure_);
      if (!error_) error_ = std::current_exception();
    }
    ++done;
    now = next();
  }
  if (done > 0 && done_.fetch_add(done, std::memory_order_acq_rel) + done == first.count) done_.notify_one();
}

}  // namespace rheo
