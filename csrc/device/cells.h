// Pooling cells: the grid of adaptive average pooling, and its decomposition into disjoint segments.
#pragma once

#include <cstdint>

#include "macros.h"

namespace layerwise {

// Cell i of `bins` over `size` elements covers [floor(i*size/bins), ceil((i+1)*size/bins)).  Neighbouring cells share
// one element where bins does not divide size; with bins <= size no element belongs to more than two cells.
// I holds size * bins and more: 32 bits divide many times faster on a GPU.
template <class I>
LAYERWISE_INLINE I cell_begin(I i, I size, I bins) {
  return i * size / bins;
}
template <class I>
LAYERWISE_INLINE I cell_end(I i, I size, I bins) {
  return ((i + 1) * size + bins - 1) / bins;
}

template <class I>
LAYERWISE_INLINE I cell_size(I i, I size, I bins) {
  return cell_end(i, size, bins) - cell_begin(i, size, bins);
}

// First element of cell i that no earlier cell covers.
template <class I>
LAYERWISE_INLINE I cell_own_begin(I i, I size, I bins) {
  return i == 0 ? 0 : cell_end<I>(i - 1, size, bins);
}

// A maximal run of elements that the same cells cover: even segments belong to one cell, odd ones (possibly empty)
// to it and its successor.  There are 2*bins - 1 segments.
template <class I>
struct SegmentOf {
  I begin, end;             // elements
  I first_cell, last_cell;  // inclusive
};
using Segment = SegmentOf<int64_t>;

template <class I>
LAYERWISE_INLINE I segment_count(I bins) {
  return 2 * bins - 1;
}

template <class I>
LAYERWISE_INLINE SegmentOf<I> segment(I s, I size, I bins) {
  const I i = s / 2;
  if (s % 2 == 1) return {cell_begin<I>(i + 1, size, bins), cell_end<I>(i, size, bins), i, static_cast<I>(i + 1)};
  return {cell_own_begin<I>(i, size, bins), i + 1 < bins ? cell_begin<I>(i + 1, size, bins) : size, i, i};
}

}  // namespace layerwise
