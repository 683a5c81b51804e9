// The kernels of this folder, a file for each tile shape, so that they compile side by side.
#pragma once

#include "../fused_convolution.h"

namespace layerwise::cuda {

struct FusedKernel {
  const char* name;
  FusedConvolutionPlan (*plan)(const FusedConvolution&);
  void (*run)(const FusedConvolution&, Stream);
};

// Pair: clusters of two blocks, which load the weights once for both.
extern const FusedKernel kTile64x64, kTile64x128, kTile128x64, kTile128x64Pair, kTile128x128, kTile128x128Pair;

}  // namespace layerwise::cuda
