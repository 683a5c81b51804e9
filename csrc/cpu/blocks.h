// Blocks: how the statistics and the dense gradient sums cut a map.  The cut depends on the shape alone, never on the
// number of threads, so results do not either.
#pragma once

#include "../params.h"

namespace layerwise::cpu {

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// channels_last: a block is a run of pixels that are equally spaced in memory; about kBlockBytes, so that its second
// reading comes from the L2 cache.  contiguous: a block is one plane (n, c), and all channels of a sample share an index.
struct Blocks {
  int64_t count;       // blocks per channel
  int64_t tasks;       // units of work: count, or N*C planes
  int64_t rows;        // runs per sample: H, or 1 where rows follow each other without a gap
  int64_t run_length;  // pixels of a run
  int64_t block_length;
  int64_t blocks_per_run;
};

struct Block {
  int64_t n, h, w;  // first pixel
  int64_t length;   // pixels
};

constexpr int64_t kBlockBytes = 128 * 1024;
// Sums of float32 are taken over at most so many terms in a row before they go on in double: their rounding grows with
// the length.  Terms of one lane in a block, elements of a piece of a contiguous plane.
constexpr int64_t kBlockLength = 512;
constexpr int64_t kPieceLength = 2048;

static inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2;
}

static inline bool rows_follow_each_other(const Shape& shape, const Strides& s) { return s.h == shape.w * s.w; }
static inline bool samples_follow_each_other(const Shape& shape, const Strides& s) {
  return s.n == shape.h * shape.w * s.w;
}

// Cuts a map that is read through the strides a, b and c at once.
static inline Blocks make_blocks(const Map& map, const Strides& a, const Strides& b, const Strides& c) {
  const Shape& s = map.shape;
  if (map.layout == Layout::kContiguous) return {s.n, s.n * s.c, s.h, s.w, s.h * s.w, 1};
  const bool merge_rows = rows_follow_each_other(s, a) && rows_follow_each_other(s, b) && rows_follow_each_other(s, c);
  const bool merge_all = merge_rows && samples_follow_each_other(s, a) && samples_follow_each_other(s, b) &&
                         samples_follow_each_other(s, c);
  const int64_t runs = merge_all ? 1 : merge_rows ? s.n : s.n * s.h;
  const int64_t run_length = s.n * s.h * s.w / runs;
  int64_t length = kBlockBytes / (s.c * element_size(map.dtype));
  if (length > kBlockLength) length = kBlockLength;
  if (length > run_length) length = run_length;
  if (length < 1) length = 1;
  const int64_t per_run = (run_length + length - 1) / length;
  return {runs * per_run, runs * per_run, merge_rows ? 1 : s.h, run_length, length, per_run};
}

static inline Blocks statistics_blocks(const StatisticsParams& p) {
  return make_blocks(p.map, p.z_strides, p.z_strides, p.z_copy == nullptr ? p.z_strides : p.z_copy_strides);
}

static inline Blocks dense_blocks(const DenseSumsParams& p) {
  const Extension& x = p.extension;
  return make_blocks(p.map, p.z_strides, p.grad_y_strides, x.residual == nullptr ? p.z_strides : x.residual_strides);
}

// channels_last only.
static inline Block block_at(const Blocks& b, int64_t index) {
  const int64_t run = index / b.blocks_per_run;
  const int64_t w = index % b.blocks_per_run * b.block_length;
  const int64_t rest = b.run_length - w;
  return {run / b.rows, run % b.rows, w, rest < b.block_length ? rest : b.block_length};
}

// Elements per channel in block `index`, either layout.
static inline int64_t block_elements(const Map& map, const Blocks& b, int64_t index) {
  return map.layout == Layout::kContiguous ? b.block_length : block_at(b, index).length;
}

// Whether the kernels of extended.h are needed: of channels_last maps those for the common case take a residual, too.
static inline bool needs_extended(const Map& map, const Activation& a, const Extension& e) {
  return map.layout == Layout::kChannelsLast ? !is_plain(a, e) : is_extended(a, e);
}

// Rows of y to a block in the extended form, channels_last.
static inline int64_t extended_rows(const Extension& x) {
  return x.pooled_w < kBlockLength ? kBlockLength / x.pooled_w : 1;
}

// The weight gradient cuts the output channels into blocks, of which the last may be shorter by multiples of
// kWeightGradientLanes, and forms dz for about kWeightGradientPixels at a time, so that it stays in the L1 cache.
constexpr int64_t kWeightGradientBlock = 64;
constexpr int64_t kWeightGradientLanes = 16;
constexpr int64_t kWeightGradientPixels = 128;
constexpr int64_t kWeightGradientPixelsBFloat16 = 512;  // in pairs, and the longer run pays for forming them

static inline int64_t weight_gradient_blocks(const Shape& s) {
  return (s.c + kWeightGradientBlock - 1) / kWeightGradientBlock;
}

static inline int64_t weight_gradient_rows(const Map& dz) {
  const bool bfloat16 = dz.dtype == DType::kBFloat16;
  const int64_t rows = (bfloat16 ? kWeightGradientPixelsBFloat16 : kWeightGradientPixels) / dz.shape.w;
  return rows < 1 ? 1 : rows > dz.shape.h ? dz.shape.h : rows;
}

// Channels of a pixel in an interleaved row of bfloat16, which is written 32 at a time.
static inline int64_t interleaved_channels(int64_t channels) { return (channels + 31) / 32 * 32; }

// Bytes of the scratch buffer of a task: dz and, for bfloat16, dz and the input rows behind it as pairs of pixels.
static inline int64_t direct_gradient_scratch(const WeightGradientParams& p) {
  const Map& dz = p.gradient.map;
  const int64_t rows = weight_gradient_rows(dz), pairs = (dz.shape.w + 1) / 2;
  const int64_t plain = rows * dz.shape.w * kWeightGradientBlock * element_size(dz.dtype);
  if (dz.dtype != DType::kBFloat16) return plain;
  const int64_t x_rows = (rows - 1) * p.window.stride_h + (p.window.kernel_h - 1) * p.window.dilation_h + 1;
  return plain +
         4 * pairs * (rows * kWeightGradientBlock + x_rows * p.window.kernel_w * interleaved_channels(p.x_shape.c));
}

}  // namespace layerwise::cpu
