// Tests of the launchers without Python and torch: csrc_test [name ...] runs all tests, or those that are named.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "tests.h"

int main(int argc, char** argv) {
  using namespace adahessian::test;
  const std::pair<std::string, void (*)()> tests[] = {
      {"philox", test_philox},
      {"dtypes", test_dtypes},
      {"rademacher", test_rademacher},
      {"perturb", test_perturb},
      {"hessian_diag", test_hessian_diag},
      {"adahessian_step", test_adahessian_step},
      {"independence", test_independence},
  };
  std::vector<std::string> wanted(argv + 1, argv + argc);
  for (const auto& [name, test] : tests) {
    const auto found = std::find(wanted.begin(), wanted.end(), name);
    if (argc > 1 && found == wanted.end()) continue;
    if (argc > 1) wanted.erase(found);
    std::printf("%s\n", name.c_str());
    test();
  }
  for (const std::string& name : wanted) check(false, "there is no test " + name);
  return report();
}
