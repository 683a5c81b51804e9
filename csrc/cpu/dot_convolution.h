// Convolution of a small map by dot products over the input channels, which lie side by side in x and in the weights.
//
// The weights are read once, as they are.  The library's convolution first writes them anew in an order of its own, and
// for a map of few pixels takes several times as long as the product itself.  float32 weights of a bfloat16 map are
// rounded on the way.
#pragma once

#include "dot_plan.h"
#include "kernel_common.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

#if defined(__AVX512F__)

using Float = Vec<float>;

// Sums of the lanes of four vectors.  Within each quarter of a vector first, as the processor's shuffles work.
LAYERWISE_INLINE Vector<float, 4> lane_sums(const Float (&v)[kDotOutputs]) {
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
  const Float a = __builtin_shufflevector(v[0], v[2], LOW) + __builtin_shufflevector(v[0], v[2], HIGH);  // 0 2 0 2
  const Float b = __builtin_shufflevector(v[1], v[3], LOW) + __builtin_shufflevector(v[1], v[3], HIGH);  // 1 3 1 3
  const Float sums = __builtin_shufflevector(a, b, LOW) + __builtin_shufflevector(a, b, HIGH);  // 0 1 2 3
#undef LOW
#undef HIGH
  const auto half = __builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

// The elements of a vector, and the products of two of them added to sums.
template <class T>
struct Dot;
template <>
struct Dot<float> {
  using Elements = Float;
  static ALWAYS_INLINE Float add(Float sums, Float x, Float w) { return sums + x * w; }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<BFloat16> {
  using Elements = __m512bh;
  static ALWAYS_INLINE Float add(Float sums, __m512bh x, __m512bh w) {
    return (Float)_mm512_dpbf16_ps((__m512)sums, x, w);
  }
};
#endif

LAYERWISE_INLINE void store_outputs(float* target, Vector<float, 4> z) { __builtin_memcpy(target, &z, sizeof z); }
#if defined(__AVX512BF16__)
LAYERWISE_INLINE void store_outputs(BFloat16* target, Vector<float, 4> z) {
  const auto rounded = _mm_cvtneps_pbh((__m128)z);
  __builtin_memcpy(target, &rounded, kDotOutputs * sizeof(BFloat16));
}
#endif

static_assert(kLanes<float> == kDotLanes && kDotOutputs == 4);

// z of some pixels and four output channels; w: the first of these at the first tap, `pitch` elements from one to the next.
template <class T, int kPixels>
void dot_pixels(const DotTap* taps, const DotTap* end, int64_t inputs, const T* w, int64_t pitch, T* const* z) {
  using Elements = typename Dot<T>::Elements;
  Float sums[kPixels][kDotOutputs] = {};
  for (const DotTap* tap = taps; tap != end; ++tap) {
    const T* x[kPixels];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) x[i] = static_cast<const T*>(tap->x[i]);
    const T* taken = w + tap->weights;
    for (int64_t c = 0; c < inputs; c += sizeof(Elements) / sizeof(T)) {
      Elements weights[kDotOutputs];
#pragma GCC unroll 4
      for (int k = 0; k < kDotOutputs; ++k) weights[k] = load_bits<Elements>(taken + k * pitch + c);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) {
        const Elements value = load_bits<Elements>(x[i] + c);
#pragma GCC unroll 4
        for (int k = 0; k < kDotOutputs; ++k) sums[i][k] = Dot<T>::add(sums[i][k], value, weights[k]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) store_outputs(z[i], lane_sums(sums[i]));
}

template <class T, int kPixels = kDotPixels>
void dot_pixels_of(int64_t pixels, const DotTap* taps, const DotTap* end, int64_t inputs, const T* w, int64_t pitch,
                   T* const* z) {
  if constexpr (kPixels > 1) {
    if (pixels < kPixels) return dot_pixels_of<T, kPixels - 1>(pixels, taps, end, inputs, w, pitch, z);
  }
  dot_pixels<T, kPixels>(taps, end, inputs, w, pitch, z);
}

// Four rows of weights, [4, kernel_h, kernel_w, C_in], rounded to bfloat16.
LAYERWISE_INLINE void round_weights(const DotParams& p, int64_t k, BFloat16* target) {
  for (int64_t i = k; i < k + kDotOutputs; ++i)
    for (int64_t h = 0; h < p.window.kernel_h; ++h)
      for (int64_t w = 0; w < p.window.kernel_w; ++w, target += p.x_shape.c) {
        const float* source = at<float>(p.w, p.w_strides, i, 0, h, w);
        for (int64_t c = 0; c < p.x_shape.c; c += kDotLanes) store(target + c, load(source + c));
      }
}

template <class T>
void dot_convolve(const DotParams& p, int64_t begin, int64_t end, void* scratch) {
  const DotPlan plan = dot_plan(p);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t k = block * kDotOutputs;
    const T* w = at<T>(p.w, p.w_strides, k, 0, 0, 0);
    if constexpr (sizeof(T) == sizeof(BFloat16)) {
      if (plan.rounds) {
        round_weights(p, k, static_cast<BFloat16*>(scratch));
        w = static_cast<const BFloat16*>(scratch);
      }
    }
    for (int64_t i = 0; i < plan.groups; ++i) {
      const DotGroup group = dot_group(plan, i);
      T* z[kDotPixels];
      for (int64_t j = 0; j < group.pixels; ++j) {
        const DotPixel pixel = dot_pixel(p.map.shape, group.first + j);
        z[j] = at<T>(p.z, p.z_strides, pixel.n, k, pixel.h, pixel.w);
      }
      const DotTap* taps = p.taps + i * plan.taps;
      dot_pixels_of<T>(group.pixels, taps, taps + p.tap_counts[i], p.x_shape.c, w, plan.w_strides.n, z);
    }
  }
}

void dot_convolution(const DotParams& p, int64_t begin, int64_t end, void* scratch) {
#if defined(__AVX512BF16__)
  if (p.map.dtype == DType::kBFloat16) return dot_convolve<BFloat16>(p, begin, end, scratch);
#endif
  dot_convolve<float>(p, begin, end, scratch);
}

#endif

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
