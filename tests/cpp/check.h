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

inline int report() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace adahessian::test
