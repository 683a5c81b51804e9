// Winograd convolution of 3x3 kernels with stride 1: how it cuts a map.  The cut depends on the shape alone, as that of
// blocks.h does.  Host code and kernels share this; the arithmetic is in winograd.h.
#pragma once

#include "blocks.h"

namespace layerwise::cpu {

constexpr int64_t kWinogradTaps = 3;
constexpr int64_t kWinogradLanes = 16;  // output channels are a multiple of this
constexpr int64_t kWinogradBlock = 64;  // output channels at a time; the last block may have fewer
constexpr int64_t kWinogradSkew = 16;  // floats behind each matrix of a workspace, against cache set conflicts
constexpr int64_t kWinogradTiles = 16;  // about so many tiles are transformed at a time
constexpr int64_t kWinogradTilesOfRow = 32;  // and at most so many of one row
constexpr int64_t kWinogradFewestInputs = 16;
// Fewer tiles do not pay for the transformation of the weights, which takes longer the larger the tiles are and saves
// less where the processor multiplies bfloat16 itself.
constexpr int64_t kWinogradFewestTiles = 32, kWinogradFewestTilesBFloat16 = 192;

// A tile is tile_h x tile_w output pixels.  It takes `products` multiplications per input and output channel instead of
// 9 * tile_h * tile_w: a third for 2x4, a quarter for 4x4.  Larger tiles lose digits, which float32 would show and
// bfloat16 does not.
struct WinogradPlan {
  int64_t tile_h, tile_w, products;
  int64_t rows_of_sample, rows;  // of tiles
  int64_t tiles_of_row;
  int64_t group_rows, groups;  // rows of tiles that a task takes
  int64_t group_blocks;  // statistics blocks of a group
  int64_t columns;  // of tiles: a long row is cut
  int64_t most_tiles;  // that are transformed at a time

  int64_t input_pitch;  // floats of a transformed group of inputs, of one product
  int64_t output_pitch;  // the same for one block of output channels
};

static inline int64_t round_to_lanes(int64_t channels) { return divide_up(channels, kWinogradLanes) * kWinogradLanes; }

// Most output channels of a block.
static inline int64_t winograd_block(const Shape& z) { return z.c < kWinogradBlock ? z.c : kWinogradBlock; }

static inline WinogradPlan winograd_plan(const Map& z, int64_t inputs) {
  WinogradPlan p{};
  p.tile_h = z.dtype == DType::kBFloat16 ? 4 : 2;
  p.tile_w = 4;
  p.products = (p.tile_h + kWinogradTaps - 1) * (p.tile_w + kWinogradTaps - 1);
  p.rows_of_sample = divide_up(z.shape.h, p.tile_h);
  p.rows = z.shape.n * p.rows_of_sample;
  p.tiles_of_row = divide_up(z.shape.w, p.tile_w);
  p.group_rows = divide_up(kWinogradTiles, p.tiles_of_row);
  if (p.group_rows > p.rows) p.group_rows = p.rows;
  p.groups = divide_up(p.rows, p.group_rows);
  p.columns = divide_up(p.tiles_of_row, divide_up(p.tiles_of_row, kWinogradTilesOfRow));
  p.most_tiles = p.group_rows * p.columns;
  p.group_blocks = divide_up(p.group_rows * p.tile_h * z.shape.w, kBlockLength);
  p.input_pitch = p.most_tiles * round_to_lanes(inputs) + kWinogradSkew;
  p.output_pitch = p.most_tiles * winograd_block(z.shape) + kWinogradSkew;
  return p;
}

// Pixels of z, which is dense, that rows [begin, end) of tiles cover: [first, last).
struct PixelRun {
  int64_t first, last;
};
static inline PixelRun winograd_pixels(const WinogradPlan& p, const Shape& z, int64_t begin, int64_t end) {
  const auto row_of = [&](int64_t row) {
    const int64_t n = row / p.rows_of_sample, h = row % p.rows_of_sample * p.tile_h;
    return n * z.h + h;
  };
  return {row_of(begin) * z.w, row_of(end) * z.w};
}

// Floats that the transformed weights of `channels` output channels take.
static inline int64_t winograd_weights(const WinogradPlan& p, int64_t inputs, int64_t channels) {
  return divide_up(channels, kWinogradBlock) * p.products * (inputs * kWinogradBlock + kWinogradSkew);
}

// Bytes of scratch memory of a forward task: transformed inputs and outputs of a group, a pixel of zeros.
static inline int64_t winograd_scratch(const WinogradPlan& p, int64_t inputs) {
  return (p.products * (p.input_pitch + p.output_pitch) + round_to_lanes(inputs)) * static_cast<int64_t>(sizeof(float));
}

// The same for a task of the weight gradient: transformed inputs and gradients of a group, transformed sums, dz of a row
// of tiles, pixels of zeros.
static inline int64_t winograd_gradient_scratch(const WinogradPlan& p, const Shape& z, int64_t inputs) {
  const int64_t block = winograd_block(z);
  const int64_t floats = p.products * (p.input_pitch + p.output_pitch + inputs * block + kWinogradSkew) +
                         (p.tile_h * z.w + 1) * block + inputs;
  return floats * static_cast<int64_t>(sizeof(float));
}

// Whether a convolution can be done this way at a gain: elsewhere tiles are mostly edge, or transforms all the work.
static inline bool winograd_applies(const Map& z, const Shape& x, const Strides& x_strides, const Window& window) {
  if (z.layout != Layout::kChannelsLast || x_strides.c != 1) return false;
  if (z.dtype != DType::kFloat32 && z.dtype != DType::kBFloat16) return false;
  if (window.kernel_h != kWinogradTaps || window.kernel_w != kWinogradTaps || window.stride_h != 1 ||
      window.stride_w != 1 || window.dilation_h != 1 || window.dilation_w != 1)
    return false;
  if (z.shape.c % kWinogradLanes != 0 || x.c < kWinogradFewestInputs) return false;
  const WinogradPlan plan = winograd_plan(z, x.c);
  const int64_t fewest = z.dtype == DType::kBFloat16 ? kWinogradFewestTilesBFloat16 : kWinogradFewestTiles;
  if (plan.rows * plan.tiles_of_row < fewest) return false;
  const int64_t products = plan.rows_of_sample * plan.tiles_of_row * plan.products;
  return 2 * products <= z.shape.h * z.shape.w * kWinogradTaps * kWinogradTaps;
}

// The weight gradient cuts the input channels, too, so that the transformed sums stay in the L2 cache: 128 channels for
// float32, 80 for bfloat16 with its larger tiles.
constexpr int64_t kWinogradGradientSums = 24 * 128 * kWinogradBlock;

// Most input channels that a task of the weight gradient takes.
static inline int64_t weight_gradient_inputs(const WeightGradientParams& p) {
  if (!p.winograd) return p.x_shape.c;
  const int64_t products = winograd_plan(p.gradient.map, p.x_shape.c).products;
  const int64_t most = kWinogradGradientSums / (products * kWinogradBlock) / kWinogradLanes * kWinogradLanes;
  return round_to_lanes(divide_up(p.x_shape.c, divide_up(p.x_shape.c, most)));
}

static inline int64_t weight_gradient_scratch(const WeightGradientParams& p) {
  const Map& dz = p.gradient.map;
  const int64_t inputs = weight_gradient_inputs(p);
  return p.winograd ? winograd_gradient_scratch(winograd_plan(dz, inputs), dz.shape, inputs)
                    : direct_gradient_scratch(p);
}

}  // namespace layerwise::cpu
