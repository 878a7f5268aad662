// The GPU as the planning code sees it, on the host, for tests where there is no GPU: kernel bodies run tile by tile,
// phase by phase, thread by thread. Planning, table and indexing are the GPU's. Shared memory and registers begin as
// NaNs, and the threads run forwards and backwards in turn, so that a missing barrier or an uninitialised value shows.
#pragma once

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../launch.h"
#include "geometry.h"

namespace adahessian::gpu {

template <class Object>
void poison(Object& object) {
  static_assert(std::is_trivially_copyable_v<Object>, "shared memory and registers hold plain data");
  std::memset(static_cast<void*>(&object), 0xFF, sizeof(object));
}

// Runs the phases of a body for all threads of a thread block.
template <class Thread>
class BlockExecutor {
 public:
  void start(bool backwards) {
    backwards_ = backwards;
    for (Thread& state : states_) poison(state);
  }

  template <class Phase>
  void phase(const Phase& phase) {
    for (int i = 0; i < kThreads; ++i) {
      const int thread = backwards_ ? kThreads - 1 - i : i;
      phase(thread, states_[size_t(thread)]);
    }
  }
  template <class Phase>
  void last(const Phase& last_phase) {
    phase(last_phase);
  }

 private:
  std::vector<Thread> states_ = std::vector<Thread>(kThreads);
  bool backwards_ = false;
};

class EmulatedDevice {
 public:
  explicit EmulatedDevice(const Context& context) : context_(context) {}

  int launches = 0;

  template <class Body>
  void launch(const typename Body::Arguments& arguments, uint32_t tiles) {
    ++launches;
    const auto shared = std::make_unique<typename Body::Shared>();
    BlockExecutor<typename Body::Thread> executor;
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      poison(*shared);
      executor.start(tile % 2 == 1);
      run(Body{}, executor, arguments, *shared, tile);
    }
  }

  // Without, the tables take the way they take during stream capture.
  bool can_upload() const { return bool(context_.upload); }

  template <class Row>
  const Row* upload(const std::vector<Row>& rows) {
    return static_cast<const Row*>(context_.upload(rows.data(), rows.size() * sizeof(Row)));
  }

  void* allocate(size_t bytes) { return context_.allocate(bytes); }

 private:
  const Context& context_;
};

}  // namespace adahessian::gpu
