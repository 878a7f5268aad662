// The CPU's kernel of attention_double_backward: argument checks.
// adahessian_fused/friendly/attention_double_backward.py has the operator's schema and its formulas.
#include <tuple>

#include "attention.h"
#include "ops.h"

namespace adahessian {
namespace {

constexpr const char* kOp = "attention_double_backward";
using Sizes = std::vector<int64_t>;

std::string text_of(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

// A tensor of this shape and type; `broadcasts`: or of one that broadcasts to it.
View view(const char* argument, const Tensor& tensor, const Sizes& sizes, ScalarType type, bool broadcasts = false) {
  const int64_t missing = int64_t(sizes.size()) - tensor.dim();
  bool fits = tensor.scalar_type() == type && (broadcasts ? missing >= 0 : missing == 0);
  View found{fits ? tensor.const_data_ptr() : nullptr, {}};
  for (int64_t d = missing; fits && d < int64_t(sizes.size()); ++d) {
    const int64_t size = tensor.size(d - missing);
    found.strides[d] = size == 1 ? 0 : tensor.stride(d - missing);
    fits = size == sizes[d] || (broadcasts && size == 1);
  }
  STD_TORCH_CHECK(fits, kOp, ": ", argument, " is ", name_of(tensor.scalar_type()), " of shape ", shape_of(tensor),
                  "; expected ", name_of(type), " of shape ", text_of(sizes),
                  broadcasts ? " or broadcasting to it" : "");
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_double_backward(Tensor a, Tensor b, Tensor c, Tensor grad,
                                                                     Tensor query, Tensor key, Tensor value,
                                                                     Tensor logsumexp, OptionalTensor bias,
                                                                     double scale, std::optional<int64_t> diagonal) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, kOp, ": query, key and value have shapes ",
                  shape_of(query), ", ", shape_of(key), " and ", shape_of(value), "; expected four dimensions");
  AttentionArgs args;
  args.dtype = dtype_of(kOp, "query", query);
  const ScalarType type = query.scalar_type(), state = state_type(args.dtype);
  args.batch = query.size(0), args.heads = query.size(1), args.queries = query.size(2), args.size = query.size(3);
  args.kv_heads = key.size(1), args.keys = key.size(2), args.value_size = value.size(3);
  STD_TORCH_CHECK(args.kv_heads > 0 ? args.heads % args.kv_heads == 0 : args.heads == 0, kOp, ": query has ",
                  args.heads, " heads; expected a multiple of the ", args.kv_heads, " of key");
  const Sizes of_query{args.batch, args.heads, args.queries, args.size};
  const Sizes of_key{args.batch, args.kv_heads, args.keys, args.size};
  const Sizes of_value{args.batch, args.kv_heads, args.keys, args.value_size};
  const Sizes of_grad{args.batch, args.heads, args.queries, args.value_size};
  args.a = view("a", a, of_query, type);
  args.b = view("b", b, of_key, type);
  args.c = view("c", c, of_value, type);
  args.grad = view("grad", grad, of_grad, type);
  args.query = view("query", query, of_query, type);
  args.key = view("key", key, of_key, type);
  args.value = view("value", value, of_value, type);
  args.logsumexp = view("logsumexp", logsumexp, {args.batch, args.heads, args.queries}, state);
  args.bias = View{};
  if (bias.has_value()) {
    args.bias = view("bias", *bias, {args.batch, args.heads, args.queries, args.keys}, state, true);
  }
  args.scale = scale;
  args.has_diagonal = diagonal.has_value();
  args.diagonal = diagonal.value_or(0);
  const auto result = [&](const Sizes& sizes) { return torch::stable::new_empty(query, sizes, type); };
  const Tensor d_grad = result(of_grad), d_query = result(of_query), d_key = result(of_key), d_value = result(of_value);
  args.d_grad = d_grad.data_ptr(), args.d_query = d_query.data_ptr();
  args.d_key = d_key.data_ptr(), args.d_value = d_value.data_ptr();
  const Scope scope(query);
  static const cpu::AttentionKernel kernel = cpu::attention_double_backward();
  kernel(args, scope.context());
  return {d_grad, d_query, d_key, d_value};
}

}  // namespace
}  // namespace adahessian

STABLE_TORCH_LIBRARY_IMPL(adahessian_fused, CPU, library) {
  library.impl("attention_double_backward", TORCH_BOX(&adahessian::attention_double_backward));
}
