// The passes of attention; compiled once for each instruction set, with ADAHESSIAN_ISA as its name.
// adahessian_fused/friendly/attention_dropout.py and attention_double_backward.py have the formulas, and the names used
// here.
//
// A block of queries has all of its scores at once: up to four rows of numbers for each, which stay in the cache, so
// that the products (2, 5 or 12) are computed once. Factors are packed into panels, a few vectors wide, as the
// product's inner loop reads them. Keys after the diagonal are left out, 2 vectors at a time.
#include "../attention.h"

#include <memory>

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
  S *p, *tangent, *g, *h;  // P, and the tangent of S, G and H; afterwards what softmax_row says
  int64_t stride;
};

template <typename S>
ADAHESSIAN_HD S total(Vector<S> x) {
  S sum = 0;
  for (int l = 0; l < kLanes<S>; ++l) sum += x[l];
  return sum;
}

// The factors of a row's weights, of which the first is number `number`: 0 or dropout.factor. `words` has room for
// them.
template <typename S>
[[gnu::noinline]] void draw_mask(const Dropout& dropout, uint64_t number, int64_t columns, uint32_t* words, S* mask) {
  using U = Bits<float>;
  constexpr int W = kLanes<float>;
  const PhiloxKeys keys{uint32_t(dropout.seed), uint32_t(dropout.seed >> 32)};
  const U zero{}, lanes = U(lane_numbers<float>());
  number += dropout.offset;
  const int64_t skipped = int64_t(number % 4);
  for (int64_t j = 0; j < skipped + columns; j += 4 * W) {
    const uint64_t first = (number + uint64_t(j)) / 4;
    const U low = lanes + uint32_t(first), carry = U(low < zero + uint32_t(first));  // -1
    const PhiloxWords<U> w = philox4x32<U>(low, zero + uint32_t(first >> 32) - carry, zero, zero, keys);
    const U even[] = {interleaved<0>(w.word[0], w.word[2]), interleaved<1>(w.word[0], w.word[2])};
    const U odd[] = {interleaved<0>(w.word[1], w.word[3]), interleaved<1>(w.word[1], w.word[3])};
    for (int half = 0; half < 2; ++half) {
      store_vector(words + j + (2 * half) * W, interleaved<0>(even[half], odd[half]));
      store_vector(words + j + (2 * half + 1) * W, interleaved<1>(even[half], odd[half]));
    }
  }
  const S factor = S(dropout.factor);
  for (int64_t j = 0; j < columns; ++j) mask[j] = words[skipped + j] >= dropout.least ? factor : S(0);
}

// A row of what is added to scores, of the factors of weights, or 1 where there are none.
template <typename S>
struct Row {
  const S *bias, *mask;
  int64_t seen, columns;  // keys from `seen` up to `columns`, a multiple of vectors, are masked

  Vector<S> score(const S* p, int64_t j) const {
    const Vector<S> s = load_vector<Vector<S>>(p + j);
    return bias == nullptr ? s : s + load_vector<Vector<S>>(bias + j);
  }
  Index<S> is_seen(int64_t j) const {
    using N = typename Integers<S>::Signed;
    return lane_numbers<S>() + N(j) < Index<S>{} + N(seen);
  }
  Vector<S> kept(Vector<S> x, int64_t j) const { return mask == nullptr ? x : x * load_vector<Vector<S>>(mask + j); }
};

// e^x; NaN stays NaN.
template <typename S>
ADAHESSIAN_HD Vector<S> weight(Vector<S> x) {
  return exponential<S>(x) + where<S>(x != x, x);
}

// p has S at first, and what is kept of P then. Returns the logsumexp; 0 where nothing is seen.
template <typename S>
[[gnu::noinline]] S forward_row(S* p, const Row<S>& row) {
  using V = Vector<S>;
  constexpr int64_t W = kLanes<S>;
  const V none = broadcast<S>(-S(INFINITY));
  V highest_of = none;
  for (int64_t j = 0; j < row.seen; j += W) {
    const V x = row.is_seen(j) ? row.score(p, j) : none;
    highest_of = x > highest_of ? x : highest_of;
  }
  S highest = -S(INFINITY);
  for (int l = 0; l < W; ++l) highest = std::max(highest, S(highest_of[l]));
  if (highest == -S(INFINITY)) highest = 0;
  V of_p{};
  for (int64_t j = 0; j < row.columns; j += W) {
    V x = weight<S>(row.score(p, j) - broadcast<S>(highest));
    if (j + W > row.seen) x = where<S>(row.is_seen(j), x);
    of_p += x;
    store_vector(p + j, x);
  }
  const S sum = total<S>(of_p);
  const V factor = broadcast<S>(sum == 0 ? S(0) : 1 / sum);
  for (int64_t j = 0; j < row.columns; j += W) store_vector(p + j, row.kept(factor * load_vector<V>(p + j), j));
  return sum == 0 ? S(0) : highest + std::log(sum);
}

