// Mean and sum of squared deviations of a run of pixels.
#pragma once

#include "blocks.h"
#include "kernel_common.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

// Corrected two-pass: the first pass finds the mean of the block, the second sums deviations from it, so a mean much
// larger than the deviation does not cancel; the sum of deviations repairs the rounding of the mean itself.
template <class A>
struct Deviations {
  Vec<A> center{}, first{}, second{};

  ALWAYS_INLINE void add(Vec<A> d) {
    first += d;
    second += d * d;
  }
};

// Of `length` pixels `pitch` apart, for the channels [c_begin, c_end); the results are indexed by channel.
template <class T, class A>
void block_statistics(const T* z, int64_t pitch, int64_t length, int64_t c_begin, int64_t c_end, A* mean, A* mean_rest,
                      A* m2) {
  const Vec<A> inverse_count = broadcast(A(1) / A(length));
  for_each_group<T, A>(c_end - c_begin, [&](int64_t channel, auto group) ALWAYS_INLINE {
    constexpr int kVectors = group.kVectors;
    const int64_t c = c_begin + channel;
    Vec<A> value[kVectors], sum[kVectors] = {};
    const T* pixel = z + c;
    for (int64_t i = 0; i < length; ++i, pixel += pitch) {
      group.get(pixel, value);
      for (int v = 0; v < kVectors; ++v) sum[v] += value[v];
    }
    Deviations<A> d[kVectors];
    for (int v = 0; v < kVectors; ++v) d[v].center = sum[v] * inverse_count;
    pixel = z + c;
    for (int64_t i = 0; i < length; ++i, pixel += pitch) {
      group.get(pixel, value);
      for (int v = 0; v < kVectors; ++v) d[v].add(value[v] - d[v].center);
    }
    Vec<A> center[kVectors], rest[kVectors], second[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      center[v] = d[v].center;
      rest[v] = d[v].first * inverse_count;
      second[v] = d[v].second - d[v].first * rest[v];
    }
    group.put(mean + c, center);
    group.put(mean_rest + c, rest);
    group.put(m2 + c, second);
  });
}

// Of `pixels` of z, which is dense, from the block `block` of p's results on.
template <class T>
void run_statistics(const ConvolutionParams& p, const T* z, int64_t pixels, int64_t block, int64_t c_begin,
                    int64_t c_end) {
  const int64_t channels = p.map.shape.c, pitch = p.z_strides.w;
  for (int64_t first = 0; first < pixels; first += kBlockLength, ++block) {
    const int64_t length = pixels - first < kBlockLength ? pixels - first : kBlockLength;
    block_statistics<T, float>(
        z + first * pitch, pitch, length, c_begin, c_end, static_cast<float*>(p.block_mean) + block * channels,
        static_cast<float*>(p.block_mean_rest) + block * channels, static_cast<float*>(p.block_m2) + block * channels);
  }
}

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
