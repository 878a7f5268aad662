// The table of parameters that a launch works on: rows in the order of their tiles, and constants that rows share. What
// changes from step to step is in the constants, so that the rows of a training loop stay the same.
#pragma once

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "geometry.h"
#include "memory.h"

namespace adahessian::gpu {

// A table travels as part of a kernel's arguments, which CUDA limits to 32,764 bytes; a longer one is uploaded.
constexpr int kArgumentBytes = 32764;
constexpr int kTableBytes = kArgumentBytes - 216;

// Row has first_tile, constant (an index) and geometry.
template <class Row, class Constant, int kConstants>
struct Table {
  static constexpr int kRows = (kTableBytes - kConstants * int(sizeof(Constant))) / int(sizeof(Row));
  static constexpr int kMaxConstants = kConstants;
  using RowType = Row;
  using ConstantType = Constant;

  const Row* uploaded_rows;  // null: the arrays below are used
  const Constant* uploaded_constants;
  int n_rows;
  Row rows[kRows];
  Constant constants[kConstants];
};

// The row that a tile belongs to: the last one whose first tile is not behind it.
template <class Row>
ADAHESSIAN_HD int find_row(const Row* rows, int n_rows, uint32_t tile) {
  int low = 0, high = n_rows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (rows[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

template <class Row, class Constant, int kConstants>
ADAHESSIAN_HD Row row_of_tile(const Table<Row, Constant, kConstants>& table, uint32_t tile) {
  if (table.uploaded_rows == nullptr) return table.rows[find_row(table.rows, table.n_rows, tile)];
  const Row* rows = in_global(table.uploaded_rows);
  return rows[find_row(rows, table.n_rows, tile)];
}

template <class Row, class Constant, int kConstants>
ADAHESSIAN_HD Constant constant_of_row(const Table<Row, Constant, kConstants>& table, const Row& row) {
  if (table.uploaded_constants == nullptr) return table.constants[row.constant];
  return in_global(table.uploaded_constants)[row.constant];
}

// Host side: the constants that rows ask for, each of them once; most rows share one.
template <class Key, class Constant>
class DistinctConstants {
 public:
  // make() gives the constant of a key that is new.
  template <class Make>
  uint32_t index_of(const Key& key, const Make& make) {
    if (!constants_.empty() && key == last_->first) return last_->second;
    bool is_new;
    std::tie(last_, is_new) = index_.try_emplace(key, uint32_t(constants_.size()));
    if (is_new) constants_.push_back(make());
    return last_->second;
  }
  const std::vector<Constant>& get() const { return constants_; }

 private:
  std::map<Key, uint32_t> index_;
  typename std::map<Key, uint32_t>::const_iterator last_;
  std::vector<Constant> constants_;
};

// Numbers the tiles of the rows through; returns how many there are.
template <class Row>
uint32_t number_tiles(Row* rows, size_t n_rows) {
  int64_t tiles = 0;
  for (size_t i = 0; i < n_rows; ++i) {
    rows[i].first_tile = uint32_t(tiles);
    tiles += rows[i].geometry.n_tiles();
    if (tiles > std::numeric_limits<int32_t>::max()) throw std::runtime_error("adahessian_fused: too many elements");
  }
  return uint32_t(tiles);
}

// Moves rows from `next` on into the arguments' own table until it is full; returns the first row left over.
template <class Row, class Constant, int kConstants>
size_t fill_table(Table<Row, Constant, kConstants>& table, const std::vector<Row>& rows,
                  const std::vector<Constant>& constants, const Constant* computed, size_t next) {
  std::vector<int64_t> place(constants.size(), -1);
  int n_constants = 0;
  table.uploaded_rows = nullptr;
  table.uploaded_constants = computed;
  for (table.n_rows = 0; next < rows.size() && table.n_rows < table.kRows; ++next) {
    if (computed != nullptr) {
      table.rows[table.n_rows++] = rows[next];
      continue;
    }
    int64_t& constant = place[rows[next].constant];
    if (constant < 0) {
      if (n_constants == kConstants) break;
      constant = n_constants++;
      table.constants[constant] = constants[rows[next].constant];
    }
    Row& row = table.rows[table.n_rows++] = rows[next];
    row.constant = uint32_t(constant);
  }
  return next;
}

// One launch over all rows. Only where nothing can be uploaded, a long table takes several: during stream capture,
// since a captured copy would read this call's memory again on every replay. Where the constants are computed on the
// device, `compute` launches that, for the table as it is.
template <class Body, class Device, class Compute = void (*)()>
void launch_rows(
    Device& device, typename Body::Arguments& arguments,
    std::vector<typename Body::Arguments::TableType::RowType>& rows,
    const std::vector<typename Body::Arguments::TableType::ConstantType>& constants,
    const typename Body::Arguments::TableType::ConstantType* computed = nullptr, const Compute& compute = [] {}) {
  using TableType = typename Body::Arguments::TableType;
  static_assert(sizeof(typename Body::Arguments) <= kArgumentBytes, "kernel arguments are limited to 32,764 bytes");
  static_assert(std::has_unique_object_representations_v<typename TableType::RowType>,
                "rows are compared byte by byte with those that were uploaded before");
  TableType& table = arguments.table;
  const bool constants_fit = computed == nullptr && constants.size() <= size_t(table.kMaxConstants);
  const bool fits = rows.size() <= size_t(table.kRows) && (constants_fit || computed != nullptr);
  if (!fits && device.can_upload()) {
    const uint32_t tiles = number_tiles(rows.data(), rows.size());
    table.n_rows = int(rows.size());
    table.uploaded_rows = device.upload(rows);
    table.uploaded_constants = constants_fit ? nullptr : computed != nullptr ? computed : device.upload(constants);
    if (constants_fit) std::copy(constants.begin(), constants.end(), table.constants);
    compute();
    device.template launch<Body>(arguments, tiles);
    return;
  }
  for (size_t next = 0; next < rows.size();) {
    next = fill_table(table, rows, constants, computed, next);
    const uint32_t tiles = number_tiles(table.rows, size_t(table.n_rows));
    compute();
    device.template launch<Body>(arguments, tiles);
  }
}

}  // namespace adahessian::gpu
