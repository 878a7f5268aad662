// The GPU as the planning code sees it: launches of kernel bodies on a stream and uploads of tables.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../launch.h"
#include "geometry.h"

namespace adahessian::gpu {

// Runs the phases of a body as one thread of a thread block.
template <class Thread>
struct ThreadExecutor {
  Thread state;

  template <class Phase>
  __device__ __forceinline__ void last(const Phase& phase) {
    phase(int(threadIdx.x), state);
  }
  template <class Phase>
  __device__ __forceinline__ void phase(const Phase& phase) {
    last(phase);
    __syncthreads();
  }
};

template <class Body>
__global__ void __launch_bounds__(kThreads, Body::kBlocksPerSm)
    tile_kernel(const __grid_constant__ typename Body::Arguments arguments) {
  __shared__ typename Body::Shared shared;
  ThreadExecutor<typename Body::Thread> executor;
  run(Body{}, executor, arguments, shared, blockIdx.x);
}

class CudaDevice {
 public:
  CudaDevice(const char* op, const Context& context)
      : op_(op), context_(context), stream_(static_cast<cudaStream_t>(context.stream)) {}

  template <class Body>
  void launch(const typename Body::Arguments& arguments, uint32_t tiles);

  bool can_upload() {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &status));
    return status == cudaStreamCaptureStatusNone && context_.upload;
  }

  template <class Row>
  const Row* upload(const std::vector<Row>& rows) {
    return static_cast<const Row*>(context_.upload(rows.data(), rows.size() * sizeof(Row)));
  }

  void* allocate(size_t bytes) { return context_.allocate(bytes); }

 private:
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the exception reports it; whoever calls CUDA next must not find it again
    throw std::runtime_error(std::string(op_) + ": " + cudaGetErrorString(error));
  }

  const char* op_;
  const Context& context_;
  cudaStream_t stream_;
};

template <class Body>
void CudaDevice::launch(const typename Body::Arguments& arguments, uint32_t tiles) {
  void* list[] = {const_cast<void*>(static_cast<const void*>(&arguments))};
  const void* kernel = reinterpret_cast<const void*>(&tile_kernel<Body>);
  check(cudaLaunchKernel(kernel, dim3(tiles), dim3(kThreads), list, 0, stream_));
}

}  // namespace adahessian::gpu
