// Sums per channel that blocks of threads leave for another launch to combine.
#pragma once

#include "common.h"

namespace layerwise::cuda {

constexpr int kGamma = 0, kBeta = 1, kSlope = 2;  // kinds of sums
constexpr int kResident = 2;   // blocks that a multiprocessor holds at once
constexpr int64_t kWaves = 2;  // of those, per piece of channels, where there is enough to do

inline Cut cut_sums(int64_t rows, int64_t wanted) {
  if (rows == 0) return {0, 1, 0};
  return cut_rows(rows, wanted, kWaves * kResident * multiprocessors());
}
inline Cut cut_pixels(const Shape& shape) {
  constexpr int64_t kPixelsOfBlock = 512;
  return cut_sums(shape.n * shape.h * shape.w, kPixelsOfBlock);
}

// Where blocks leave their sums: [C, blocks, kinds].
struct Partial {
  void* data;
  int64_t first, own, blocks;  // of the kernel's own the first and how many, and all
  int64_t step;  // so many neighbouring channels of the kernel's count as one
  int kinds;

  LAYERWISE_MEMBER int64_t place(int64_t channel, int64_t block) const {
    return channel / step * blocks + first + channel % step * own + block;
  }
};

// Adds up the sums of a block's threads; those that `partial` has no room for are left out.
template <class A, int V, int kKinds>
LAYERWISE_DEVICE void write_block(A (&values)[kKinds][V], A* shared, const Partial& partial, int64_t block,
                                  int64_t channels, int64_t chunk, int lanes, const Lane& lane) {
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int k = 0; k < kKinds; ++k) {
      const A sum = sum_over_rows(values[k][v], lanes);
      if (lane.row == 0) shared[kKinds * ((warp * lanes + lane.x) * V + v) + k] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kKinds * lanes * V; i += kThreads) {
    const int64_t channel = chunk * lanes * V + i / kKinds;
    if (channel >= channels || i % kKinds >= partial.kinds) continue;
    A total = A(0);
    for (int w = 0; w < kWarps; ++w) total += shared[kKinds * w * lanes * V + i];
    static_cast<A*>(partial.data)[partial.kinds * partial.place(channel, block) + i % kKinds] = total;
  }
}

}  // namespace layerwise::cuda
