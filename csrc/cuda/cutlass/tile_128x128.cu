#include "implicit_gemm.h"

namespace layerwise::cuda {

const FusedKernel kTile128x128 = fused_kernel<128, 128, 1, 6, 1>("cutlass sm90 128x128x64 cluster 1x1");
const FusedKernel kTile128x128Pair = fused_kernel<128, 128, 2, 6, 1>("cutlass sm90 128x128x64 cluster 2x1");

}  // namespace layerwise::cuda
