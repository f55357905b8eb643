#include "doorbell.h"

#include <chrono>
#include <stdexcept>

namespace rheo {
namespace {

using Time = std::chrono::microseconds;

// A request that is expected comes within a step's time; after this long the threads sleep between looks.
constexpr Time kPatience = std::chrono::seconds(2), kNap = std::chrono::milliseconds(1);
// The same as long as the step that asks has not begun. One that follows right after another has within this time: from
// a step's last question on there are still its last layer, the logits of a large vocabulary, sampling and swaps.
constexpr Time kBetweenSteps = std::chrono::milliseconds(5), kDoze(200);
constexpr int kPollsPerClock = 256;  // reading the clock costs more than a look

}  // namespace

Doorbell::Doorbell(std::vector<AttendArgs> attentions, const int32_t* batch, Bell* bell, const Variant& variant,
                   int threads, const std::vector<int>& cpus)
    : attentions_(std::move(attentions)), batch_(batch), bell_(bell), variant_(variant), pool_(threads, cpus) {
  if (attentions_.empty()) throw std::invalid_argument("a doorbell needs at least one attention");
  expected_.store(bell_->answered.load());
  server_ = std::thread([this] { serve(); });
  try {
    if (!cpus.empty()) pin(server_, cpus[0]);
  } catch (...) {
    stop();  // a constructor that throws runs no destructor
    throw;
  }
}

Doorbell::~Doorbell() { stop(); }

void Doorbell::stop() {
  stop_.store(true);
  expect(1);  // wakes the server
  server_.join();
}

void Doorbell::expect(uint64_t count) {
  expected_.fetch_add(count, std::memory_order_release);
  expected_.notify_one();
}

double Doorbell::busy_seconds() const { return 1e-9 * static_cast<double>(busy_ns_.load(std::memory_order_relaxed)); }

std::string Doorbell::failure() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

bool Doorbell::awaits_request() const {
  return bell_->asked.load(std::memory_order_acquire) <= bell_->answered.load(std::memory_order_relaxed);
}

// Requests of the step that began last are up to as many as there are attentions after `begun`.
bool Doorbell::has_begun(uint64_t answered) const {
  return bell_->begun.load(std::memory_order_acquire) + attentions_.size() > answered;
}

void Doorbell::serve() {
  for (;;) {
    // In this order: who stops it says so before it raises the number, whose old value is waited on below.
    const uint64_t expected = expected_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    const uint64_t answered = bell_->answered.load(std::memory_order_relaxed);
    if (expected <= answered) {
      pool_.keep_polling(false);
      expected_.wait(expected, std::memory_order_acquire);
      continue;
    }
    pool_.keep_polling(true);
    auto since = std::chrono::steady_clock::now();
    bool patient = true, begun = has_begun(answered);
    for (int polls = 0; awaits_request() && !stop_.load(std::memory_order_relaxed);) {
      if (!begun && has_begun(answered)) {
        pool_.keep_polling(begun = patient = true);
        since = std::chrono::steady_clock::now();
      }
      if (!patient) std::this_thread::sleep_for(begun ? kNap : kDoze);
      else if (++polls % kPollsPerClock != 0) relax();
      else if (std::chrono::steady_clock::now() - since > (begun ? kPatience : kBetweenSteps))
        pool_.keep_polling(patient = false);
    }
    if (!stop_.load()) answer(bell_->asked.load(std::memory_order_acquire));
  }
}

void Doorbell::answer(uint64_t number) {
  const auto began = std::chrono::steady_clock::now();
  try {
    AttendArgs args = attentions_[(number - 1) % attentions_.size()];
    const int most = args.batch;
    args.batch = *batch_;
    if (args.batch < 0 || args.batch > most)
      throw std::out_of_range("batch " + std::to_string(args.batch) + " is not in [0, " + std::to_string(most) + "]");
    attend(args, variant_, pool_, workspace_);
  } catch (const std::exception& error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.empty()) {
      const uint64_t layer = (number - 1) % attentions_.size();
      failure_ = "layer " + std::to_string(layer) + ", request " + std::to_string(number) + ": " + error.what();
      bell_->failed.store(number, std::memory_order_release);
    }
  }
  const auto took = std::chrono::steady_clock::now() - began;
  busy_ns_.fetch_add(std::chrono::nanoseconds(took).count(), std::memory_order_relaxed);
  bell_->answered.store(number, std::memory_order_release);
}

}  // namespace rheo
