// The CPU's kernels of attention's passes: argument checks.
// adahessian_fused/friendly/attention_dropout.py and attention_double_backward.py have the schemas and the formulas.
#include <tuple>

#include "attention.h"
#include "ops.h"

namespace adahessian {
namespace {

using Sizes = std::vector<int64_t>;

std::string text_of(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

// A tensor of this shape and type; `broadcasts`: or of one that broadcasts to it.
View view(const char* op, const char* argument, const Tensor& tensor, const Sizes& sizes, ScalarType type,
          bool broadcasts = false) {
  const int64_t missing = int64_t(sizes.size()) - tensor.dim();
  bool fits = tensor.scalar_type() == type && (broadcasts ? missing >= 0 : missing == 0);
  View found{fits ? tensor.const_data_ptr() : nullptr, {}};
  for (int64_t d = missing; fits && d < int64_t(sizes.size()); ++d) {
    const int64_t size = tensor.size(d - missing);
    found.strides[d] = size == 1 ? 0 : tensor.stride(d - missing);
    fits = size == sizes[d] || (broadcasts && size == 1);
  }
  STD_TORCH_CHECK(fits, op, ": ", argument, " is ", name_of(tensor.scalar_type()), " of shape ", shape_of(tensor),
                  "; expected ", name_of(type), " of shape ", text_of(sizes),
                  broadcasts ? " or broadcasting to it" : "");
  return found;
}

// What the passes have in common.
class Call {
 public:
  Call(const char* op, AttentionPass pass, const Tensor& query, const Tensor& key, const Tensor& value,
       const OptionalTensor& bias, double scale, std::optional<int64_t> diagonal, const OptionalTensor& random,
       int64_t least, double kept)
      : op_(op), query_(query) {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, op, ": query, key and value have shapes ",
                    shape_of(query), ", ", shape_of(key), " and ", shape_of(value), "; expected four dimensions");
    args.pass = pass;
    args.dtype = dtype_of(op, "query", query);
    type_ = query.scalar_type(), state_ = state_type(args.dtype);
    args.batch = query.size(0), args.heads = query.size(1), args.queries = query.size(2), args.size = query.size(3);
    args.kv_heads = key.size(1), args.keys = key.size(2), args.value_size = value.size(3);
    STD_TORCH_CHECK(args.kv_heads > 0 ? args.heads % args.kv_heads == 0 : args.heads == 0, op, ": query has ",
                    args.heads, " heads; expected a multiple of the ", args.kv_heads, " of key");
    of_query = {args.batch, args.heads, args.queries, args.size};
    of_key = {args.batch, args.kv_heads, args.keys, args.size};
    of_value = {args.batch, args.kv_heads, args.keys, args.value_size};
    of_grad = {args.batch, args.heads, args.queries, args.value_size};
    args.query = tensor("query", query, of_query);
    args.key = tensor("key", key, of_key);
    args.value = tensor("value", value, of_value);
    if (bias.has_value()) {
      args.bias = view(op, "bias", *bias, {args.batch, args.heads, args.queries, args.keys}, state_, true);
    }
    args.scale = scale;
    args.has_diagonal = diagonal.has_value();
    args.diagonal = diagonal.value_or(0);
    if (random.has_value()) {
      const View words = view(op, "random", *random, {2}, ScalarType::Long);
      const auto* number = static_cast<const uint64_t*>(words.data);
      STD_TORCH_CHECK(least >= 0 && least < int64_t{1} << 32, op, ": least is ", least, "; expected 32 bits");
      args.dropout = {true, number[0], number[words.strides[0]], uint32_t(least), kept};
    }
  }

  AttentionArgs args{};
  Sizes of_query, of_key, of_value, of_grad;

  View tensor(const char* argument, const Tensor& tensor, const Sizes& sizes) const {
    return view(op_, argument, tensor, sizes, type_);
  }
  View row_sums(const Tensor& logsumexp) const {
    return view(op_, "logsumexp", logsumexp, {args.batch, args.heads, args.queries}, state_);
  }
  Tensor result(const Sizes& sizes, void*& data) const { return result(sizes, type_, data); }
  Tensor result_of_rows(void*& data) const { return result({args.batch, args.heads, args.queries}, state_, data); }
  void run() const {
    const Scope scope(query_);
    static const cpu::AttentionKernel kernel = cpu::attention();
    kernel(args, scope.context());
  }

 private:
  Tensor result(const Sizes& sizes, ScalarType type, void*& data) const {
    Tensor made = torch::stable::new_empty(query_, sizes, type);
    data = made.data_ptr();
    return made;
  }

  const char* op_;
  const Tensor& query_;
  ScalarType type_, state_;
};

std::tuple<Tensor, Tensor> attention_forward(Tensor query, Tensor key, Tensor value, OptionalTensor bias, double scale,
                                             std::optional<int64_t> diagonal, OptionalTensor random, int64_t least,
                                             double kept) {
  Call call("attention_forward", AttentionPass::kForward, query, key, value, bias, scale, diagonal, random, least,
            kept);
  const Tensor y = call.result(call.of_grad, call.args.d_grad);
  const Tensor logsumexp = call.result_of_rows(call.args.row_sums);
  call.run();
  return {y, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                      Tensor logsumexp, OptionalTensor bias, double scale,
                                                      std::optional<int64_t> diagonal, OptionalTensor random,
                                                      int64_t least, double kept) {
  Call call("attention_backward", AttentionPass::kBackward, query, key, value, bias, scale, diagonal, random, least,
            kept);
  AttentionArgs& args = call.args;
  args.grad = call.tensor("grad", grad, call.of_grad);
  args.logsumexp = call.row_sums(logsumexp);
  const Tensor d_query = call.result(call.of_query, args.d_query), d_key = call.result(call.of_key, args.d_key);
  const Tensor d_value = call.result(call.of_value, args.d_value);
  call.run();
  return {d_query, d_key, d_value};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_double_backward(Tensor a, Tensor b, Tensor c, Tensor grad,
                                                                     Tensor query, Tensor key, Tensor value,
                                                                     Tensor logsumexp, OptionalTensor bias,
                                                                     double scale, std::optional<int64_t> diagonal,
                                                                     OptionalTensor random, int64_t least,
                                                                     double kept) {
  Call call("attention_double_backward", AttentionPass::kDoubleBackward, query, key, value, bias, scale, diagonal,
            random, least, kept);
  AttentionArgs& args = call.args;
  args.a = call.tensor("a", a, call.of_query);
  args.b = call.tensor("b", b, call.of_key);
  args.c = call.tensor("c", c, call.of_value);
  args.grad = call.tensor("grad", grad, call.of_grad);
  args.logsumexp = call.row_sums(logsumexp);
  const Tensor d_grad = call.result(call.of_grad, args.d_grad), d_query = call.result(call.of_query, args.d_query);
  const Tensor d_key = call.result(call.of_key, args.d_key), d_value = call.result(call.of_value, args.d_value);
  call.run();
  return {d_grad, d_query, d_key, d_value};
}

}  // namespace
}  // namespace adahessian

STABLE_TORCH_LIBRARY_IMPL(adahessian_fused, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&adahessian::attention_forward));
  library.impl("attention_backward", TORCH_BOX(&adahessian::attention_backward));
  library.impl("attention_double_backward", TORCH_BOX(&adahessian::attention_double_backward));
}
