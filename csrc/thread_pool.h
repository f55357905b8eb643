// A fixed set of worker threads that run indexed tasks. The caller works too.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace rheo {

class ThreadPool {
 public:
  static constexpr int kMaxTasks = (1 << 24) - 2048;

  // `threads` counts the caller: a pool of 1 starts no thread. Worker i is pinned to cpus[i]; an empty list
  // leaves placement to the system. Throws std::system_error for a processor the process may not use.
  ThreadPool(int threads, const std::vector<int>& cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // What the same thread will do next, or -1. It is drawn when a task asks, so that its memory can be fetched before the
  // task ends, and else when it has ended: what a slow thread holds long before it can begin, the others wait for.
  class Next {
   public:
    Next(ThreadPool& pool, int known) : pool_(pool), index_(known) {}
    int operator()() {
      if (index_ == kUndrawn) index_ = pool_.draw(1).index;
      return index_;
    }
    static constexpr int kUndrawn = -2;

   private:
    ThreadPool& pool_;
    int index_;
  };

  using Work = std::function<void(int index, Next& next)>;

  // Calls task once for every index in [0, count), roughly in order, and returns when all are
  // done. A thread that has done nothing yet takes `first`, one or two, in a row (two only where there are as many for
  // each), all others one after another. One caller at a time; a second one waits. The first exception is rethrown.
  void run(int count, const Work& task, int first = 2);

  // While on, idle workers poll instead of sleeping: for the time that work is about to come.
  void keep_polling(bool on);

 private:
  void stop();
  void work();
  struct Ticket {
    int index;  // -1 where the round has none left
    int next;   // the one drawn with it, or kUndrawn
    int count;  // of the round
  };
  Ticket draw(int some);
  void drain();

  std::vector<std::thread> workers_;
  std::mutex caller_, failure_;
  // The round, its number of tasks and the next one to hand out, in one word (16, 24 and 24 bits): a worker
  // that comes late to a finished round draws a number past its end, whatever the caller does meanwhile.
  alignas(64) std::atomic<uint64_t> tickets_{0};
  std::atomic<int> first_{2};  // how many a thread draws at first: to no harm where it is another round's
  alignas(64) std::atomic<int> done_{0};
  // Idle workers poll this line, and nothing else of it is written while they do.
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stop_{false}, polling_{false};
  alignas(64) const Work* task_ = nullptr;  // read only with a valid ticket
  std::exception_ptr error_;
  uint64_t round_ = 0;
};

// Calls body(i) for every i in [0, count) on the pool's threads, several to a task where one is too little work to
// wake a thread for. `cost` of one is in multiplications, roughly.
template <class Body>
void for_each(ThreadPool& pool, int count, int64_t cost, const Body& body) {
  constexpr int64_t kWorthATask = 1 << 16;
  const int64_t wanted = cost < kWorthATask ? kWorthATask / (cost > 0 ? cost : 1) : 1;
  const int step = wanted < count ? static_cast<int>(wanted) : (count > 0 ? count : 1);
  pool.run((count + step - 1) / step, [&](int task, ThreadPool::Next&) {
    const int end = (task + 1) * step < count ? (task + 1) * step : count;
    for (int i = task * step; i < end; ++i) body(i);
  });
}

// Throws std::system_error for a processor the process may not use.
void pin(std::thread& thread, int cpu);

// Tells the processor that this is a polling loop.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace rheo
