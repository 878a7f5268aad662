// Recurrent layers; compiled once for each instruction set, with ADAHESSIAN_ISA as its name.
// adahessian_fused/friendly/recurrence.py has the formulas, and the names used here.
//
// Sequences do not depend on each other: a task takes some of them through all steps, with the states in its cache, so
// that threads never wait for each other and results do not depend on their number.
#include "../recurrence.h"

#include "products.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {
namespace {

constexpr int64_t kInCache = 512 * 1024;  // bytes of recurrent weights that every step of a few sequences may read

// ---- cells, a vector of each of their numbers at a time
// --------------------------------------------------------------

// Coefficients of a step's tangent, or their tangents.
template <typename S>
struct Coefficients {
  Vector<S> k[4], carry, out;
};

template <typename S>
ADAHESSIAN_HD Vector<S> slope(Vector<S> sigmoid) {
  return sigmoid * (S(1) - sigmoid);
}

// kSaved gates are kept; kGates have arguments, of which the inputs contribute to the first kInputs and the previous
// states to the last kHidden.
template <typename S>
struct Lstm {
  using V = Vector<S>;
  static constexpr int kSaved = 5, kGates = 4, kInputs = 4, kHidden = 4, kStates = 2;
  static constexpr bool kCarries = true;
  ADAHESSIAN_MEMBER static void step(const V* a, const V* u, V* state, V* gates) {
    for (int i = 0; i < 4; ++i) {
      gates[i] = i == 2 ? hyperbolic_tangent<S>(a[i] + u[i]) : sigmoid<S>(a[i] + u[i]);
    }
    state[1] = gates[1] * state[1] + gates[0] * gates[2];
    gates[4] = hyperbolic_tangent<S>(state[1]);
    state[0] = gates[3] * gates[4];
  }
  ADAHESSIAN_MEMBER static Coefficients<S> coefficients(const V* gates, const V* previous) {
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3], t = gates[4];
    return {{g * slope<S>(i), previous[1] * slope<S>(f), i * (S(1) - g * g), t * slope<S>(o)}, f, o * (S(1) - t * t)};
  }
  // d_c: the tangent of c.
  ADAHESSIAN_MEMBER static Coefficients<S> changes(const V* gates, const V* previous, const V* arguments, V d_c,
                                                   const V* d_previous) {
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3], t = gates[4];
    const V s_i = slope<S>(i), s_f = slope<S>(f), s_g = S(1) - g * g, s_o = slope<S>(o), s_t = S(1) - t * t;
    const V d_i = s_i * arguments[0], d_f = s_f * arguments[1], d_g = s_g * arguments[2], d_o = s_o * arguments[3];
    const V d_t = s_t * d_c;
    return {{d_g * s_i + g * (S(1) - S(2) * i) * d_i, d_previous[1] * s_f + previous[1] * (S(1) - S(2) * f) * d_f,
             d_i * s_g - S(2) * i * g * d_g, d_t * s_o + t * (S(1) - S(2) * o) * d_o},
            d_f,
            d_o * s_t - S(2) * o * t * d_t};
  }
};

