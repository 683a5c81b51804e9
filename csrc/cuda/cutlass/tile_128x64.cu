#include "implicit_gemm.h"

namespace layerwise::cuda {

const FusedKernel kTile128x64 = fused_kernel<128, 64, 1, 4, 2>("cutlass sm90 128x64x64 cluster 1x1");
const FusedKernel kTile128x64Pair = fused_kernel<128, 64, 2, 4, 2>("cutlass sm90 128x64x64 cluster 2x1");

}  // namespace layerwise::cuda
