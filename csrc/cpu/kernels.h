// The table of CPU kernels of one instruction set.
#pragma once

#include "../params.h"

namespace layerwise::cpu {

// Each kernel does the tasks [begin, end) of its pass; tasks are independent of each other.
struct Kernels {
  void (*statistics)(const StatisticsParams&, int64_t begin, int64_t end);         // blocks, see blocks.h
  void (*apply)(const ApplyParams&, int64_t begin, int64_t end);  // channels_last: (n, bin row); contiguous: (n, c)
  void (*dense_sums)(const DenseSumsParams&, int64_t begin, int64_t end);  // blocks
  void (*cell_sums)(const CellSumsParams&, int64_t begin, int64_t end);  // channels
  void (*input_gradient)(const InputGradientParams&, int64_t begin,
                         int64_t end);  // channels_last: (n, row segment); contiguous: (n, c)
  // Null where the instruction set has too few registers for these to beat the library's convolution.
  void (*winograd_weights)(const ConvolutionParams&, int64_t begin, int64_t end);               // input channels
  void (*winograd)(const ConvolutionParams&, int64_t begin, int64_t end, void* scratch);        // groups of tiles
  // Writes dw, [kernel_h, kernel_w, C_in, block], for one chunk of the samples and one block of output channels.
  void (*weight_gradient)(const WeightGradientParams&, int64_t chunk, int64_t block, float* dw, void* scratch);
  void (*dot_convolution)(const DotParams&, int64_t begin, int64_t end, void* scratch);  // fours of output channels
  // Null where it does not multiply pairs of bfloat16.
  void (*direct_weights)(const ConvolutionParams&, int64_t begin, int64_t end);  // rows of the kernel
  void (*direct_convolution)(const ConvolutionParams&, int64_t begin, int64_t end, void* scratch);  // groups of rows
  bool pairs;  // whether it multiplies pairs of bfloat16
};

// Defined by kernels.cpp, which is compiled once for each instruction set.
namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace layerwise::cpu