template <typename S>
struct Gru {
  using V = Vector<S>;
  static constexpr int kSaved = 4, kGates = 4, kInputs = 3, kHidden = 3, kStates = 1;
  static constexpr bool kCarries = true;
  ADAHESSIAN_MEMBER static void step(const V* a, const V* u, V* state, V* gates) {
    const V r = sigmoid<S>(a[1] + u[0]), z = sigmoid<S>(a[2] + u[1]), n = hyperbolic_tangent<S>(a[0] + r * u[2]);
    gates[0] = n, gates[1] = r, gates[2] = z, gates[3] = u[2];
    state[0] = n + z * (state[0] - n);
  }
  ADAHESSIAN_MEMBER static Coefficients<S> coefficients(const V* gates, const V* previous) {
    const V n = gates[0], r = gates[1], z = gates[2], q = gates[3];
    const V k_n = (S(1) - z) * (S(1) - n * n), k_q = k_n * r;
    return {{k_n, k_q * q * (S(1) - r), (previous[0] - n) * slope<S>(z), k_q}, z, V{}};
  }
  ADAHESSIAN_MEMBER static Coefficients<S> changes(const V* gates, const V* previous, const V* arguments, V,
                                                   const V* d_previous) {
    const V n = gates[0], r = gates[1], z = gates[2], q = gates[3], d_q = arguments[3];
    const V s_n = S(1) - n * n, s_r = slope<S>(r), s_z = slope<S>(z);
    const V d_r = s_r * arguments[1], d_z = s_z * arguments[2];
    const V d_n = s_n * (arguments[0] + r * d_q + q * d_r);
    const V k_n = (S(1) - z) * s_n, d_k_n = -d_z * s_n - S(2) * n * d_n * (S(1) - z);
    return {{d_k_n, d_k_n * q * s_r + k_n * (d_q * s_r + q * (S(1) - S(2) * r) * d_r),
             (d_previous[0] - d_n) * s_z + (previous[0] - n) * (S(1) - S(2) * z) * d_z, d_k_n * r + k_n * d_r},
            d_z,
            V{}};
  }
};

template <typename S, bool is_tanh>
struct Simple {
  using V = Vector<S>;
  static constexpr int kSaved = 1, kGates = 1, kInputs = 1, kHidden = 1, kStates = 1;
  static constexpr bool kCarries = false;
  ADAHESSIAN_MEMBER static void step(const V* a, const V* u, V* state, V* gates) {
    const V x = a[0] + u[0];
    state[0] = gates[0] = is_tanh ? hyperbolic_tangent<S>(x) : where<S>(~(x <= V{}), x);  // NaN stays NaN
  }
  ADAHESSIAN_MEMBER static Coefficients<S> coefficients(const V* gates, const V*) {
    return {{is_tanh ? S(1) - gates[0] * gates[0] : where<S>(gates[0] > V{}, broadcast<S>(S(1)))}, V{}, V{}};
  }
  ADAHESSIAN_MEMBER static Coefficients<S> changes(const V* gates, const V*, const V*, V d_h, const V*) {
    return {{is_tanh ? S(-2) * gates[0] * d_h : V{}}, V{}, V{}};
  }
};

// ---- sequences
// -------------------------------------------------------------------------------------------------------

// `n` numbers, at most a vector, and zeros.
template <typename S>
ADAHESSIAN_HD Vector<S> load(const S* from, int64_t n) {
  if (n >= kLanes<S>) return load_vector<Vector<S>>(from);
  Vector<S> vector{};
  memcpy(&vector, from, n * sizeof(S));
  return vector;
}
template <typename S>
ADAHESSIAN_HD void store(S* to, Vector<S> vector, int64_t n) {
  if (n >= kLanes<S>) {
    store_vector(to, vector);
  } else {
    memcpy(to, &vector, n * sizeof(S));
  }
}
// The same of `count` parts of a row, `stride` apart.
template <int count, typename S>
ADAHESSIAN_HD void load(Vector<S>* to, const S* from, int64_t stride, int64_t n) {
  for (int i = 0; i < count; ++i) to[i] = load(from + i * stride, n);
}
template <int count, typename S>
ADAHESSIAN_HD void store(S* to, int64_t stride, const Vector<S>* from, int64_t n) {
  for (int i = 0; i < count; ++i) store(to + i * stride, from[i], n);
}

struct Step {
  int64_t first, rows;
};

std::vector<Step> steps_of(const Recurrence& layer) {
  std::vector<Step> steps;
  const int64_t n = layer.sizes.empty() ? layer.rows / layer.batch : int64_t(layer.sizes.size());
  for (int64_t i = 0, first = 0; i < n; ++i) {
    steps.push_back({first, layer.sizes.empty() ? layer.batch : layer.sizes[i]});
    first += steps.back().rows;
  }
  if (layer.reverse) std::reverse(steps.begin(), steps.end());
  return steps;
}

