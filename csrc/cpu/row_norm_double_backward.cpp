// The double backward of layer, RMS and group norm on the CPU. A row stays in the cache: seven sums of it first, then
// its two gradients and its share of the weight's.
#include "norm.h"

namespace adahessian::cpu {
namespace {

// With u = w g and r = v_w g: sums of v, u, r, and of the products.
enum Sum { kV, kU, kR, kVX, kUX, kRX, kVU, kSums };

template <typename T>
struct Row {
  const T *v, *g, *x;
  T *d_grad, *d_x;
  const StateOf<T>*weight, *v_weight, *v_bias;  // of the row's first channel
  StateOf<T>* d_weight;
  StateOf<T> mean, invstd;
  int64_t channels, inner;
};

// The numbers of a row that its gradients are made of.
template <typename S>
struct Means {
  S v, vx, u_by, v_by, r, rx, k;
};

// Calls body(first element, count, first weight) for stretches of elements that have a weight each (inner = 1, one
// stretch) or share one.
template <typename Body>
ADAHESSIAN_HD void stretches(int64_t channels, int64_t inner, const Body& body) {
  if (inner == 1) {
    body(int64_t{0}, channels, int64_t{0});
  } else {
    for (int64_t c = 0; c < channels; ++c) body(c * inner, inner, c);
  }
}

// `each`: 1 if every element has a weight of its own, 0 if they share one.
template <int64_t each, typename T>
ADAHESSIAN_HD Sums<kSums> stretch_sums(const Row<T>& row, int64_t begin, int64_t count, int64_t first) {
  using S = StateOf<T>;
  const T *v = row.v + begin, *g = row.g + begin, *x = row.x + begin;
  const S *w = row.weight + first, *vw = row.v_weight + first;
  const S mean = row.mean, s = row.invstd;
  return sum_terms<S, kSums>(count, [=](int64_t i, S* term) __attribute__((always_inline)) {
    const S vi = load_as(v[i]), gi = load_as(g[i]), xi = (load_as(x[i]) - mean) * s;
    const S ui = w[i * each] * gi, ri = vw[i * each] * gi;
    term[kV] = vi;
    term[kU] = ui;
    term[kR] = ri;
    term[kVX] = vi * xi;
    term[kUX] = ui * xi;
    term[kRX] = ri * xi;
    term[kVU] = vi * ui;
  });
}

template <int64_t each, typename T>
ADAHESSIAN_HD void stretch_gradients(const Row<T>& row, const Means<StateOf<T>>& of_row, int64_t begin, int64_t count,
                                     int64_t first) {
  using S = StateOf<T>;
  const Means<S> m = of_row;
  const T* __restrict v = row.v + begin, * __restrict g = row.g + begin, * __restrict x = row.x + begin;
  T* __restrict d_grad = row.d_grad + begin, * __restrict d_x = row.d_x + begin;
  const S* __restrict w = row.weight + first, * __restrict vw = row.v_weight + first;
  const S* __restrict vb = row.v_bias + first;
  S* __restrict dw = row.d_weight + first;
  const S mean = row.mean, s = row.invstd;
  const auto element = [=](int64_t i) __attribute__((always_inline)) -> S {
    const S vi = load_as(v[i]), gi = load_as(g[i]), xi = (load_as(x[i]) - mean) * s;
    const S wi = w[i * each], vwi = vw[i * each], p = s * (vi - m.v - xi * m.vx);
    store_to(d_grad[i], wi * p + (vwi * xi + vb[i * each]));
    const S inner = vwi * gi - (m.u_by * (wi * gi) + m.v_by * vi);
    store_to(d_x[i], s * (inner - m.r - xi * m.rx) - xi * m.k);
    return gi * p;
  };
  if constexpr (each == 1) {
    for (int64_t i = 0; i < count; ++i) dw[i] += element(i);
  } else {
    *dw += S(sum_terms<S, 1>(count, [&](int64_t i, S* term) __attribute__((always_inline)) {
               *term = element(i);
             }).value[0]);
  }
}

template <typename S>
ADAHESSIAN_HD Means<S> means_of(const Sums<kSums>& sums, double n, double s, bool centred) {
  const auto mean = [&](Sum k) __attribute__((always_inline)) { return sums.value[k] / n; };
  const double v = centred ? mean(kV) : 0, u = centred ? mean(kU) : 0, r = centred ? mean(kR) : 0;
  const double vx = mean(kVX), ux = mean(kUX);
  // inner = r - s (mean(v x) u + mean(u x) v), its mean and that of inner x; k = s mean(u P(v))
  return {S(v),
          S(vx),
          S(s * vx),
          S(s * ux),
          S(r - s * (vx * u + ux * v)),
          S(mean(kRX) - 2 * s * vx * ux),
          S(s * s * (mean(kVU) - v * u - vx * ux))};
}

template <typename T>
ADAHESSIAN_HD void row_gradients(const Row<T>& row, bool centred) {
  using S = StateOf<T>;
  const bool each = row.inner == 1;
  Sums<kSums> sums;
  stretches(row.channels, row.inner, [&](int64_t begin, int64_t count, int64_t first) __attribute__((always_inline)) {
    sums += each ? stretch_sums<1>(row, begin, count, first) : stretch_sums<0>(row, begin, count, first);
  });
  const auto means = means_of<S>(sums, double(row.channels * row.inner), double(row.invstd), centred);
  stretches(row.channels, row.inner, [&](int64_t begin, int64_t count, int64_t first) __attribute__((always_inline)) {
    each ? stretch_gradients<1>(row, means, begin, count, first)
         : stretch_gradients<0>(row, means, begin, count, first);
  });
}

ADAHESSIAN_NORM_CLONES void run_row(const Row<float>& row, bool centred) { row_gradients(row, centred); }
ADAHESSIAN_NORM_CLONES void run_row(const Row<double>& row, bool centred) { row_gradients(row, centred); }
ADAHESSIAN_NORM_CLONES void run_row(const Row<bfloat16>& row, bool centred) { row_gradients(row, centred); }
ADAHESSIAN_NORM_CLONES void run_row(const Row<float16>& row, bool centred) { row_gradients(row, centred); }

template <typename T>
void all_rows(const RowNormArgs& args, const Context& context) {
  using S = StateOf<T>;
  const NormTensors& t = args.tensors;
  const int64_t length = args.channels * args.inner, n_weights = args.groups * args.channels;
  const std::vector<S> ones(t.weight ? 0 : n_weights, S(1)), zeros(n_weights, S(0));
  const auto or_else = [](const void* data, const std::vector<S>& otherwise) {
    return data ? as<S>(data) : otherwise.data();
  };
  const S *weight = or_else(t.weight, ones), *v_weight = or_else(t.v_weight, zeros), *v_bias = or_else(t.v_bias, zeros);
  // Each task has sums of its own for the weights, which add up in a fixed order.
  const Tasks tasks(args.rows, length);
  std::vector<S> d_weight(tasks.count() * n_weights);
  tasks.run(context, [&](int64_t task, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * length, first = r % args.groups * args.channels;
      run_row(Row<T>{as<T>(t.v) + at, as<T>(t.grad) + at, as<T>(t.x) + at, static_cast<T*>(t.d_grad) + at,
                     static_cast<T*>(t.d_x) + at, weight + first, v_weight + first, v_bias + first,
                     d_weight.data() + task * n_weights + first, t.mean ? as<S>(t.mean)[r] : S(0), as<S>(t.invstd)[r],
                     args.channels, args.inner},
              t.mean != nullptr);
    }
  });
  for (int64_t i = 0; i < n_weights; ++i) {
    double total = 0;
    for (int64_t task = 0; task < tasks.count(); ++task) total += double(d_weight[task * n_weights + i]);
    static_cast<S*>(t.d_weight)[i] = S(total);
  }
}

}  // namespace

void row_norm_double_backward(const RowNormArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) { all_rows<decltype(type)>(args, context); });
}

}  // namespace adahessian::cpu
