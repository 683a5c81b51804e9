#include "implicit_gemm.h"

namespace layerwise::cuda {

const FusedKernel kTile64x64 = fused_kernel<64, 64, 1, 4, 3>("cutlass sm90 64x64x64 cluster 1x1");

}  // namespace layerwise::cuda