// The sequences of a task, and its memory: their states and the product of the recurrent weight with one of them.
template <typename S, typename Cell>
class Sequences {
 public:
  static int64_t at_once(const Recurrence& layer) {
    const bool small = Cell::kHidden * layer.size * layer.size * int64_t(sizeof(S)) <= kInCache;
    return small ? kTall : 4 * kTall;
  }

  Sequences(const Recurrence& layer, int64_t number)
      : layer_(layer),
        width_(round_up(layer.size, kPanel<S>)),
        hidden_(round_up(Cell::kHidden * layer.size, kPanel<S>)),
        first_(number * at_once(layer)),
        count_(std::min(at_once(layer), layer.batch - first_)),
        memory_(at_once(layer) * (Cell::kStates * width_ + hidden_)) {}

  S* state(int64_t sequence) { return memory_.data() + sequence * width_; }  // h; c is per_state() numbers further
  S* hidden(int64_t sequence) { return memory_.data() + Cell::kStates * per_state() + sequence * hidden_; }
  int64_t per_state() const { return at_once(layer_) * width_; }

  void load_states(const S* from) {
    each_state([&](S* state, int64_t at) { memcpy(state, from + at, layer_.size * sizeof(S)); });
  }
  void clear_states() { std::fill(memory_.begin(), memory_.end(), S(0)); }
  void store_states(S* to) {
    each_state([&](const S* state, int64_t at) { memcpy(to + at, state, layer_.size * sizeof(S)); });
  }

  // hidden = h w^T, of the first n sequences.
  void to_hidden(int64_t n, Panels<S> w) {
    multiply<S>(round_up(n, kTall / 2), round_up(Cell::kHidden * layer_.size, kLanes<S>), layer_.size,
                {state(0), width_, 1}, w, 0, hidden(0), hidden_, false);
  }
  // h += hidden w, of the first n sequences; the others keep theirs.
  void add_to_state(int64_t n, Panels<S> w) {
    for (int64_t s = n; s < round_up(n, kTall / 2); ++s) std::fill_n(hidden(s), hidden_, S(0));
    multiply<S>(round_up(n, kTall / 2), round_up(layer_.size, kLanes<S>), Cell::kHidden * layer_.size,
                {hidden(0), hidden_, 1}, w, 0, state(0), width_, true);
  }

  // How many of these sequences run in a step, and the row of the first.
  Step of(const Step& step) const { return {step.first + first_, std::clamp<int64_t>(step.rows - first_, 0, count_)}; }
  // body(sequence, row, column, n) for all vectors of a step's rows.
  template <typename Body>
  void each(const Step& step, const Body& body) const {
    for (int64_t s = 0; s < step.rows; ++s) {
      for (int64_t j = 0; j < layer_.size; j += kLanes<S>) {
        body(s, step.first + s, j, std::min<int64_t>(kLanes<S>, layer_.size - j));
      }
    }
  }

 private:
  template <typename Body>
  void each_state(const Body& body) {
    for (int64_t i = 0; i < Cell::kStates; ++i) {
      for (int64_t s = 0; s < count_; ++s) {
        body(state(s) + i * per_state(), (i * layer_.batch + first_ + s) * layer_.size);
      }
    }
  }

  const Recurrence& layer_;
  const int64_t width_, hidden_, first_, count_;
  std::vector<S> memory_;
};

// run(sequences) for all of them.
template <typename S, typename Cell, typename Run>
void for_all(const Recurrence& layer, const Context& context, const Run& run) {
  const int64_t rows = Sequences<S, Cell>::at_once(layer);
  context.parallel_for(0, (layer.batch + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Sequences<S, Cell> sequences(layer, i);
      run(sequences);
    }
  });
}

