// The passes of the operator on the CPU: kernels over parallel tasks, and the combination of their partial results.
#pragma once

#include <functional>
#include <vector>

#include "../params.h"

namespace layerwise::cpu {

// Runs body(begin, end) over [0, tasks) on the caller's thread pool, at least `grain` tasks at a time.
using ParallelFor =
    std::function<void(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

// Mean and biased variance per channel, over one map or over the pieces of one.
class BatchStatistics {
 public:
  explicit BatchStatistics(int64_t channels) : channels_(channels) {}

  // The outputs of p are set here.
  void add(StatisticsParams p, const ParallelFor& parallel_for);
  // One more block of so many elements per channel; the arguments are indexed by channel.
  void add_block(int64_t elements, const float* mean, const float* mean_rest, const float* m2);
  void finish(double* mean, double* var) const;  // [C] each

 private:
  int64_t channels_;
  int64_t elements_ = 0;
  std::vector<double> block_elements_;  // [blocks]
  std::vector<double> block_mean_;      // [blocks, C]
  std::vector<double> block_m2_;        // [blocks, C]
};

void apply(const ApplyParams& p, const ParallelFor& parallel_for);

// dbeta, dgamma and, if it is not null, dslope, [C] each, are added to.  The outputs of p are set here.
void dense_sums(DenseSumsParams p, double* dbeta, double* dgamma, double* dslope, const ParallelFor& parallel_for);
void cell_sums(const CellSumsParams& p, const ParallelFor& parallel_for);

void input_gradient(const InputGradientParams& p, const ParallelFor& parallel_for);

// Whether the kernels in use have Winograd's convolution for this one and gain by it: 3x3, stride 1, channels_last.
bool has_winograd(const Map& z, const Shape& x_shape, const Strides& x_strides, const Window& window);
// The same for that one or another whose output may lie in memory that is there already: bfloat16 with few terms to a sum.
bool has_convolution(const Map& z, const Shape& x_shape, const Strides& x_strides, const Window& window);

// Writes z, and its statistics where asked for.  Channels, weights and blocks of p are set here.
void convolution(const ConvolutionParams& p, BatchStatistics* statistics, const ParallelFor& parallel_for);

// Whether the kernels in use convolve this by dot products and gain by it: few pixels, channels innermost in x and in the
// weights.  The taps of p are set by dot_convolution.
bool has_dot_convolution(const DotParams& p);
void dot_convolution(DotParams p, const ParallelFor& parallel_for);

// Whether a 1x1 convolution of such maps is taken from the library as a product of matrices, whose output may lie in memory
// that is there already: where the processor multiplies pairs of bfloat16, that is no slower than its convolution.
bool prefers_product(DType dtype, int64_t in_channels, int64_t out_channels);

// Whether the kernels in use can do it and gain by it: channels_last with enough channels, AVX-512.
bool has_weight_gradient(const Map& dz, const Shape& x_shape, const Strides& x_strides, const Window& window);

// Writes dw[k, c, kh, kw] through its strides {k, c, kh, kw}.  chunks and winograd of p are set here.
void weight_gradient(WeightGradientParams p, float* dw, const Strides& dw_strides, const ParallelFor& parallel_for);

}  // namespace layerwise::cpu
