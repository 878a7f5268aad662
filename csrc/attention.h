// The passes of attention: what attention_ops.cpp asks of the CPU's kernel.
#pragma once

#include "launch.h"

namespace adahessian {

// A tensor of four dimensions: (batch, head, row, column). Strides are in elements.
struct View {
  const void* data;
  int64_t strides[4];
};

// Weights that are dropped: number n, in the order of (batch, head, query, key), is kept, and multiplied by `factor`,
// if word offset + n of Philox4x32-10's stream is at least `least`.
struct Dropout {
  bool drops;
  uint64_t seed, offset;
  uint32_t least;
  double factor;
};

enum class AttentionPass { kForward, kBackward, kDoubleBackward };

// H heads of queries share Hk heads of keys; results are contiguous. A pass has no tensors that it does not need.
struct AttentionArgs {
  AttentionPass pass;
  Dtype dtype;
  int64_t batch, heads, kv_heads, queries, keys, size, value_size;
  View a, b, c, grad, query, key, value;
  View logsumexp;  // of the state's type, like the bias; no columns
  View bias;       // data may be null
  double scale;
  bool has_diagonal;
  int64_t diagonal;  // query i sees the keys up to i + diagonal
  Dropout dropout;
  void *d_grad, *d_query, *d_key, *d_value;  // d_grad: in the forward pass, the output
  void* row_sums;                            // the forward pass's logsumexp
};

namespace cpu {

// Compiled once for each instruction set; this is the best one's.
using AttentionKernel = void (*)(const AttentionArgs& args, const Context& context);
AttentionKernel attention();

}  // namespace cpu
}  // namespace adahessian
