#include "implicit_gemm.h"

namespace layerwise::cuda {

const FusedKernel kTile64x128 = fused_kernel<64, 128, 1, 4, 2>("cutlass sm90 64x128x64 cluster 1x1");

}  // namespace layerwise::cuda
