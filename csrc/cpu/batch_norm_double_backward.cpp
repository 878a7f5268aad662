// The double backward of batch norm on the CPU: one pass for five sums of each channel, one for the two gradients,
// which are linear in v, grad and x with coefficients that depend on the channel.
#include "norm.h"

namespace adahessian::cpu {
namespace {

constexpr int64_t kShortPlane =
    64;                             // elements; the loops over planes that are shorter take longer to start than to run
constexpr int64_t kWideRow = 4096;  // elements, whose sums and coefficients are still in a cache

enum Sum { kV, kG, kVX, kGX, kVG, kSums };  // of v, g, v (x - mean), g (x - mean), v g

// d_grad = grad_v v + grad_x (x - mean) + grad_1, d_x = x_v v + x_g g + x_x (x - mean) + x_1
template <typename S>
struct Coefficients {
  S mean, grad_v, grad_x, grad_1, x_v, x_g, x_x, x_1;
};

template <typename T>
struct Streams {
  const T *v, *g, *x;
  T *d_grad, *d_x;
  explicit Streams(const NormTensors& t)
      : v(as<T>(t.v)),
        g(as<T>(t.grad)),
        x(as<T>(t.x)),
        d_grad(static_cast<T*>(t.d_grad)),
        d_x(static_cast<T*>(t.d_x)) {}
};

// ---- a plane: neighbouring elements of one channel ------------------------------------------------------------------

template <typename T>
ADAHESSIAN_HD Sums<kSums> plane_sums(const Streams<T>& s, int64_t begin, int64_t count, StateOf<T> mean) {
  using S = StateOf<T>;
  const T *v = s.v + begin, *g = s.g + begin, *x = s.x + begin;
  return sum_terms<S, kSums>(count, [=](int64_t i, S* term) __attribute__((always_inline)) {
    const S vi = load_as(v[i]), gi = load_as(g[i]), xi = load_as(x[i]) - mean;
    term[kV] = vi;
    term[kG] = gi;
    term[kVX] = vi * xi;
    term[kGX] = gi * xi;
    term[kVG] = vi * gi;
  });
}

template <typename T>
ADAHESSIAN_HD void plane_gradients(const Streams<T>& s, int64_t begin, int64_t count,
                                   const Coefficients<StateOf<T>>& of_channel) {
  using S = StateOf<T>;
  const Coefficients<S> c = of_channel;
  const T* __restrict v = s.v + begin, * __restrict g = s.g + begin, * __restrict x = s.x + begin;
  T* __restrict d_grad = s.d_grad + begin, * __restrict d_x = s.d_x + begin;
  for (int64_t i = 0; i < count; ++i) {
    const S vi = load_as(v[i]), gi = load_as(g[i]), xi = load_as(x[i]) - c.mean;
    store_to(d_grad[i], c.grad_v * vi + (c.grad_x * xi + c.grad_1));
    store_to(d_x[i], (c.x_v * vi + c.x_g * gi) + (c.x_x * xi + c.x_1));
  }
}

// ---- rows: one element of every channel, channel by channel; or a short plane of each, whose elements count as
// channels

// Adds the rows' terms to sums[kSums][channels].
template <typename T>
ADAHESSIAN_HD void rows_sums(const Streams<T>& s, int64_t begin, int64_t end, int64_t channels, const StateOf<T>* mean,
                             StateOf<T>* sums) {
  using S = StateOf<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict v = s.v + row * channels, * __restrict g = s.g + row * channels;
    const T* __restrict x = s.x + row * channels;
    S* __restrict sv = sums, * __restrict sg = sums + channels, * __restrict svx = sums + kVX * channels;
    S* __restrict sgx = sums + kGX * channels, * __restrict svg = sums + kVG * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const S vc = load_as(v[c]), gc = load_as(g[c]), xc = load_as(x[c]) - mean[c];
      sv[c] += vc;
      sg[c] += gc;
      svx[c] += vc * xc;
      sgx[c] += gc * xc;
      svg[c] += vc * gc;
    }
  }
}

// `table` is Coefficients with an array of all channels in the place of each number.
template <typename T>
ADAHESSIAN_HD void rows_gradients(const Streams<T>& s, int64_t begin, int64_t end, int64_t channels,
                                  const StateOf<T>* table) {
  using S = StateOf<T>;
  const S *mean = table, *grad_v = mean + channels, *grad_x = grad_v + channels, *grad_1 = grad_x + channels;
  const S *x_v = grad_1 + channels, *x_g = x_v + channels, *x_x = x_g + channels, *x_1 = x_x + channels;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict v = s.v + row * channels, * __restrict g = s.g + row * channels;
    const T* __restrict x = s.x + row * channels;
    T* __restrict d_grad = s.d_grad + row * channels, * __restrict d_x = s.d_x + row * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const S vc = load_as(v[c]), gc = load_as(g[c]), xc = load_as(x[c]) - mean[c];
      store_to(d_grad[c], grad_v[c] * vc + (grad_x[c] * xc + grad_1[c]));
      store_to(d_x[c], (x_v[c] * vc + x_g[c] * gc) + (x_x[c] * xc + x_1[c]));
    }
  }
}

