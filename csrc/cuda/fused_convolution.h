// Convolution with the statistics of its result, for the glue: plain data in, nothing of torch, CUDA or CUTLASS in this
// header.  Without CUTLASS in the build there are no such kernels; docs/cuda.md.
#pragma once

#include "kernels.h"

namespace layerwise::cuda {

// z = convolution(x, w) without groups, and the sums of z and of z * z over the pixels of each tile, of the float32
// accumulators before they are rounded to z.
struct FusedConvolution {
  DType dtype;  // bfloat16 or float16
  Shape input, output;  // [N, C, H, W]; dense channels_last, 16-byte aligned, as is w
  Window window;
  const void* x;
  const void* w;  // [C_out, kH, kW, C_in]
  void* z;
  float* tile_sums;  // [tiles, row_stride] of the plan, in which nothing needs to be set; see TileSums
  float* tile_squares;  // the same
};

struct FusedConvolutionPlan {
  bool possible;  // the rest is 0 otherwise
  int64_t tiles;  // of pixels
  int64_t tile_rows;  // pixels of a tile
  int64_t row_stride;  // floats from one tile to the next: the channels, and as many more as make whole tiles
};

// Kernels are numbers from 0 on.
int fused_convolution_count();  // 0 without CUTLASS
const char* fused_convolution_name(int kernel);
bool fused_convolution_runs_here();  // whether the current device is of their architecture

// Looks at dtype, shapes and window only and needs no device.
FusedConvolutionPlan plan_fused_convolution(int kernel, const FusedConvolution& p);

// Throws std::runtime_error, which names the kernel, where the plan is not possible and where CUTLASS or CUDA fails.
void fused_convolution(int kernel, const FusedConvolution& p, Stream stream);

}  // namespace layerwise::cuda
