// v g y''(x) for y = GELU(x), in one pass; compiled once for each instruction set, with ADAHESSIAN_ISA as its name.
#include "../gelu.h"

#include "products.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {
namespace {

template <typename T>
void run(const GeluArgs& args, const Context& context) {
  using S = StateOf<T>;
  constexpr int64_t W = kLanes<S>, kGrain = 1 << 14;
  const T *v = static_cast<const T*>(args.v), *grad = static_cast<const T*>(args.grad);
  const T* x = static_cast<const T*>(args.x);
  T* d_x = static_cast<T*>(args.d_x);
  const auto vector = [](const T* v, const T* grad, const T* x, T* d_x) ADAHESSIAN_INLINE_LAMBDA {
    const Vector<S> at = load_as_vector(x), square = at * at;
    const Vector<S> second = S(0.39894228040143267794) * (S(2) - square) * exponential<S>(S(-0.5) * square);
    store_as_vector(d_x, load_as_vector(v) * (load_as_vector(grad) * second));
  };
  context.parallel_for(0, args.numel, kGrain, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + W <= end; i += W) vector(v + i, grad + i, x + i, d_x + i);
    if (i == end) return;
    T rest[4][W] = {};
    const size_t size = size_t(end - i) * sizeof(T);
    memcpy(rest[0], v + i, size), memcpy(rest[1], grad + i, size), memcpy(rest[2], x + i, size);
    vector(rest[0], rest[1], rest[2], rest[3]);
    memcpy(d_x + i, rest[3], size);
  });
}

}  // namespace

void gelu_double_backward(const GeluArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) { run<decltype(type)>(args, context); });
}

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
