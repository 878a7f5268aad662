// Checks of the C++ tests: a failed one prints what was found and the program ends with exit code 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

namespace adahessian::test {

inline int failures = 0;

inline void check(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

inline void check_equal(int64_t found, int64_t expected, const std::string& what) {
  if (found == expected) return;
  check(false, what + ": found " + std::to_string(found) + ", expected " + std::to_string(expected));
}

// Collects the elements of an array that are off, so that a wrong array is one failure, not thousands.
class Elements {
 public:
  explicit Elements(std::string name) : name_(std::move(name)) {}
  ~Elements() {
    if (wrong_ == 0) return;
    char text[160];
    std::snprintf(text, sizeof(text), "[%lld] is %.9g, expected %.9g +- %.3g (%lld elements are wrong)",
                  static_cast<long long>(index_), found_, expected_, bound_, static_cast<long long>(wrong_));
    check(false, name_ + text);
  }
  Elements(const Elements&) = delete;

  void within(int64_t index, double found, double expected, double bound) {
    if (std::abs(found - expected) <= bound || wrong_++ > 0) return;  // a NaN is never within
    index_ = index, found_ = found, expected_ = expected, bound_ = bound;
  }
  void equal(int64_t index, double found, double expected) { within(index, found, expected, 0); }

 private:
  std::string name_;
  int64_t wrong_ = 0, index_ = 0;
  double found_ = 0, expected_ = 0, bound_ = 0;
};

inline int report() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace adahessian::test