// The recurrent weight as the second factor of h w^T, or of hidden w.
template <typename S, typename Cell>
Panels<S> packed(const Recurrence& layer, const void* w, bool transposed, const Context& context) {
  const int64_t hidden = Cell::kHidden * layer.size;
  const int64_t rows = transposed ? layer.size : hidden, columns = transposed ? hidden : layer.size;
  Panels<S> panels{static_cast<S*>(context.allocate(rows * round_up(columns, kPanel<S>) * sizeof(S))), rows};
  const int64_t across = transposed ? 1 : layer.size, along = transposed ? layer.size : 1;
  pack<S>(panels, 0, rows, columns, static_cast<const S*>(w), across, along, S(1));
  return panels;
}

// ---- the three passes
// ------------------------------------------------------------------------------------------------

template <typename S, typename Cell>
void run(const RecurrenceArgs& args, const Context& context) {
  using V = Vector<S>;
  const Recurrence& layer = args.layer;
  const int64_t H = layer.size, per_state = layer.rows * H;
  const std::vector<Step> steps = steps_of(layer);
  const Panels<S> w = packed<S, Cell>(layer, args.w, true, context);
  const S *a = static_cast<const S*>(args.a), *b = static_cast<const S*>(args.b);
  S *y = static_cast<S*>(args.y), *gates = static_cast<S*>(args.gates), *previous = static_cast<S*>(args.previous);
  for_all<S, Cell>(layer, context, [&](Sequences<S, Cell>& mine) {
    mine.load_states(static_cast<const S*>(args.state));
    for (const Step& all : steps) {
      const Step step = mine.of(all);
      if (step.rows == 0) continue;
      mine.to_hidden(step.rows, w);
      mine.each(step, [&](int64_t s, int64_t row, int64_t j, int64_t n) {
        V inputs[Cell::kInputs], hidden[Cell::kHidden], state[Cell::kStates], found[Cell::kSaved];
        load<Cell::kInputs>(inputs, a + row * Cell::kInputs * H + j, H, n);
        load<Cell::kHidden>(hidden, mine.hidden(s) + j, H, n);
        load<Cell::kStates>(state, mine.state(s) + j, mine.per_state(), n);
        if (b != nullptr) hidden[Cell::kHidden - 1] += load(b + j, n);
        store<Cell::kStates>(previous + row * H + j, per_state, state, n);
        Cell::step(inputs, hidden, state, found);
        store<Cell::kSaved>(gates + row * Cell::kSaved * H + j, H, found, n);
        store<Cell::kStates>(mine.state(s) + j, mine.per_state(), state, n);
        store(y + row * H + j, state[0], n);
      });
    }
    mine.store_states(static_cast<S*>(args.final));
  });
}

// The gradients of a step's arguments, into memory and into hidden, and what the previous states get but for the
// product with the weight.
template <typename S, typename Cell>
struct Adjoint {
  using V = Vector<S>;
  static constexpr int kLast = Cell::kStates - 1;
  V state[2], gates[Cell::kGates];  // of h and c, which of a GRU are one

  ADAHESSIAN_MEMBER Adjoint(const Coefficients<S>& c, const V* given) {
    for (int i = 0; i < Cell::kStates; ++i) state[i] = given[i];
    if constexpr (Cell::kStates == 2) state[1] += c.out * state[0];
  }
  // Adds coefficients times gradients.
  ADAHESSIAN_MEMBER void add_gates(const Coefficients<S>& c, const V* of) {
    for (int i = 0; i < Cell::kGates; ++i) gates[i] += c.k[i] * of[Cell::kStates == 2 && i == 3 ? 0 : kLast];
  }
  ADAHESSIAN_MEMBER void write(S* memory, S* hidden, int64_t size, int64_t n) const {
    store<Cell::kGates>(memory, size, gates, n);
    store<Cell::kHidden>(hidden, size, gates + Cell::kGates - Cell::kHidden, n);
  }
};