// p has S at first. Afterwards p has what is kept of P; tangent, if `twice`, of the tangent of P; g has S', and h the
// tangent of S'.
template <bool twice, typename S>
[[gnu::noinline]] void softmax_row(S* p, S* tangent, S* g, S* h, const Row<S>& row, S logsumexp) {
  using V = Vector<S>;
  constexpr int64_t W = kLanes<S>;
  V of_p{}, of_tangent{}, of_g{}, of_w{};  // W but for what is the same in the whole row
  const V lse = broadcast<S>(logsumexp);
  for (int64_t j = 0; j < row.columns; j += W) {
    V x = row.score(p, j) - lse;
    x = twice ? exponential<S>(x) : weight<S>(x);
    if (j + W > row.seen) x = where<S>(row.is_seen(j), x);
    of_p += x;
    const V gj = row.kept(load_vector<V>(g + j), j);
    of_g += x * gj;
    store_vector(g + j, gj);
    if constexpr (twice) of_tangent += x * load_vector<V>(tangent + j);
    store_vector(p + j, x);
  }
  // The logsumexp of large scores is rounded, so that P adds up to something else than 1, which would not cancel below.
  const S sum = total<S>(of_p), factor = sum > 0 ? 1 / sum : S(0);
  const V factor_v = broadcast<S>(factor);
  const V mu = broadcast<S>(factor * total<S>(of_tangent)), d = broadcast<S>(factor * total<S>(of_g));
  for (int64_t j = 0; j < row.columns; j += W) {
    const V x = factor_v * load_vector<V>(p + j);
    const V of_s = load_vector<V>(g + j) - d;
    store_vector(g + j, x * of_s);
    store_vector(p + j, twice ? x : row.kept(x, j));
    if constexpr (twice) {
      const V centred = load_vector<V>(tangent + j) - mu;
      const V w = centred * of_s + row.kept(load_vector<V>(h + j), j);
      of_w += x * w;
      store_vector(tangent + j, row.kept(x * centred, j));
      store_vector(h + j, w);
    }
  }
  if constexpr (!twice) return;
  const V w = broadcast<S>(total<S>(of_w));
  for (int64_t j = 0; j < row.columns; j += W) {
    const V x = load_vector<V>(p + j);
    store_vector(h + j, x * (load_vector<V>(h + j) - w));
    store_vector(p + j, row.kept(x, j));
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
    memory_.reset(new S[4 * n_scores + of_keys + of_rows + 2 * padded_ + kPanel<S>]);
    words_.reset(new uint32_t[padded_ + 3 + 4 * kLanes<float>]);
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
    bias_ = take(padded_), mask_ = take(padded_);
  }

  int64_t padded() const { return padded_; }
  int64_t size() const { return size_; }
  int64_t value_size() const { return value_size_; }

  void load(int64_t batch, int64_t kv_head) {
    batch_ = batch, kv_head_ = kv_head;
    const int64_t keys = args_.keys, size = args_.size, value_size = args_.value_size;
    const auto both = [&](const View& view, int64_t n, Panels<S> transposed, int64_t first, Panels<S> plain) {
      if (view.data == nullptr) return;
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
    const bool forward = args_.pass == AttentionPass::kForward, twice = args_.pass == AttentionPass::kDoubleBackward;
    const int64_t shared = args_.heads / args_.kv_heads;
    const int64_t head = kv_head_ * shared + number / cut_.per_head, first = number % cut_.per_head * cut_.rows;
    const int64_t rows = std::min(cut_.rows, args_.queries - first), tall = round_up(rows, kTall);
    const int64_t last = args_.has_diagonal ? first + rows + args_.diagonal : args_.keys;
    const int64_t keys = std::clamp<int64_t>(last, 0, args_.keys), columns = round_up(keys, kPanel<S>);
    load_rows(head, first, rows);
    const int64_t size = args_.size, value_size = args_.value_size, stride = scores_.stride;
    const Factor<S> ours{rows_, 2 * size, 1}, query{rows_ + size, 2 * size, 1}, grads{grad_rows_, value_size, 1};
    const auto by_size = [&](Factor<S> a, int64_t depth, Panels<S> b, int64_t from, S* scores) {
      multiply<S>(tall, columns, depth, a, b, from, scores, stride, false);
    };
    by_size(query, size, keys_t_, 0, scores_.p);
    if (!forward) by_size(grads, value_size, values_t_, 0, scores_.g);
    if (twice) {
      by_size(ours, 2 * size, keys_t_, 0, scores_.tangent);
      by_size(grads, value_size, values_t_, value_size, scores_.h);
    }
    softmax(head, first, rows, keys, columns);
    const auto by_keys = [&](const S* scores, Panels<S> b, S* target, int64_t width, bool add) {
      multiply<S>(tall, width, keys, {scores, stride, 1}, b, 0, target, width, add);
    };
    const auto by_rows = [&](const S* scores, Panels<S> b, S* target, int64_t width) {
      multiply<S>(columns, width, rows, {scores, 1, stride}, b, 0, target, width, true);
    };
    S *d_query = out_, *d_grad = out_ + cut_.rows * size_;
    if (forward) {
      by_keys(scores_.p, value_, d_grad, value_size_, false);
    } else if (!twice) {
      by_keys(scores_.g, key_, d_query, size_, false);
      by_rows(scores_.g, query_, d_key, size_);
      by_rows(scores_.p, grad_, d_value, value_size_);
    } else {
      by_keys(scores_.tangent, value_, d_grad, value_size_, false);
      by_keys(scores_.p, c_, d_grad, value_size_, true);
      by_keys(scores_.g, b_, d_query, size_, false);
      by_keys(scores_.h, key_, d_query, size_, true);
      by_rows(scores_.g, a_, d_key, size_);
      by_rows(scores_.h, query_, d_key, size_);
      by_rows(scores_.tangent, grad_, d_value, value_size_);
    }
    const auto write = [&](void* result, const S* from, int64_t n, int64_t width, S factor) {
      if (result == nullptr) return;
      T* to = static_cast<T*>(result) + (row_of(head) + first) * n;
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
      if (view.data == nullptr) return;
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

  int64_t row_of(int64_t head) const { return (batch_ * args_.heads + head) * args_.queries; }

  void softmax(int64_t head, int64_t first, int64_t rows, int64_t keys, int64_t columns) {
    const View &lse = args_.logsumexp, &bias = args_.bias;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t query = first + i, last = args_.has_diagonal ? query + args_.diagonal + 1 : keys;
      if (bias.data != nullptr) {
        const S* from = of_head<S>(bias, batch_, head) + query * bias.strides[2];
        for (int64_t j = 0; j < keys; ++j) bias_[j] = from[j * bias.strides[3]];
        std::fill(bias_ + keys, bias_ + columns, S(0));
      }
      const int64_t number = row_of(head) + query;
      if (args_.dropout.drops) draw_mask(args_.dropout, uint64_t(number * args_.keys), columns, words_.get(), mask_);
      const Row<S> row{bias.data == nullptr ? nullptr : bias_, args_.dropout.drops ? mask_ : nullptr,
                       std::clamp<int64_t>(last, 0, keys), columns};
      const int64_t at = i * scores_.stride;
      S *p = scores_.p + at, *tangent = scores_.tangent + at, *g = scores_.g + at, *h = scores_.h + at;
      if (args_.pass == AttentionPass::kForward) {
        static_cast<S*>(args_.row_sums)[number] = forward_row<S>(p, row);
        continue;
      }
      const S logsumexp = of_head<S>(lse, batch_, head)[query * lse.strides[2]];
      if (args_.pass == AttentionPass::kBackward) {
        softmax_row<false, S>(p, tangent, g, h, row, logsumexp);
      } else {
        softmax_row<true, S>(p, tangent, g, h, row, logsumexp);
      }
    }
  }

  const AttentionArgs& args_;
  const Cut& cut_;
  const int64_t padded_, size_, value_size_;
  int64_t batch_ = 0, kv_head_ = 0;
  std::unique_ptr<S[]> memory_;
  Scores<S> scores_;
  Panels<S> keys_t_, values_t_, key_, b_, value_, c_, a_, query_, grad_;
  S *rows_, *grad_rows_, *out_, *bias_, *mask_;
  std::unique_ptr<uint32_t[]> words_;  // of a row
};

template <typename T>
void run(const AttentionArgs& args, const Context& context) {
  using S = StateOf<T>;
  const Cut cut(args);
  const int64_t units = args.batch * args.kv_heads;
  const int64_t padded = round_up(args.keys, kPanel<S>);
  const int64_t n_key = padded * round_up(args.size, kPanel<S>),
                n_value = padded * round_up(args.value_size, kPanel<S>);
  // Each task has sums of its own, which add up in a fixed order; the forward pass has none.
  const int64_t n_sums = args.pass == AttentionPass::kForward ? 0 : n_key + n_value;
  S* sums = static_cast<S*>(context.allocate(units * cut.splits * n_sums * sizeof(S)));
  context.parallel_for(0, units * cut.splits, 1, [&](int64_t begin, int64_t end) {
    Head<T> head(args, cut);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / cut.splits;
      S* d_key = sums + task * n_sums;
      std::fill(d_key, d_key + n_sums, S(0));
      if (std::exchange(loaded, unit) != unit) head.load(unit / args.kv_heads, unit % args.kv_heads);
      for (int64_t block = task % cut.splits; block < cut.blocks; block += cut.splits) {
        head.block(block, d_key, d_key + n_key);
      }
    }
  });
  if (n_sums == 0) return;
  context.parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const S* parts = sums + unit * cut.splits * n_sums;
      const auto write = [&](void* result, const S* first, int64_t n) {
        T* to = static_cast<T*>(result) + unit * args.keys * n;
        const int64_t width = round_up(n, kPanel<S>);
        for (int64_t i = 0; i < args.keys; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            S sum = first[i * width + j];
            for (int64_t k = 1; k < cut.splits; ++k) sum += first[k * n_sums + i * width + j];
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

void attention(const AttentionArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto type) { run<decltype(type)>(args, context); });
}

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
