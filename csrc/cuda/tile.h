// Device side: one tile, the slots of its threads, and where their elements are in logical and in storage order.
#pragma once

#include "geometry.h"
#include "memory.h"

namespace adahessian::gpu {

// What a kernel is compiled for: a place computed for every element costs registers even where it is not needed.
enum class Order {
  kFlat,     // elementwise work on Layout::kFlat
  kLogical,  // every layout but kGather
  kAny
};

// Division of small numbers (below 32768) by a number up to 8192, which one thread prepares for all. A tile has no more
// elements, so that what is longer is passed at most once in a tile.
struct Divisor {
  uint32_t magic;
};

constexpr int64_t kMaxDivisor = 8192;

ADAHESSIAN_HD Divisor divisor(int64_t d) {
  return {d > kMaxDivisor ? 0u : (0x80000000u + uint32_t(d) - 1) / uint32_t(d)};
}

ADAHESSIAN_HD int quotient(int n, Divisor d) {
  expect(n >= 0 && n < 4 * kMaxDivisor && d.magic != 0, "quotient: operand out of range");
  return int((uint64_t(uint32_t(n)) * d.magic) >> 31);
}

struct Tile {
  int64_t numel;        // of the parameter
  int64_t begin;        // first logical element
  int64_t base;         // kStrips: storage of the first strip
  int64_t first_block;  // number of the first averaging block
  int64_t matrix, row;  // kGather: the first element is row `row` and column `column` of the matrix stored there
  int64_t column;
  int64_t period, stride;
  int count;            // elements
  int unit, units;      // length and number of averaging blocks inside
  int lanes, chunk;     // threads to a unit, elements to a thread
  int rows;             // kMatrices, kStrips
  int slots_per_strip;  // kStrips
  Divisor by_unit, by_rows, by_period, by_stride, by_slots;
  Layout layout;
};

// Tile number `index` of a parameter.
template <int kVector, Order kOrder>
ADAHESSIAN_HD Tile cut(const Geometry& g, uint32_t index) {
  Tile t;
  const uint32_t span = g.tiles_per_span == 1 ? index : index / g.tiles_per_span;
  const uint32_t part = index - span * g.tiles_per_span;
  const int64_t origin = int64_t(span) * g.span;
  t.numel = g.numel;
  t.begin = origin + int64_t(part) * g.length;
  const int64_t span_end = origin + g.span < g.numel ? origin + g.span : g.numel;
  t.count = int(t.begin + g.length < span_end ? g.length : span_end - t.begin);
  t.first_block = g.block == 0 ? index : g.block == 1 ? t.begin : t.begin / g.block;
  t.layout = g.layout;
  if (kOrder == Order::kFlat) return t;
  t.unit = g.unit;
  t.units = (t.count + g.unit - 1) / g.unit;
  t.lanes = g.lanes;
  t.chunk = (g.unit + g.lanes - 1) / g.lanes;
  t.by_unit = divisor(g.unit);
  if (g.layout == Layout::kFlat) return t;
  t.period = g.period;
  t.stride = g.stride;
  t.by_period = divisor(g.period);
  if (g.layout == Layout::kGather) {
    const int64_t size = g.period * g.stride;
    t.matrix = t.begin / size * size;
    t.row = (t.begin - t.matrix) / g.period;
    t.column = (t.begin - t.matrix) - t.row * g.period;
    t.by_stride = divisor(g.stride);
    return t;
  }
  t.rows = g.layout == Layout::kStrips ? t.count / int(g.period) : g.rows;
  t.by_rows = divisor(t.rows);
  t.base = origin + int64_t(part) * g.rows;
  t.slots_per_strip = (t.rows + kVector - 1) / kVector;
  t.by_slots = divisor(t.slots_per_strip);
  return t;
}

// A vector's worth of a tile: elements low ... high - 1 of it belong to the tile.
struct Slot {
  int64_t first;  // storage index of element 0; kGather: unused
  int local;      // index of element 0 in the tile, in the tile's storage order; may be negative
  int low, high;
};

template <int kVector, Order kOrder>
ADAHESSIAN_HD Slot slot_of(const Tile& t, int number) {
  Slot s;
  s.low = 0;
  if (kOrder == Order::kFlat || t.layout == Layout::kFlat || t.layout == Layout::kMatrices) {
    s.first = (t.begin & ~int64_t{kVector - 1}) + int64_t(number) * kVector;
    s.local = int(s.first - t.begin);
    s.low = s.local < 0 ? -s.local : 0;
    s.high = t.count - s.local;
  } else if (kOrder == Order::kLogical || t.layout == Layout::kStrips) {
    const int strip = quotient(number, t.by_slots);
    const int inside = (number - strip * t.slots_per_strip) * kVector;
    s.first = t.base + strip * t.stride + inside;
    s.local = strip * t.rows + inside;
    s.high = strip < t.period ? t.rows - inside : 0;
  } else {
    s.first = 0;
    s.local = number * kVector;
    s.high = t.count - s.local;
  }
  s.high = s.high < kVector ? s.high : kVector;
  return s;
}

template <int kVector>
ADAHESSIAN_HD bool is_full(const Slot& s) {
  return s.low == 0 && s.high == kVector;
}

ADAHESSIAN_HD bool has(const Slot& s, int e) { return e >= s.low && e < s.high; }

// Adds to a digit of a mixed-radix number and returns the carry.
ADAHESSIAN_HD int64_t add_digit(int64_t& digit, int64_t amount, int64_t base, Divisor by_base) {
  digit += amount;
  const int64_t carry = base > kMaxDivisor ? int64_t{digit >= base} : quotient(int(digit), by_base);
  digit -= carry * base;
  return carry;
}

// Where element e of a slot is in the parameter's storage.
template <Order kOrder>
ADAHESSIAN_HD int64_t storage_index(const Tile& t, const Slot& s, int e) {
  int64_t index = s.first + e;
  if (kOrder == Order::kAny && t.layout == Layout::kGather) {
    int64_t row = t.row, column = t.column;
    const int64_t rows = add_digit(column, s.local + e, t.period, t.by_period);
    const int64_t matrices = add_digit(row, rows, t.stride, t.by_stride);
    index = t.matrix + matrices * t.period * t.stride + column * t.stride + row;
  }
  expect(index >= 0 && index < t.numel, "element outside the parameter");
  return index;
}

// kGather: calls body(e, storage index) for every element of a slot that is in the tile.
template <int kVector, class Body>
ADAHESSIAN_HD void for_each_place(const Tile& t, const Slot& s, const Body& body) {
  ADAHESSIAN_UNROLL
  for (int e = 0; e < kVector; ++e) {
    if (has(s, e)) body(e, storage_index<Order::kAny>(t, s, e));
    in_sequence();  // slow anyway; it must not cost registers as well
  }
}

// Which logical element of the tile element e of a slot is; for elements outside the tile, one inside.
template <Order kOrder>
ADAHESSIAN_HD int logical_index(const Tile& t, const Slot& s, int e) {
  int x = s.local + e;
  x = x < 0 ? 0 : x < t.count ? x : t.count - 1;
  if (kOrder == Order::kFlat || t.layout == Layout::kFlat || t.layout == Layout::kGather) return x;
  // Strip number `strip` is column strip % period of matrix strip / period.
  const int strip = quotient(x, t.by_rows);
  const int matrix = quotient(strip, t.by_period);
  const int period = int(t.period);
  return (matrix * t.rows + x - strip * t.rows) * period + strip - matrix * period;
}

// The elements of a slot, zero outside the tile: one vector access where the whole slot is in the tile.
template <Order kOrder, typename E, int n>
ADAHESSIAN_HD void load(Vec<E, n>& target, const E* array, const Tile& t, const Slot& s, bool aligned) {
  if (aligned && is_full<n>(s)) {
    expect(s.first >= 0 && s.first + n <= t.numel, "vector outside the parameter");
    load_aligned(target, array + s.first);
    return;
  }
  target = {};
  ADAHESSIAN_UNROLL
  for (int e = 0; e < n; ++e) {
    if (has(s, e)) set(target, e, in_global(array)[storage_index<kOrder>(t, s, e)]);
  }
}

template <Order kOrder, typename E, int n>
ADAHESSIAN_HD void store(E* array, const Vec<E, n>& source, const Tile& t, const Slot& s, bool aligned) {
  if (aligned && is_full<n>(s)) {
    expect(s.first >= 0 && s.first + n <= t.numel, "vector outside the parameter");
    store_aligned(array + s.first, source);
    return;
  }
  ADAHESSIAN_UNROLL
  for (int e = 0; e < n; ++e) {
    if (has(s, e)) in_global(array)[storage_index<kOrder>(t, s, e)] = get(source, e);
  }
}

}  // namespace adahessian::gpu