template <typename S, typename Cell>
void run(const RecurrenceBackwardArgs& args, const Context& context) {
  using V = Vector<S>;
  const Recurrence& layer = args.layer;
  const int64_t H = layer.size, per_state = layer.rows * H;
  const std::vector<Step> steps = steps_of(layer);
  const Panels<S> w = packed<S, Cell>(layer, args.w, false, context);
  const S *grad = static_cast<const S*>(args.grad), *gates = static_cast<const S*>(args.gates);
  const S* previous = static_cast<const S*>(args.previous);
  S *d_gates = static_cast<S*>(args.d_gates), *d_each = static_cast<S*>(args.d_each);
  for_all<S, Cell>(layer, context, [&](Sequences<S, Cell>& mine) {
    mine.load_states(static_cast<const S*>(args.final));
    for (int64_t i = int64_t(steps.size()); i-- > 0;) {
      const Step step = mine.of(steps[i]);
      if (step.rows == 0) continue;
      mine.each(step, [&](int64_t s, int64_t row, int64_t j, int64_t n) {
        V saved[Cell::kSaved], before[Cell::kStates], state[Cell::kStates], next[2] = {};
        load<Cell::kSaved>(saved, gates + row * Cell::kSaved * H + j, H, n);
        load<Cell::kStates>(before, previous + row * H + j, per_state, n);
        load<Cell::kStates>(state, mine.state(s) + j, mine.per_state(), n);
        if (grad != nullptr) state[0] += load(grad + row * H + j, n);
        const Coefficients<S> c = Cell::coefficients(saved, before);
        Adjoint<S, Cell> adjoint(c, state);
        for (V& gate : adjoint.gates) gate = V{};
        adjoint.add_gates(c, adjoint.state);
        adjoint.write(d_gates + row * Cell::kGates * H + j, mine.hidden(s) + j, H, n);
        store<Cell::kStates>(d_each + row * H + j, per_state, adjoint.state, n);
        if (Cell::kCarries) next[Cell::kStates - 1] = c.carry * adjoint.state[Cell::kStates - 1];
        store<Cell::kStates>(mine.state(s) + j, mine.per_state(), next, n);
      });
      mine.add_to_state(step.rows, w);
    }
    mine.store_states(static_cast<S*>(args.d_state));
  });
}

