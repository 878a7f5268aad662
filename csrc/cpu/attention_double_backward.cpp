// The double backward of attention; compiled once for each instruction set, with ADAHESSIAN_ISA as its name.
// adahessian_fused/friendly/attention_double_backward.py has the formulas, and the names used here.
//
// A block of queries has all of its scores at once: four rows of numbers for each, which stay in the cache, so that the
// twelve products are computed once. Factors are packed into panels, a few vectors wide, as the product's inner loop
// reads them. Keys after the diagonal are left out, 2 vectors at a time.
#include <memory>

#include "../attention.h"
#include "products.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {
namespace {

constexpr int64_t kScores = 96 * 1024;  // numbers of a block of queries in each of its four arrays, at most
constexpr int64_t kMostRows = 64;       // and its queries
constexpr int64_t kTasks = 32;          // at least, if there are enough queries
constexpr int64_t kRowsOfATask = 512;   // at least, where several share a head of keys

// A block of queries: four arrays of scores, `stride` apart from row to row.
template <typename S>
struct Scores {
  S *p, *tangent, *g, *h;  // P, and the tangent of S, G and H; afterwards the tangent of P, S' and that of S'
  int64_t stride;
};

template <typename S>
ADAHESSIAN_HD S total(Vector<S> x) {
  S sum = 0;
  for (int l = 0; l < kLanes<S>; ++l) sum += x[l];
  return sum;
}

// One row; p has S at first. Keys from `seen` up to `columns`, a multiple of vectors, are masked.
template <typename S>
[[gnu::noinline]] void softmax_row(S* p, S* tangent, S* g, S* h, const S* bias, S logsumexp, int64_t seen,
                                   int64_t columns) {
  using V = Vector<S>;
  constexpr int64_t W = kLanes<S>;
  V of_p{}, of_tangent{}, of_g{}, of_w{};  // W but for what is the same in the whole row
  const V lse = broadcast<S>(logsumexp);
  const Index<S> lanes = lane_numbers<S>();
  for (int64_t j = 0; j < columns; j += W) {
    V s = load_vector<V>(p + j);
    if (bias != nullptr) s += load_vector<V>(bias + j);
    V x = exponential<S>(s - lse);
    if (j + W > seen)
      x = where<S>(lanes + typename Integers<S>::Signed(j) < Index<S>{} + typename Integers<S>::Signed(seen), x);
    const V t = load_vector<V>(tangent + j), gj = load_vector<V>(g + j);
    of_p += x;
    of_tangent += x * t;
    of_g += x * gj;
    store_vector(p + j, x);
  }
  // The logsumexp of large scores is rounded, so that P adds up to something else than 1, which would not cancel below.
  const S sum = total<S>(of_p), factor = sum > 0 ? 1 / sum : S(0);
  const V factor_v = broadcast<S>(factor);
  const V mu = broadcast<S>(factor * total<S>(of_tangent)), d = broadcast<S>(factor * total<S>(of_g));
  for (int64_t j = 0; j < columns; j += W) {
    const V x = factor_v * load_vector<V>(p + j);
    const V centred = load_vector<V>(tangent + j) - mu, of_s = load_vector<V>(g + j) - d;
    const V w = centred * of_s + load_vector<V>(h + j);
    of_w += x * w;
    store_vector(p + j, x);
    store_vector(tangent + j, x * centred);
    store_vector(g + j, x * of_s);
    store_vector(h + j, w);
  }
  const V w = broadcast<S>(total<S>(of_w));
  for (int64_t j = 0; j < columns; j += W) {
    store_vector(h + j, load_vector<V>(p + j) * (load_vector<V>(h + j) - w));
  }
}

// ---- heads and blocks of queries
// ----------------------------------------------------------------------------------------

template <typename T>
const T* of_head(const View& view, int64_t batch, int64_t head) {
  return static_cast<const T*>(view.data) + batch * view.strides[0] + head * view.strides[1];
}

// How the queries of a head of keys are cut into blocks and tasks: by shapes alone, so that results do not depend on
// the number of threads.
struct Cut {
  int64_t rows, per_head, blocks, splits;
  explicit Cut(const AttentionArgs& args) {
    const int64_t units = std::max<int64_t>(args.batch * args.kv_heads, 1);
    const int64_t most = std::clamp<int64_t>(kScores / std::max<int64_t>(args.keys, 1), 2 * kTall, kMostRows);
    rows = most / kTall * kTall;
    per_head = (args.queries + rows - 1) / rows;
    const int64_t shared = args.heads / std::max<int64_t>(args.kv_heads, 1);
    blocks = per_head * shared;
    splits = std::min((kTasks + units - 1) / units, std::max<int64_t>(args.queries * shared / kRowsOfATask, 1));
  }
};

// The memory of a thread, and a head of keys packed into it.
template <typename T>
class Head {
  using S = StateOf<T>;

