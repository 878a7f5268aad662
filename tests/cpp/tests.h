// The tests of csrc_test, one file each.
#pragma once

namespace adahessian::test {

void test_philox();
void test_dtypes();
void test_rademacher();
void test_perturb();
void test_hessian_diag();
void test_adahessian_step();
void test_independence();

}  // namespace adahessian::test
