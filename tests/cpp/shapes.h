// Lists of parameters that reach every way of cutting work into tiles.
#pragma once

#include <vector>

#include "problem.h"

namespace adahessian::test {

// Block lengths around the ones that are treated in their own way: short, odd, a vector, a row, a tile and more.
inline const int64_t kBlocks[] = {1,  2,  3,   4,   5,    8,    9,    16,   17,   32,
                                  49, 64, 127, 128, 1000, 1024, 2047, 2048, 2049, 5000};

// Ragged ends: a little less and a little more than a Philox call, a tile and several tiles.
inline std::vector<Shape> ragged(int64_t block) {
  std::vector<Shape> shapes;
  for (const int64_t numel : {0, 1, 2, 127, 128, 129, 500, 2047, 2049, 6007}) {
    shapes.push_back({numel, block, 1, 1, shapes.size() % 3 == 2});
  }
  return shapes;
}

// Stored in another order than the logical one: channels_last kernels, transposed matrices, whole and cut.
inline std::vector<Shape> permuted(int64_t block) {
  const std::array<int64_t, 3> batch_period_stride[] = {{4, 9, 5},   {1, 9, 300}, {3, 49, 64}, {1, 7, 5},
                                                        {2, 1, 130}, {1, 130, 1}, {1, 65, 67}, {1, 3, 2051}};
  std::vector<Shape> shapes;
  for (const auto& [batch, period, stride] : batch_period_stride) {
    shapes.push_back({batch * period * stride, block, period, stride, shapes.size() % 3 == 1});
  }
  return shapes;
}

// Thousands of numbers in hundreds of tiny tensors, some of them empty.
inline std::vector<Shape> many() {
  std::vector<Shape> shapes;
  for (int64_t i = 0; i < 700; ++i) shapes.push_back({i % 7 * (i % 5), 1 + i % 4});
  return shapes;
}

inline std::vector<std::vector<Shape>> all_lists() {
  std::vector<std::vector<Shape>> lists = {{}, {{0}}, many()};
  for (const int64_t block : kBlocks) {
    lists.push_back(ragged(block));
    lists.push_back(permuted(block));
  }
  return lists;
}

}  // namespace adahessian::test
