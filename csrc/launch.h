// The launchers: what ops.cpp calls once tensors have been checked. Both devices implement the same functions;
// they know pointers and sizes, not tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "adahessian_math.h"
#include "dtypes.h"

namespace adahessian {

// One row of the segment table (adahessian_fused/segments.py explains the fields) with its tensors' addresses.
struct Segment {
  int64_t offset;
  int64_t numel;
  int64_t block;
  int64_t period;
  int64_t stride;
  int64_t diag_offset;
  int64_t slot;
  uint32_t param_id;
  int32_t group;
  bool absolute;
  void* param;          // adahessian_step and perturb only
  const void* grad;     // adahessian_step only
  const void* hessian;  // null: no curvature, or it comes from the compact diagonal
};

// Where a launch runs. On the CPU `parallel_for(begin, end, grain, body)` is the caller's thread pool; on a GPU
// `stream` is a cudaStream_t and the caller has made `device` current. `allocate(size)` gives memory of the device that
// stays valid until the work this call puts on the stream has finished; `upload(bytes, size)` such memory with these
// bytes in it, which may have been there before. Without `upload`, tables travel in the arguments of kernels.
struct Context {
  std::function<void(int64_t, int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)> parallel_for;
  std::function<void*(size_t)> allocate;
  std::function<const void*(const void*, size_t)> upload;
  int device = -1;
  void* stream = nullptr;
};

struct Probe {
  uint64_t seed;
  uint32_t sample;
  bool is_hvp;  // multiply by z; otherwise the input already is D
};

// int64 (step, hessian_step) for each slot, before this step. On a GPU either may live on the device (capturable).
struct Counts {
  const int64_t* steps;
  bool on_device;
};

struct RademacherArgs {
  Dtype dtype;
  void* z;
  std::vector<Segment> segments;
  Counts counts;
  Probe probe;
};

struct PerturbArgs {
  Dtype dtype;
  void* saved;  // flat buffer of the parameters' dtype
  std::vector<Segment> segments;
  Counts counts;
  Probe probe;
  double scale;  // 0: put the saved values back
  bool save;     // first take the parameters down in `saved`
};

struct HessianDiagArgs {
  Dtype dtype;  // of the Hessian-vector products
  void* diag;
  std::vector<Segment> segments;
  Counts counts;
  Probe probe;
  double scale;
  bool accumulate;
};

struct AdaHessianStepArgs {
  Dtype dtype;        // of parameters, gradients and Hessian-vector products
  Dtype state_dtype;  // of exp_avg and exp_hessian_diag_sq: what is computed in, or bfloat16, rounded stochastically
  std::vector<Segment> segments;
  const void* diag;  // compact diagonal, or null
  void* exp_avg;
  void* exp_hessian_diag_sq;
  float* master;  // or null
  Counts counts;
  const double* groups;  // rows of Hyper; on the device if counts.on_device
  int64_t n_groups;
  Probe probe;
  const float* grad_scale;  // scalars in the memory of the device the kernels run on, or null
  const float* found_inf;
  uint64_t rounding_seed;
  const double* means;  // of v_hat, for each slot, or null: in the memory of the device
  int64_t* missed;      // for each slot, increased by the elements that v could not take Ds in for, or null: likewise
};

namespace cpu {
void rademacher(const RademacherArgs& args, const Context& context);
void perturb(const PerturbArgs& args, const Context& context);
void hessian_diag(const HessianDiagArgs& args, const Context& context);
void adahessian_step(const AdaHessianStepArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void rademacher(const RademacherArgs& args, const Context& context);
void perturb(const PerturbArgs& args, const Context& context);
void hessian_diag(const HessianDiagArgs& args, const Context& context);
void adahessian_step(const AdaHessianStepArgs& args, const Context& context);
}  // namespace cuda

// The CUDA kernels' bodies executed thread by thread on the host, so that their indexing is tested without a GPU.
namespace emulated {
void rademacher(const RademacherArgs& args, const Context& context);
void perturb(const PerturbArgs& args, const Context& context);
void hessian_diag(const HessianDiagArgs& args, const Context& context);
void adahessian_step(const AdaHessianStepArgs& args, const Context& context);
}  // namespace emulated

}  // namespace adahessian
