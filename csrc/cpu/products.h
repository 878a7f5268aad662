// Products of matrices and exponentials, for kernels that are compiled with fused additions.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace adahessian::cpu {
inline namespace ADAHESSIAN_ISA {

constexpr int kWide = 2;  // vectors in a row of a panel
#if defined(__AVX512F__)
constexpr int kTall = 8;  // rows of a product that are computed together
#else
constexpr int kTall = 4;
#endif
template <typename S>
constexpr int64_t kPanel = kWide * kLanes<S>;

ADAHESSIAN_HD int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- products
// ---------------------------------------------------------------------------------------------------------

// A matrix of `rows` x `columns`, in panels of kPanel columns that are stored one after the other.
template <typename S>
struct Panels {
  S* data;
  int64_t rows;
  const S* at(int64_t row, int64_t column) const { return data + column * rows + row * kPanel<S>; }
};

// A factor: element (i, k) is data[i * row + k * column].
template <typename S>
struct Factor {
  const S* data;
  int64_t row, column;
};

// `tall` rows and `wide` vectors of columns of `target` += a b, or = a b.
template <int tall, int wide, typename S>
ADAHESSIAN_HD void tile(int64_t depth, Factor<S> a, const S* b, S* target, int64_t stride, bool add) {
  Vector<S> sum[tall][wide] = {};
  for (int64_t k = 0; k < depth; ++k, b += kPanel<S>, a.data += a.column) {
    Vector<S> row[wide];
    for (int w = 0; w < wide; ++w) row[w] = load_vector<Vector<S>>(b + w * kLanes<S>);
    for (int i = 0; i < tall; ++i) {
      const Vector<S> factor = broadcast<S>(a.data[i * a.row]);
      for (int w = 0; w < wide; ++w) sum[i][w] += factor * row[w];
    }
  }
  for (int i = 0; i < tall; ++i) {
    for (int w = 0; w < wide; ++w) {
      S* to = target + i * stride + w * kLanes<S>;
      store_vector(to, add ? load_vector<Vector<S>>(to) + sum[i][w] : sum[i][w]);
    }
  }
}

// The first `rows` rows (a multiple of kTall / 2; those of a that are not there may be anything) and `columns` columns
// (of whole vectors) of target = or += a b, where b begins at row `first` of its panels.
template <typename S>
[[gnu::noinline]] void multiply(int64_t rows, int64_t columns, int64_t depth, Factor<S> a, Panels<S> b, int64_t first,
                                S* target, int64_t stride, bool add) {
  for (int64_t j = 0; j < columns; j += kPanel<S>) {
    for (int64_t i = 0; i < rows; i += kTall) {
      const Factor<S> part{a.data + i * a.row, a.row, a.column};
      S* to = target + i * stride + j;
      const auto compute = [&](auto tall) ADAHESSIAN_INLINE_LAMBDA {
        if (columns - j > kLanes<S>) {
          tile<tall(), kWide>(depth, part, b.at(first, j), to, stride, add);
        } else {
          tile<tall(), 1>(depth, part, b.at(first, j), to, stride, add);
        }
      };
      if (rows - i > kTall / 2) {
        compute(std::integral_constant<int, kTall>());
      } else {
        compute(std::integral_constant<int, kTall / 2>());
      }
    }
  }
}

// Element (i, j) of panels from `first` on = factor * data[i * row + j * column]; zero from `columns` to the next whole
// panel.
template <typename T>
void pack(Panels<StateOf<T>> to, int64_t first, int64_t rows, int64_t columns, const T* data, int64_t row,
          int64_t column, StateOf<T> factor) {
  using S = StateOf<T>;
  for (int64_t j = 0; j < columns; j += kPanel<S>) {
    const int64_t n = std::min(kPanel<S>, columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      S* target = const_cast<S*>(to.at(first + i, j));
      const T* from = data + i * row + j * column;
      for (int64_t l = 0; l < n; ++l) target[l] = factor * load_as(from[l * column]);
      for (int64_t l = n; l < kPanel<S>; ++l) target[l] = S(0);
    }
  }
}

// ---- exponentials
// -----------------------------------------------------------------------------------------------------

// e^x = 2^power (1 + r series) for x <= about 1 where that is a normal number; `kept` says where.
template <typename S>
struct Exponential {
  Vector<S> r, series;
  Bits<S> power;  // in the exponent's place
  Index<S> kept;
};

template <typename S>
ADAHESSIAN_HD Exponential<S> exponential_of(Vector<S> x) {
  using V = Vector<S>;
  constexpr bool is_float = sizeof(S) == 4;
  constexpr int mantissa = is_float ? 23 : 52;
  const S lowest = is_float ? S(-87.3) : S(-708.3);
  const V magic = broadcast<S>(is_float ? S(12582912) : S(6755399441055744));  // 1.5 * 2^mantissa: rounds to integers
  const Index<S> kept = x > broadcast<S>(lowest);
  x = where<S>(kept, x);
  const V rounded = x * broadcast<S>(S(1.4426950408889634074)) + magic, n = rounded - magic;
  V r = x - n * broadcast<S>(is_float ? S(0.693145751953125) : S(6.93147180369123816490e-01));
  r -= n * broadcast<S>(is_float ? S(1.42860682030941723212e-6) : S(1.90821492927058770002e-10));
  // Taylor's series up to where |r| <= log(2) / 2 leaves nothing.
  constexpr int degree = is_float ? 7 : 13;
  S inverse[degree + 1];
  inverse[0] = 1;
  for (int k = 1; k <= degree; ++k) inverse[k] = inverse[k - 1] / S(k);
  V series = broadcast<S>(inverse[degree]);
  for (int k = degree; k-- > 1;) series = series * r + broadcast<S>(inverse[k]);
  return {r, series, Bits<S>(rounded) << mantissa, kept};  // the integer is in the lowest bits
}

// e^x for x <= about 1, to an ulp or two; 0 where that is no normal number. NaN becomes 0.
template <typename S>
ADAHESSIAN_HD Vector<S> exponential(Vector<S> x) {
  const Exponential<S> e = exponential_of<S>(x);
  return where<S>(e.kept, Vector<S>(Bits<S>(e.series * e.r + broadcast<S>(S(1))) + e.power));
}

// 1 / (1 + e^-x) and tanh, to a few ulps; NaN stays NaN.
template <typename S>
ADAHESSIAN_HD Vector<S> sigmoid(Vector<S> x) {
  const Vector<S> one = broadcast<S>(S(1)), e = exponential<S>(Vector<S>(Bits<S>(x) | kSign<S>));
  const Vector<S> above = one / (one + e);
  return (x < Vector<S>{} ? e * above : above) + where<S>(x != x, x);
}
template <typename S>
ADAHESSIAN_HD Vector<S> hyperbolic_tangent(Vector<S> x) {
  const Vector<S> one = broadcast<S>(S(1));
  const Exponential<S> e = exponential_of<S>(S(2) * Vector<S>(Bits<S>(x) | kSign<S>));
  const Vector<S> power = where<S>(e.kept, Vector<S>(Bits<S>(one) + e.power));
  const Vector<S> minus_one = power * (e.r * e.series) + (power - one);  // e^-2|x| - 1
  const Vector<S> t = minus_one / (S(2) + minus_one);
  return Vector<S>(Bits<S>(t) ^ (~Bits<S>(x) & kSign<S>)) + where<S>(x != x, x);
}

}  // namespace ADAHESSIAN_ISA
}  // namespace adahessian::cpu