 public:
  Head(const AttentionArgs& args, const Cut& cut)
      : args_(args),
        cut_(cut),
        padded_(round_up(args.keys, kPanel<S>)),
        size_(round_up(args.size, kPanel<S>)),
        value_size_(round_up(args.value_size, kPanel<S>)) {
    scores_.stride = padded_ + kPanel<S> / 2;  // not a power of two, whose rows would meet in the cache
    const int64_t n_scores = cut.rows * scores_.stride, wide = size_ + value_size_;
    const int64_t of_keys = 2 * (args.size + args.value_size) * padded_ + 2 * args.keys * wide;
    const int64_t of_rows = cut.rows * (2 * args.size + args.value_size + 2 * size_ + value_size_ + wide);
    memory_.reset(new S[4 * n_scores + of_keys + of_rows + padded_ + kPanel<S>]);
    S* next = memory_.get();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    scores_.p = take(n_scores), scores_.tangent = take(n_scores);
    scores_.g = take(n_scores), scores_.h = take(n_scores);
    keys_t_ = {take(2 * args.size * padded_), 2 * args.size};
    values_t_ = {take(2 * args.value_size * padded_), 2 * args.value_size};
    key_ = {take(args.keys * size_), args.keys}, b_ = {take(args.keys * size_), args.keys};
    value_ = {take(args.keys * value_size_), args.keys}, c_ = {take(args.keys * value_size_), args.keys};
    rows_ = take(cut.rows * 2 * args.size), grad_rows_ = take(cut.rows * args.value_size);
    a_ = {take(cut.rows * size_), cut.rows}, query_ = {take(cut.rows * size_), cut.rows};
    grad_ = {take(cut.rows * value_size_), cut.rows};
    out_ = take(cut.rows * wide);
    bias_ = take(padded_);
  }

  int64_t padded() const { return padded_; }
  int64_t size() const { return size_; }
  int64_t value_size() const { return value_size_; }

  void load(int64_t batch, int64_t kv_head) {
    batch_ = batch, kv_head_ = kv_head;
    const int64_t keys = args_.keys, size = args_.size, value_size = args_.value_size;
    const auto both = [&](const View& view, int64_t n, Panels<S> transposed, int64_t first, Panels<S> plain) {
      const T* data = of_head<T>(view, batch, kv_head);
      pack(transposed, first, n, keys, data, view.strides[3], view.strides[2], S(1));
      pack(plain, 0, keys, n, data, view.strides[2], view.strides[3], S(1));
    };
    both(args_.key, size, keys_t_, 0, key_);
    both(args_.b, size, keys_t_, size, b_);
    both(args_.value, value_size, values_t_, 0, value_);
    both(args_.c, value_size, values_t_, value_size, c_);
  }

