// The launchers of the double backward of normalisations; adahessian_fused/friendly/formulas.py has the formulas.
#pragma once

#include <cstdint>

#include "launch.h"

namespace adahessian {

// Cotangents, parameters and statistics are float32, for float64 inputs float64; the tensors of x's shape are of
// `dtype`.
struct NormTensors {
  const void* v;  // cotangent of the input's gradient
  const void* grad;
  const void* x;
  const void* v_weight;  // one for each weight, or null for 0
  const void* v_bias;    // likewise
  const void* weight;    // null for 1
  const void* mean;      // one for each set of statistics; null: RMS norm, which does not subtract any
  const void* invstd;
  void* d_grad;
  void* d_x;
  void* d_weight;
};

// x is (outer, channels, inner), the statistics those of a channel.
struct BatchNormArgs {
  Dtype dtype;
  NormTensors tensors;
  int64_t outer, channels, inner;
  bool fixed;  // the statistics are constants
};

// x is (rows, channels, inner), the statistics those of a row; row r has the weights from (r % groups) * channels on.
struct RowNormArgs {
  Dtype dtype;
  NormTensors tensors;
  int64_t rows, channels, inner, groups;
};

namespace cpu {
void batch_norm_double_backward(const BatchNormArgs& args, const Context& context);
void row_norm_double_backward(const RowNormArgs& args, const Context& context);
}  // namespace cpu

}  // namespace adahessian