#define ADAHESSIAN_FOR_DTYPE(T)                                                                                     \
  ADAHESSIAN_NORM_CLONES Sums<kSums> run_plane_sums(const Streams<T>& s, int64_t begin, int64_t count,              \
                                                    StateOf<T> mean) {                                              \
    return plane_sums(s, begin, count, mean);                                                                       \
  }                                                                                                                 \
  ADAHESSIAN_NORM_CLONES void run_plane_gradients(const Streams<T>& s, int64_t begin, int64_t count,                \
                                                  const Coefficients<StateOf<T>>& c) {                              \
    plane_gradients(s, begin, count, c);                                                                            \
  }                                                                                                                 \
  ADAHESSIAN_NORM_CLONES void run_rows_sums(const Streams<T>& s, int64_t begin, int64_t end, int64_t channels,      \
                                            const StateOf<T>* mean, StateOf<T>* sums) {                             \
    rows_sums(s, begin, end, channels, mean, sums);                                                                 \
  }                                                                                                                 \
  ADAHESSIAN_NORM_CLONES void run_rows_gradients(const Streams<T>& s, int64_t begin, int64_t end, int64_t channels, \
                                                 const StateOf<T>* table) {                                         \
    rows_gradients(s, begin, end, channels, table);                                                                 \
  }
ADAHESSIAN_FOR_DTYPE(float)
ADAHESSIAN_FOR_DTYPE(double)
ADAHESSIAN_FOR_DTYPE(bfloat16)
ADAHESSIAN_FOR_DTYPE(float16)
#undef ADAHESSIAN_FOR_DTYPE

// ---- the whole ------------------------------------------------------------------------------------------------------

// Coefficients of a channel, and the gradient of its weight. With A = sum of v g less n times their means' product,
// B and C the sums of v x_hat and g x_hat:  d_w = s (A - B C / n),
// d_grad = w P(v) + v_w x_hat + v_b,  d_x = P((v_w - w s B / n) g - (w s C / n) v) - x_hat (w s / n) d_w.
template <typename S>
Coefficients<S> coefficients(const NormTensors& t, int64_t c, const Sums<kSums>& sums, double n, bool fixed) {
  const auto at = [c](const void* data, double otherwise) { return data ? double(as<S>(data)[c]) : otherwise; };
  const double s = at(t.invstd, 1), w = at(t.weight, 1), v_w = at(t.v_weight, 0), v_b = at(t.v_bias, 0);
  S& d_weight = static_cast<S*>(t.d_weight)[c];
  const S mean = as<S>(t.mean)[c];
  if (fixed) {
    d_weight = S(s * sums.value[kVG]);
    return {mean, S(w * s), S(v_w * s), S(v_b), S(0), S(v_w * s), S(0), S(0)};
  }
  const double v_mean = sums.value[kV] / n, g_mean = sums.value[kG] / n;
  const double b = s * sums.value[kVX], c_sum = s * sums.value[kGX];
  const double d_w = s * (sums.value[kVG] - n * v_mean * g_mean - b * c_sum / n);
  d_weight = S(d_w);
  const double of_g = s * (v_w - w * s * b / n), of_v = -s * w * s * c_sum / n;
  return {mean,
          S(w * s),
          S(s * (v_w - w * s * b / n)),
          S(v_b - w * s * v_mean),
          S(of_v),
          S(of_g),
          S(-s * ((of_v * b + of_g * c_sum) / n + w * s * d_w / n)),
          S(-of_v * v_mean - of_g * g_mean)};
}

template <typename T>
void planes(const BatchNormArgs& args, const Context& context) {
  using S = StateOf<T>;
  const Streams<T> streams(args.tensors);
  const S* mean = as<S>(args.tensors.mean);
  const Tasks tasks(args.outer * args.channels, args.inner);
  std::vector<Sums<kSums>> sums(tasks.units);
  tasks.run(context, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sums[i] = run_plane_sums(streams, i * args.inner, args.inner, mean[i % args.channels]);
    }
  });
  std::vector<Coefficients<S>> table(args.channels);
  for (int64_t c = 0; c < args.channels; ++c) {
    Sums<kSums> total;
    for (int64_t i = c; i < tasks.units; i += args.channels) total += sums[i];
    table[c] = coefficients<S>(args.tensors, c, total, double(args.outer * args.inner), args.fixed);
  }
  tasks.run(context, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run_plane_gradients(streams, i * args.inner, args.inner, table[i % args.channels]);
    }
  });
}

template <typename T>
void rows(const BatchNormArgs& args, const Context& context) {
  using S = StateOf<T>;
  const Streams<T> streams(args.tensors);
  const int64_t channels = args.channels, inner = args.inner, width = channels * inner;
  const Tasks tasks(args.outer, width);
  std::vector<S> table(8 * width);  // the means come first
  for (int64_t i = 0; i < width; ++i) table[i] = as<S>(args.tensors.mean)[i / inner];
  std::vector<S> sums(tasks.count() * kSums * width);
  tasks.run(context, [&](int64_t task, int64_t begin, int64_t end) {
    run_rows_sums(streams, begin, end, width, table.data(), sums.data() + task * kSums * width);
  });
  std::vector<Sums<kSums>> totals(channels);
  for (int64_t task = 0; task < tasks.count(); ++task) {
    for (int64_t k = 0; k < kSums; ++k) {
      const S* of_task = sums.data() + (task * kSums + k) * width;
      for (int64_t i = 0; i < width; ++i) totals[i / inner].value[k] += double(of_task[i]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const auto of = coefficients<S>(args.tensors, c, totals[c], double(args.outer * inner), args.fixed);
    S* first = table.data() + c * inner;
    for (const S number : {of.mean, of.grad_v, of.grad_x, of.grad_1, of.x_v, of.x_g, of.x_x, of.x_1}) {
      std::fill_n(first, inner, number);
      first += width;
    }
  }
  tasks.run(context,
            [&](int64_t, int64_t begin, int64_t end) { run_rows_gradients(streams, begin, end, width, table.data()); });
}

}  // namespace

void batch_norm_double_backward(const BatchNormArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.inner == 1 || (args.inner < kShortPlane && args.channels * args.inner <= kWideRow) ? rows<T>(args, context)
                                                                                            : planes<T>(args, context);
  });
}

}  // namespace adahessian::cpu