  // Block `number` of this head's; adds to d_key, of padded() x size(), and d_value.
  void block(int64_t number, S* d_key, S* d_value) {
    const int64_t shared = args_.heads / args_.kv_heads;
    const int64_t head = kv_head_ * shared + number / cut_.per_head, first = number % cut_.per_head * cut_.rows;
    const int64_t rows = std::min(cut_.rows, args_.queries - first), tall = round_up(rows, kTall);
    const int64_t last = args_.has_diagonal ? first + rows + args_.diagonal : args_.keys;
    const int64_t keys = std::clamp<int64_t>(last, 0, args_.keys), columns = round_up(keys, kPanel<S>);
    load_rows(head, first, rows);
    const int64_t size = args_.size, value_size = args_.value_size, stride = scores_.stride;
    const Factor<S> ours{rows_, 2 * size, 1}, query{rows_ + size, 2 * size, 1}, grads{grad_rows_, value_size, 1};
    multiply<S>(tall, columns, size, query, keys_t_, 0, scores_.p, stride, false);
    multiply<S>(tall, columns, 2 * size, ours, keys_t_, 0, scores_.tangent, stride, false);
    multiply<S>(tall, columns, value_size, grads, values_t_, 0, scores_.g, stride, false);
    multiply<S>(tall, columns, value_size, grads, values_t_, value_size, scores_.h, stride, false);
    softmax(head, first, rows, keys, columns);
    const auto by_keys = [&](const S* scores, Panels<S> b, S* target, int64_t width, bool add) {
      multiply<S>(tall, width, keys, {scores, stride, 1}, b, 0, target, width, add);
    };
    S *d_query = out_, *d_grad = out_ + cut_.rows * size_;
    by_keys(scores_.tangent, value_, d_grad, value_size_, false);
    by_keys(scores_.p, c_, d_grad, value_size_, true);
    by_keys(scores_.g, b_, d_query, size_, false);
    by_keys(scores_.h, key_, d_query, size_, true);
    const auto by_rows = [&](const S* scores, Panels<S> b, S* target, int64_t width) {
      multiply<S>(columns, width, rows, {scores, 1, stride}, b, 0, target, width, true);
    };
    by_rows(scores_.g, a_, d_key, size_);
    by_rows(scores_.h, query_, d_key, size_);
    by_rows(scores_.tangent, grad_, d_value, value_size_);
    const auto write = [&](void* result, const S* from, int64_t n, int64_t width, S factor) {
      T* to = static_cast<T*>(result) + ((batch_ * args_.heads + head) * args_.queries + first) * n;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < n; ++j) store_to(to[i * n + j], factor * from[i * width + j]);
      }
    };
    write(args_.d_grad, d_grad, value_size, value_size_, S(1));
    write(args_.d_query, d_query, size, size_, S(args_.scale));
  }

 private:
  // scale * a and scale * Q side by side, O', and the same in panels.
  void load_rows(int64_t head, int64_t first, int64_t rows) {
    const auto both = [&](const View& view, int64_t n, S* to, int64_t stride, Panels<S> panels, S factor) {
      const T* data = of_head<T>(view, batch_, head) + first * view.strides[2];
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = data + i * view.strides[2];
        for (int64_t j = 0; j < n; ++j) to[i * stride + j] = factor * load_as(from[j * view.strides[3]]);
      }
      pack(panels, 0, rows, n, data, view.strides[2], view.strides[3], factor);
    };
    const S scale = S(args_.scale);
    both(args_.a, args_.size, rows_, 2 * args_.size, a_, scale);
    both(args_.query, args_.size, rows_ + args_.size, 2 * args_.size, query_, scale);
    both(args_.grad, args_.value_size, grad_rows_, args_.value_size, grad_, S(1));
  }

  void softmax(int64_t head, int64_t first, int64_t rows, int64_t keys, int64_t columns) {
    const View &lse = args_.logsumexp, &bias = args_.bias;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t query = first + i, last = args_.has_diagonal ? query + args_.diagonal + 1 : keys;
      if (bias.data != nullptr) {
        const S* from = of_head<S>(bias, batch_, head) + query * bias.strides[2];
        for (int64_t j = 0; j < keys; ++j) bias_[j] = from[j * bias.strides[3]];
        std::fill(bias_ + keys, bias_ + columns, S(0));
      }
      const int64_t at = i * scores_.stride;
      softmax_row<S>(scores_.p + at, scores_.tangent + at, scores_.g + at, scores_.h + at,
                     bias.data == nullptr ? nullptr : bias_, of_head<S>(lse, batch_, head)[query * lse.strides[2]],
                     std::clamp<int64_t>(last, 0, keys), columns);
    }
  }

  const AttentionArgs& args_;
  const Cut& cut_;
  const int64_t padded_, size_, value_size_;
  int64_t batch_ = 0, kv_head_ = 0;
  std::unique_ptr<S[]> memory_;
  Scores<S> scores_;
  Panels<S> keys_t_, values_t_, key_, b_, value_, c_, a_, query_, grad_;
  S *rows_, *grad_rows_, *out_, *bias_;
};

template <typename T>
void run(const AttentionArgs& args, const Context& context) {
  using S = StateOf<T>;
  const Cut cut(args);
  const int64_t units = args.batch * args.kv_heads;
  const int64_t padded = round_up(args.keys, kPanel<S>);
  const int64_t n_key = padded * round_up(args.size, kPanel<S>),
                n_value = padded * round_up(args.value_size, kPanel<S>);
  // Each task has sums of its own, which add up in a fixed order.
  S* sums = static_cast<S*>(context.allocate(units * cut.splits * (n_key + n_value) * sizeof(S)));
  context.parallel_for(0, units * cut.splits, 1, [&](int64_t begin, int64_t end) {
    Head<T> head(args, cut);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / cut.splits;
      S* d_key = sums + task * (n_key + n_value);
      std::fill(d_key, d_key + n_key + n_value, S(0));
      if (std::exchange(loaded, unit) != unit) head.load(unit / args.kv_heads, unit % args.kv_heads);
      for (int64_t block = task % cut.splits; block < cut.blocks; block += cut.splits) {
        head.block(block, d_key, d_key + n_key);
      }
    }
  });
  context.parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const S* parts = sums + unit * cut.splits * (n_key + n_value);
      const auto write = [&](void* result, const S* first, int64_t n) {
        T* to = static_cast<T*>(result) + unit * args.keys * n;
        const int64_t width = round_up(n, kPanel<S>);
        for (int64_t i = 0; i < args.keys; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            S sum = first[i * width + j];
            for (int64_t k = 1; k < cut.splits; ++k) sum += first[k * (n_key + n_value) + i * width + j];
            store_to(to[i * n + j], sum);
          }
        }
      };
      write(args.d_key, parts, args.size);
      write(args.d_value, parts + n_key, args.value_size);
    }
  });
}

}  // namespace

void attention_double_backward(const AttentionArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) { run<decltype(type)>(args, context); });
}

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
