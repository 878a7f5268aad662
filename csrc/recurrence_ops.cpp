// The CPU's kernels of recurrent layers: argument checks.
// adahessian_fused/friendly/recurrence.py has the operators' schemas and their formulas.
#include <tuple>

#include "ops.h"
#include "recurrence.h"

namespace adahessian {
namespace {

using Sizes = std::vector<int64_t>;

int64_t numel_of(const Sizes& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

// What an operator is given, checked, and room for its results.
struct Call {
  const char* op;
  const Tensor& like;  // its dtype is that of all
  Recurrence layer;
  int64_t gates, states, saved;

  Call(const char* op, const std::string& kind, const Tensor& w, const Tensor& each, const Tensor& state,
       const OptionalTensor& sizes, bool reverse)
      : op(op), like(w) {
    const bool lstm = kind == "lstm", gru = kind == "gru";
    STD_TORCH_CHECK(lstm || gru || kind == "tanh" || kind == "relu", op, ": kind is ", kind,
                    "; expected lstm, gru, tanh or relu");
    STD_TORCH_CHECK(w.dim() == 2 && each.dim() >= 2 && state.dim() == 3, op, ": shapes ", shape_of(w), ", ",
                    shape_of(each), " and ", shape_of(state), "; expected a matrix of weights, rows and states");
    gates = lstm || gru ? 4 : 1, saved = lstm ? 5 : gates, states = lstm ? 2 : 1;
    layer = {dtype_of(op, "w", w), kind, each.size(each.dim() - 2), state.size(1), w.size(1), {}, reverse};
    STD_TORCH_CHECK(layer.dtype == Dtype::kFloat32 || layer.dtype == Dtype::kFloat64, op, ": w is ",
                    name_of(w.scalar_type()), "; expected float32 or float64");
    if (sizes.has_value()) {
      STD_TORCH_CHECK(sizes->scalar_type() == ScalarType::Long && sizes->is_contiguous() && !sizes->is_cuda(), op,
                      ": sizes is ", name_of(sizes->scalar_type()), "; expected contiguous int64 on the CPU");
      const auto* data = static_cast<const int64_t*>(sizes->const_data_ptr());
      layer.sizes.assign(data, data + sizes->numel());
    }
    int64_t rows = 0;
    for (const int64_t size : layer.sizes) {
      STD_TORCH_CHECK(size >= 0 && size <= layer.batch, op, ": sizes has ", size, "; expected 0 to ", layer.batch);
      rows += size;
    }
    const bool even = layer.batch > 0 && layer.rows % layer.batch == 0;
    STD_TORCH_CHECK(sizes.has_value() ? rows == layer.rows : even, op, ": ", layer.rows, " rows; expected ",
                    sizes.has_value() ? "the sum of sizes" : "a multiple of the batch");
    const int64_t hidden = lstm ? 4 : gru ? 3 : 1;
    checked("w", w, {hidden * layer.size, layer.size});
  }
  Sizes of_rows(int64_t parts) const { return {layer.rows, parts * layer.size}; }
  Sizes of_each() const { return {states, layer.rows, layer.size}; }
  Sizes of_state() const { return {states, layer.batch, layer.size}; }

  const void* checked(const char* argument, const Tensor& tensor, const Sizes& sizes) const {
    bool fits = tensor.scalar_type() == like.scalar_type() && tensor.is_contiguous() && !tensor.is_cuda() &&
                tensor.dim() == int64_t(sizes.size());
    for (int64_t d = 0; fits && d < tensor.dim(); ++d) fits = tensor.size(d) == sizes[d];
    STD_TORCH_CHECK(fits, op, ": ", argument, " is ", name_of(tensor.scalar_type()), " of shape ", shape_of(tensor),
                    "; expected contiguous ", name_of(like.scalar_type()), " with ", numel_of(sizes), " elements");
    return tensor.const_data_ptr();
  }
  const void* checked(const char* argument, const OptionalTensor& tensor, const Sizes& sizes) const {
    return tensor.has_value() ? checked(argument, *tensor, sizes) : nullptr;
  }
  Tensor result(const Sizes& sizes) const { return torch::stable::new_empty(like, sizes, like.scalar_type()); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrence(std::string kind, Tensor a, Tensor w, OptionalTensor b,
                                                      Tensor state, OptionalTensor sizes, bool reverse) {
  const Call call("recurrence", kind, w, a, state, sizes, reverse);
  const int64_t inputs = kind == "gru" ? 3 : call.gates;
  const Tensor y = call.result(call.of_rows(1)), final = call.result(call.of_state());
  const Tensor gates = call.result(call.of_rows(call.saved)), previous = call.result(call.of_each());
  const RecurrenceArgs args{call.layer,
                            call.checked("a", a, call.of_rows(inputs)),
                            w.const_data_ptr(),
                            call.checked("b", b, {call.layer.size}),
                            call.checked("state", state, call.of_state()),
                            y.data_ptr(),
                            final.data_ptr(),
                            gates.data_ptr(),
                            previous.data_ptr()};
  const Scope scope(w);
  cpu::recurrence_kernels().forward(args, scope.context());
  return {y, final, gates, previous};
}

std::tuple<Tensor, Tensor, Tensor> recurrence_backward(std::string kind, Tensor w, OptionalTensor grad, Tensor final,
                                                       Tensor gates, Tensor previous, OptionalTensor sizes,
                                                       bool reverse) {
  const Call call("recurrence_backward", kind, w, gates, final, sizes, reverse);
  const Tensor d_gates = call.result(call.of_rows(call.gates)), d_each = call.result(call.of_each());
  const Tensor d_state = call.result(call.of_state());
  const RecurrenceBackwardArgs args{call.layer,
                                    w.const_data_ptr(),
                                    call.checked("grad", grad, call.of_rows(1)),
                                    call.checked("final", final, call.of_state()),
                                    call.checked("gates", gates, call.of_rows(call.saved)),
                                    call.checked("previous", previous, call.of_each()),
                                    d_gates.data_ptr(),
                                    d_each.data_ptr(),
                                    d_state.data_ptr()};
  const Scope scope(w);
  cpu::recurrence_kernels().backward(args, scope.context());
  return {d_gates, d_each, d_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_double_backward(std::string kind, Tensor p, Tensor w,
                                                                              Tensor state, Tensor gates,
                                                                              Tensor previous, Tensor d_each,
                                                                              OptionalTensor on_h, OptionalTensor sizes,
                                                                              bool reverse) {
  const Call call("recurrence_double_backward", kind, w, p, state, sizes, reverse);
  const Tensor t_h = call.result(call.of_rows(1)), t_final = call.result(call.of_state());
  const Tensor t_before = call.result(call.of_rows(1)), t_gates = call.result(call.of_rows(call.gates));
  const Tensor t_state = call.result(call.of_state());
  const RecurrenceDoubleBackwardArgs args{call.layer,
                                          call.checked("p", p, call.of_rows(call.gates)),
                                          w.const_data_ptr(),
                                          call.checked("state", state, call.of_state()),
                                          call.checked("gates", gates, call.of_rows(call.saved)),
                                          call.checked("previous", previous, call.of_each()),
                                          call.checked("d_each", d_each, call.of_each()),
                                          call.checked("on_h", on_h, call.of_rows(1)),
                                          t_h.data_ptr(),
                                          t_final.data_ptr(),
                                          t_before.data_ptr(),
                                          t_gates.data_ptr(),
                                          t_state.data_ptr()};
  const Scope scope(w);
  cpu::recurrence_kernels().double_backward(args, scope.context());
  return {t_h, t_final, t_before, t_gates, t_state};
}

}  // namespace
}  // namespace adahessian

STABLE_TORCH_LIBRARY_IMPL(adahessian_fused, CPU, library) {
  library.impl("recurrence", TORCH_BOX(&adahessian::recurrence));
  library.impl("recurrence_backward", TORCH_BOX(&adahessian::recurrence_backward));
  library.impl("recurrence_double_backward", TORCH_BOX(&adahessian::recurrence_double_backward));
}