template <typename S, typename Cell>
void run(const RecurrenceDoubleBackwardArgs& args, const Context& context) {
  using V = Vector<S>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kLast = kStates - 1;
  const Recurrence& layer = args.layer;
  const int64_t H = layer.size, per_state = layer.rows * H;
  const std::vector<Step> steps = steps_of(layer);
  const Panels<S> w_t = packed<S, Cell>(layer, args.w, true, context),
                  w = packed<S, Cell>(layer, args.w, false, context);
  const S *p = static_cast<const S*>(args.p), *gates = static_cast<const S*>(args.gates);
  const S *previous = static_cast<const S*>(args.previous), *d_each = static_cast<const S*>(args.d_each);
  const S* on_h = static_cast<const S*>(args.on_h);
  S *t_h = static_cast<S*>(args.t_h), *t_before = static_cast<S*>(args.t_before);
  S* t_gates = static_cast<S*>(args.t_gates);  // first the tangents of the arguments, then what is asked for
  S* t_c = kStates == 2 ? static_cast<S*>(context.allocate(2 * per_state * sizeof(S))) : nullptr;  // before and after
  for_all<S, Cell>(layer, context, [&](Sequences<S, Cell>& mine) {
    mine.load_states(static_cast<const S*>(args.state));
    for (const Step& all : steps) {
      const Step step = mine.of(all);
      if (step.rows == 0) continue;
      mine.to_hidden(step.rows, w_t);
      mine.each(step, [&](int64_t s, int64_t row, int64_t j, int64_t n) {
        V saved[Cell::kSaved], before[kStates], state[kStates], arguments[kGates], hidden[Cell::kHidden];
        const int64_t at = row * H + j;
        load<Cell::kSaved>(saved, gates + row * Cell::kSaved * H + j, H, n);
        load<kStates>(before, previous + at, per_state, n);
        load<kStates>(state, mine.state(s) + j, mine.per_state(), n);
        load<kGates>(arguments, p + row * kGates * H + j, H, n);
        load<Cell::kHidden>(hidden, mine.hidden(s) + j, H, n);
        for (int i = 0; i < Cell::kHidden; ++i) arguments[kGates - Cell::kHidden + i] += hidden[i];
        store(t_before + at, state[0], n);
        if (kStates == 2) store(t_c + at, state[kLast], n);
        const Coefficients<S> c = Cell::coefficients(saved, before);
        V sum = Cell::kCarries ? c.carry * state[kLast] : V{};
        for (int i = 0; i < kGates - (kStates == 2); ++i) sum += c.k[i] * arguments[i];
        state[kLast] = sum;
        if (kStates == 2) {
          store(t_c + per_state + at, sum, n);
          state[0] = c.out * sum + c.k[3] * arguments[kGates - 1];
        }
        store<kGates>(t_gates + row * kGates * H + j, H, arguments, n);
        store(t_h + at, state[0], n);
        store<kStates>(mine.state(s) + j, mine.per_state(), state, n);
      });
    }
    mine.store_states(static_cast<S*>(args.t_final));
    mine.clear_states();
    for (int64_t i = int64_t(steps.size()); i-- > 0;) {
      const Step step = mine.of(steps[i]);
      if (step.rows == 0) continue;
      mine.each(step, [&](int64_t s, int64_t row, int64_t j, int64_t n) {
        V saved[Cell::kSaved], before[kStates], state[kStates], arguments[kGates], d[kStates], d_before[2];
        const int64_t at = row * H + j;
        load<Cell::kSaved>(saved, gates + row * Cell::kSaved * H + j, H, n);
        load<kStates>(before, previous + at, per_state, n);
        load<kStates>(state, mine.state(s) + j, mine.per_state(), n);
        load<kGates>(arguments, t_gates + row * kGates * H + j, H, n);
        load<kStates>(d, d_each + at, per_state, n);
        d_before[0] = load(t_before + at, n);
        if (kStates == 2) d_before[1] = load(t_c + at, n);
        const V after = load(kStates == 2 ? t_c + per_state + at : t_h + at, n);
        const Coefficients<S> c = Cell::coefficients(saved, before);
        const Coefficients<S> change = Cell::changes(saved, before, arguments, after, d_before);
        if (kStates == 2) state[kLast] += change.out * d[0];
        Adjoint<S, Cell> adjoint(c, state);
        for (V& gate : adjoint.gates) gate = V{};
        adjoint.add_gates(c, adjoint.state);
        adjoint.add_gates(change, d);
        adjoint.write(t_gates + row * kGates * H + j, mine.hidden(s) + j, H, n);
        V next[2] = {};
        if (Cell::kCarries) next[kLast] = c.carry * adjoint.state[kLast] + change.carry * d[kLast];
        if (on_h != nullptr) next[0] += load(on_h + at, n);
        store<kStates>(mine.state(s) + j, mine.per_state(), next, n);
      });
      mine.add_to_state(step.rows, w);
    }
    mine.store_states(static_cast<S*>(args.t_state));
  });
}

template <typename Args>
void dispatch_cell(const Args& args, const Context& context) {
  const auto of_dtype = [&](auto type) {
    using S = decltype(type);
    if (args.layer.kind == "lstm") return run<S, Lstm<S>>(args, context);
    if (args.layer.kind == "gru") return run<S, Gru<S>>(args, context);
    if (args.layer.kind == "tanh") return run<S, Simple<S, true>>(args, context);
    run<S, Simple<S, false>>(args, context);
  };
  return args.layer.dtype == Dtype::kFloat64 ? of_dtype(double{}) : of_dtype(float{});
}

}  // namespace

extern const RecurrenceKernels recurrence_table;
const RecurrenceKernels recurrence_table{dispatch_cell, dispatch_cell, dispatch_cell};

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
