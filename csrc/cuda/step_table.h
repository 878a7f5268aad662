// What the kernel of adahessian_step is given: rows of parameters and the arguments they share.
#pragma once

#include "probe.h"
#include "rounding.h"
#include "table.h"

namespace adahessian::gpu {

// Where a parameter's Ds comes from.
enum class DiagonalSource : uint16_t {
  kNone,         // an off-step
  kElementwise,  // Hz, blocks of one element: only D^2 = Hz^2 enters
  kBlocks,       // Hz, averaged here
  kDiag,         // the compact diagonal, blocks of one element in storage order
  kDiagBlocks,   // the compact diagonal, a lookup for each element
  kUniform       // the compact diagonal, one block for the whole tile
};

// Whether the means of a tile's blocks are in shared memory.
ADAHESSIAN_HD bool averages(DiagonalSource curvature) {
  return curvature == DiagonalSource::kBlocks || curvature == DiagonalSource::kDiagBlocks;
}

struct StepRow {
  static constexpr uint16_t kParamAligned = 1;
  static constexpr uint16_t kGradAligned = 2;
  static constexpr uint16_t kHessianAligned = 4;
  static constexpr uint16_t kDiagAligned = 8;
  static constexpr uint16_t kStateAligned = 16;
  static constexpr uint16_t kAbsolute = 32;
  static constexpr uint16_t kAllAligned = 64;
  Geometry geometry;
  void* param;
  const void* grad;
  const void* hessian;
  const void* diag;  // at the parameter's first block
  int64_t offset;    // in the flat buffers
  ProbeRow probe;
  uint32_t group;  // if the step counts are on the device
  uint32_t first_tile;
  uint32_t constant;  // if the step counts are on the host
  DiagonalSource curvature;
  uint16_t flags;
};

template <typename S>
struct StepConstant {
  Coefficients<S> coefficients;
  ProbeConstant probe;
};

// S: the type of all arithmetic; M: what the states are stored in.
template <typename S, typename M>
struct StepArguments {
  using TableType = Table<StepRow, StepConstant<S>, 24>;
  M* exp_avg;
  M* exp_hessian_diag_sq;
  float* master;
  const Hyper* groups;        // these two null if the step counts are on the host
  StepConstant<S>* computed;  // by ConstantsBody, one for each row
  const float* grad_scale;
  const float* found_inf;
  const double* means;  // or null
  int64_t* missed;      // or null
  RoundingKeys rounding_keys;
  ProbeSource probe;
  TableType table;
};

}  // namespace adahessian::gpu
