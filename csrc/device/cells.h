// Pooling cells: the grid of adaptive average pooling, and its decomposition into disjoint segments.
#pragma once

#include <cstdint>

#include "macros.h"

namespace layerwise {

// Cell i of `bins` over `size` elements covers [floor(i*size/bins), ceil((i+1)*size/bins)).  Neighbouring cells share
// one element where bins does not divide size; with bins <= size no element belongs to more than two cells.
LAYERWISE_INLINE int64_t cell_begin(int64_t i, int64_t size, int64_t bins) { return i * size / bins; }
LAYERWISE_INLINE int64_t cell_end(int64_t i, int64_t size, int64_t bins) { return ((i + 1) * size + bins - 1) / bins; }

// First element of cell i that no earlier cell covers.
LAYERWISE_INLINE int64_t cell_own_begin(int64_t i, int64_t size, int64_t bins) {
  return i == 0 ? 0 : cell_end(i - 1, size, bins);
}

// A maximal run of elements that the same cells cover: even segments belong to one cell, odd ones (possibly empty)
// to it and its successor.  There are 2*bins - 1 segments.
struct Segment {
  int64_t begin, end;              // elements
  int64_t first_cell, last_cell;   // inclusive
};

LAYERWISE_INLINE int64_t segment_count(int64_t bins) { return 2 * bins - 1; }

LAYERWISE_INLINE Segment segment(int64_t s, int64_t size, int64_t bins) {
  const int64_t i = s / 2;
  if (s % 2 == 1) return {cell_begin(i + 1, size, bins), cell_end(i, size, bins), i, i + 1};
  return {cell_own_begin(i, size, bins), i + 1 < bins ? cell_begin(i + 1, size, bins) : size, i, i};
}

}  // namespace layerwise
