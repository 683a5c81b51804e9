// Convolution by dot products: how it cuts a map, and the pixels of x that each tap reads.  Host code and kernels share
// this; the arithmetic is in dot_convolution.h.
#pragma once

#include "blocks.h"

namespace layerwise::cpu {

constexpr int64_t kDotOutputs = 4;  // output channels of a task
constexpr int64_t kDotLanes = 16;  // input channels are a multiple of this, and of twice as many for bfloat16
// With more pixels the library has its weights in order again sooner than its faster product is done.
constexpr int64_t kDotMostPixels = 256;

struct DotPlan {
  int64_t pixels, groups;  // of the whole batch, and groups of nearly equal numbers of them
  int64_t taps;
  bool rounds;  // weights are rounded to the dtype of x first, four output channels at a time
  Strides w_strides;  // of the weights that are multiplied
};

static inline DotPlan dot_plan(const DotParams& p) {
  DotPlan plan{};
  plan.pixels = p.map.shape.n * p.map.shape.h * p.map.shape.w;
  plan.groups = divide_up(plan.pixels, kDotPixels);
  plan.taps = p.window.kernel_h * p.window.kernel_w;
  plan.rounds = p.w_dtype != p.map.dtype;
  const int64_t row = p.window.kernel_w * p.x_shape.c;
  plan.w_strides = plan.rounds ? Strides{p.window.kernel_h * row, 1, row, p.x_shape.c} : p.w_strides;
  return plan;
}

struct DotGroup {
  int64_t first, pixels;
};
static inline DotGroup dot_group(const DotPlan& plan, int64_t i) {
  const int64_t first = i * plan.pixels / plan.groups;
  return {first, (i + 1) * plan.pixels / plan.groups - first};
}

// Samples are innermost: a group then has few places of the map, whose taps outside of it are left out together.
struct DotPixel {
  int64_t n, h, w;
};
static inline DotPixel dot_pixel(const Shape& z, int64_t i) {
  const int64_t place = i / z.n;
  return {i % z.n, place / z.w, place % z.w};
}

// The taps of group i that reach x anywhere, written from `taps` on; their number.
static inline int64_t dot_taps(const DotParams& p, const DotPlan& plan, int64_t i, const void* zeros, DotTap* taps) {
  const DotGroup group = dot_group(plan, i);
  const int64_t bytes = p.map.dtype == DType::kBFloat16 ? 2 : 4;
  int64_t count = 0;
  for (int64_t tap = 0; tap < plan.taps; ++tap) {
    const int64_t kh = tap / p.window.kernel_w, kw = tap % p.window.kernel_w;
    DotTap& t = taps[count];
    t.weights = kh * plan.w_strides.h + kw * plan.w_strides.w;
    bool inside = false;
    for (int64_t j = 0; j < group.pixels; ++j) {
      const DotPixel pixel = dot_pixel(p.map.shape, group.first + j);
      const int64_t h = pixel.h * p.window.stride_h - p.window.padding_h + kh * p.window.dilation_h;
      const int64_t w = pixel.w * p.window.stride_w - p.window.padding_w + kw * p.window.dilation_w;
      const bool there = h >= 0 && h < p.x_shape.h && w >= 0 && w < p.x_shape.w;
      const int64_t offset = pixel.n * p.x_strides.n + h * p.x_strides.h + w * p.x_strides.w;
      t.x[j] = there ? static_cast<const char*>(p.x) + offset * bytes : zeros;
      inside |= there;
    }
    count += inside;
  }
  return count;
}

// Bytes of scratch memory of a task: rounded weights.
static inline int64_t dot_scratch(const DotParams& p) {
  const DotPlan plan = dot_plan(p);
  return plan.rounds ? kDotOutputs * plan.w_strides.n * 2 : 0;
}

// Whether a convolution without groups can be done this way at a gain.
static inline bool dot_applies(const DotParams& p) {
  const int64_t lanes = p.map.dtype == DType::kBFloat16 ? 2 * kDotLanes : kDotLanes;
  const int64_t pixels = p.map.shape.n * p.map.shape.h * p.map.shape.w;
  if (p.map.dtype != DType::kFloat32 && p.map.dtype != DType::kBFloat16) return false;
  if (p.w_dtype != p.map.dtype && p.w_dtype != DType::kFloat32) return false;
  return 0 < pixels && pixels <= kDotMostPixels && p.x_strides.c == 1 && p.w_strides.c == 1 &&
         p.x_shape.c % lanes == 0 && p.map.shape.c % kDotOutputs == 0;
}

}  // namespace layerwise::cpu
