// parallel_for on threads that wait for work, in the place of torch's.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace adahessian::test {

class Threads {
 public:
  using Body = std::function<void(int64_t, int64_t)>;

  explicit Threads(int count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Threads() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  Threads(const Threads&) = delete;

  // One contiguous part of [begin, end) a thread, none shorter than `grain` but the last.
  void run(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    if (begin >= end) return;
    const int64_t n = int64_t(workers_.size()) + 1;
    {
      const std::lock_guard lock(mutex_);
      begin_ = begin, end_ = end, body_ = &body;
      part_ = std::max((end - begin + n - 1) / n, std::max<int64_t>(grain, 1));
      waiting_ = int(workers_.size());
      ++round_;
    }
    start_.notify_all();
    take_part(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return waiting_ == 0; });
  }

 private:
  void take_part(int64_t i) const {
    const int64_t begin = begin_ + i * part_;
    if (begin < end_) (*body_)(begin, std::min(begin + part_, end_));
  }

  void work(int i) {
    for (int64_t seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        start_.wait(lock, [&] { return stop_ || round_ != seen; });
        if (stop_) return;
        seen = round_;
      }
      take_part(i);
      const std::lock_guard lock(mutex_);
      if (--waiting_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const Body* body_ = nullptr;
  int64_t begin_ = 0, end_ = 0, part_ = 1, round_ = 0;
  int waiting_ = 0;
  bool stop_ = false;
};

}  // namespace adahessian::test
