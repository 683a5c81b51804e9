// Direct convolution of bfloat16 maps: how it cuts a map.  Host code and the kernel share this; the arithmetic is in
// direct_convolution.h.
#pragma once

#include "blocks.h"

namespace layerwise::cpu {

constexpr int64_t kDirectLanes = 16;  // output channels are a multiple of this
constexpr int64_t kDirectBlock = 64;  // output channels at a time; the last block may have fewer
constexpr int64_t kDirectRowBytes = 32 << 10;  // about so much of the input is copied at a time
// With more terms to a sum, measured, the library's convolution is faster.  Weights of more than a part of the L1 cache must
// serve several pixels, which are those of one row.
constexpr int64_t kDirectMostTerms = 576, kDirectMostInputs = 256;
constexpr int64_t kDirectWeightBytes = 16 << 10, kDirectFewestColumns = 6;

struct DirectPlan {
  int64_t run;  // elements of x under one row of the kernel, side by side
  int64_t pairs;  // of them; the last one may be half empty
  int64_t pixels;  // of a copied row
  int64_t pitch;  // elements from one copied row to the next
  int64_t group_rows, groups_of_sample, groups;  // rows of z that a task takes
  int64_t group_blocks;  // statistics blocks of a group
};

static inline DirectPlan direct_plan(const Map& z, const Shape& x, const Window& window) {
  DirectPlan p{};
  p.run = window.kernel_w * x.c;
  p.pairs = divide_up(p.run, 2);
  p.pixels = (z.shape.w - 1) * window.stride_w + window.kernel_w;
  p.pitch = p.pixels * x.c;
  const int64_t fitting = (kDirectRowBytes / (2 * p.pitch) - window.kernel_h) / window.stride_h + 1;
  const int64_t wanted = kBlockLength / z.shape.w;
  p.group_rows = fitting < wanted ? fitting : wanted;
  if (p.group_rows > z.shape.h) p.group_rows = z.shape.h;
  if (p.group_rows < 1) p.group_rows = 1;
  p.groups_of_sample = divide_up(z.shape.h, p.group_rows);
  p.groups = z.shape.n * p.groups_of_sample;
  p.group_blocks = divide_up(p.group_rows * z.shape.w, kBlockLength);
  return p;
}

struct DirectRows {
  int64_t n, begin, end;  // of z
};
static inline DirectRows direct_rows(const DirectPlan& p, const Shape& z, int64_t group) {
  const int64_t begin = group % p.groups_of_sample * p.group_rows, end = begin + p.group_rows;
  return {group / p.groups_of_sample, begin, end < z.h ? end : z.h};
}

// Elements of the weights in the kernel's order.
static inline int64_t direct_weights(const DirectPlan& p, const Window& window, int64_t channels) {
  return window.kernel_h * p.pairs * channels * 2;
}

// Bytes of scratch memory of a task: the rows of x, with their padding, below a group.
static inline int64_t direct_scratch(const DirectPlan& p, const Window& window) {
  return ((p.group_rows - 1) * window.stride_h + window.kernel_h) * p.pitch * 2;
}

static inline bool direct_applies(const Map& z, const Shape& x, const Strides& x_strides, const Window& window) {
  const int64_t terms = window.kernel_h * window.kernel_w * x.c;
  const int64_t block = z.shape.c < kDirectBlock ? z.shape.c : kDirectBlock;
  if (terms * block * 2 > kDirectWeightBytes && z.shape.w < kDirectFewestColumns) return false;
  return z.layout == Layout::kChannelsLast && z.dtype == DType::kBFloat16 && x_strides.c == 1 &&
         window.dilation_h == 1 && window.dilation_w == 1 && z.shape.c % kDirectLanes == 0 &&
         x.c <= kDirectMostInputs && terms <= kDirectMostTerms && z.shape.n * z.shape.h * z.shape.w > 0;
}

}  // namespace layerwise::cpu
