// All 65,536 numbers of each 16-bit dtype, and the rounding between neighbours.
#include "../../csrc/dtypes.h"

#include <cmath>

#include "check.h"

using namespace adahessian;
using test::check;
using test::check_equal;

namespace {

// The value of a 16-bit number from the definition of its format.
double decode(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int exponent = int(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double mantissa = std::ldexp(double(bits & ((1u << mantissa_bits) - 1)), -mantissa_bits);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(mantissa, 1 - bias) : std::ldexp(1 + mantissa, exponent - bias));
}

template <typename T>
uint32_t rounded(double x) {
  T result;
  store_to(result, float(x));
  return result.bits;
}

template <typename T>
void test_format(const std::string& name, int exponent_bits, int mantissa_bits) {
  const uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double value = decode(bits, exponent_bits, mantissa_bits), found = load_as(T{uint16_t(bits)});
    if (std::isnan(value)) {
      check(std::isnan(found), name + ": a NaN loads as a NaN");
      const double again = load_as(T{uint16_t(rounded<T>(found))});
      check(std::isnan(again), name + ": a NaN is stored as a NaN");
      continue;
    }
    const std::string which = name + " " + std::to_string(bits);
    check(found == value, which + " loaded");
    check_equal(rounded<T>(value), bits, which + " stored");
    if ((bits & 0x7FFF) + 1 >= infinity) continue;  // the next one is no number
    const double next = decode(bits + 1, exponent_bits, mantissa_bits), middle = (value + next) / 2;
    if (double(float(middle)) != middle) continue;  // between two subnormal bfloat16 there is a float in any case
    check_equal(rounded<T>(middle), bits + bits % 2, which + ", a tie");  // to even
    const float beyond = std::nextafter(float(middle), float(next));
    check_equal(rounded<T>(beyond), bits + 1, which + ", above a tie");
  }
  check_equal(rounded<T>(INFINITY), infinity, name + " of infinity");
  check_equal(rounded<T>(std::numeric_limits<float>::max()), infinity, name + " of the largest float");
}

}  // namespace

int main() {
  test_format<bfloat16>("bfloat16", 8, 7);
  test_format<float16>("float16", 5, 10);
  return test::report();
}
