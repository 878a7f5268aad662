// Recurrent layers: what recurrence_ops.cpp asks of the CPU's kernels.
// adahessian_fused/friendly/recurrence.py has the formulas, shapes and names. All tensors are contiguous.
#pragma once

#include <string>

#include "launch.h"

namespace adahessian {

struct Recurrence {
  Dtype dtype;  // float32 or float64
  std::string kind;
  int64_t rows, batch, size;
  std::vector<int64_t> sizes;  // of the steps; empty: `batch` each
  bool reverse;
};

struct RecurrenceArgs {
  Recurrence layer;
  const void *a, *w, *b, *state;  // b may be null
  void *y, *final, *gates, *previous;
};

struct RecurrenceBackwardArgs {
  Recurrence layer;
  const void *w, *grad, *final, *gates, *previous;  // grad may be null
  void *d_gates, *d_each, *d_state;
};

struct RecurrenceDoubleBackwardArgs {
  Recurrence layer;
  const void *p, *w, *state, *gates, *previous, *d_each, *on_h;  // on_h may be null
  void *t_h, *t_final, *t_before, *t_gates, *t_state;
};

namespace cpu {

// Compiled once for each instruction set; these are the best one's.
struct RecurrenceKernels {
  void (*forward)(const RecurrenceArgs& args, const Context& context);
  void (*backward)(const RecurrenceBackwardArgs& args, const Context& context);
  void (*double_backward)(const RecurrenceDoubleBackwardArgs& args, const Context& context);
};
const RecurrenceKernels& recurrence_kernels();

}  // namespace cpu
}  // namespace adahessian
