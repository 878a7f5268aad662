// The double backward of attention: what attention_ops.cpp asks of the CPU's kernel.
#pragma once

#include "launch.h"

namespace adahessian {

// A tensor of four dimensions: (batch, head, row, column). Strides are in elements.
struct View {
  const void* data;
  int64_t strides[4];
};

// H heads of queries share Hk heads of keys; results are contiguous.
struct AttentionArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, queries, keys, size, value_size;
  View a, b, c, grad, query, key, value;
  View logsumexp;  // of the state's type, like the bias; no columns
  View bias;       // data may be null
  double scale;
  bool has_diagonal;
  int64_t diagonal;  // query i sees the keys up to i + diagonal
  void *d_grad, *d_query, *d_key, *d_value;
};

namespace cpu {

// Compiled once for each instruction set; this is the best one's.
using AttentionKernel = void (*)(const AttentionArgs& args, const Context& context);
AttentionKernel attention_double_backward();

}  // namespace cpu
}  // namespace adahessian
