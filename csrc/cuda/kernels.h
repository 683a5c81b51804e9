// The launchers of the CUDA kernels, for the glue: plain data in, nothing of torch or CUDA in this header.
//
// Maps have any strides; 16-byte accesses are used where the channels (channels_last) lie next to each other and are
// aligned.  A is float, or double for float64 maps: the type of statistics, moments, sums and their gradients, whose arrays
// begin at multiples of 16 bytes.
#pragma once

#include "../params.h"

namespace layerwise::cuda {

using Stream = void*;  // cudaStream_t

// What normalises a map, [C] of A each.
struct Norm {
  const void* mean;
  const void* var;  // biased
  const void* weight;  // or null: 1
  const void* bias;  // or null: 0
  double eps;
  Activation activation;
  Extension extension;
};

// Mean and M2, the sum of squared deviations, of a set of values.  In double: the mean of float32 values that are much
// larger than their deviation is not a float32.
struct Moments {
  double mean, m2;
};

struct Statistics {
  Map map;
  const void* z;
  Strides z_strides;
  Moments* partial;  // statistics_partials of them
  void* mean;  // [C] of A
  void* var;  // [C] of A, biased
};
int64_t statistics_partials(const Map& map);
void statistics(const Statistics& p, Stream stream);

// Mean and variance from sums over tiles of pixels (fused_convolution.h).
struct TileSums {
  int64_t rows, channels, tiles;
  int64_t row_stride;  // from one tile to the next
  const float* sums;  // [tiles, row_stride] of z
  const float* squares;  // of z * z
  float* mean;  // [C]
  float* var;  // [C], biased
};
void combine_tile_sums(const TileSums& p, Stream stream);

struct Apply {
  Map map;
  int64_t bins_h, bins_w;
  const void* z;
  Strides z_strides;
  void* y;  // or null: not wanted
  Strides y_strides;
  Norm norm;
  void* m1;  // [N, C, bins_h, bins_w] of A in the map's layout, or null: no moments
  void* m2;  // or null: no second moment
  void* sums;  // A0, A1 and, for the second moment, B0, B1; for kPReLU then C0 and C1; each laid out as m1
};
void apply(const Apply& p, Stream stream);

// A map of z with a dense gradient of what becomes of it.
struct DenseMap {
  Map map;
  const void* z;
  Strides z_strides;
  const void* grad_y;
  Strides grad_y_strides;
  Extension extension;
};

struct BackwardSums {
  Map moments;  // [N, channels of y, bins_h, bins_w]
  const void* p;  // dL/dm1 laid out as m1, or null
  const void* q;  // dL/dm2, or null
  const void* sums;
  int64_t slope_sums;  // which of the sums is C0
  const DenseMap* dense;  // on the host
  int64_t dense_maps;  // 0 without a gradient of y, several for space_to_depth
  Norm norm;  // its extension is that of the cells
  void* partial;  // backward_sums_partials of A
  void* dgamma;  // [C] of A
  void* dbeta;  // [C] of A
  void* dslope;  // [C] of A, or null
};
int64_t backward_sums_partials(const BackwardSums& p);
void backward_sums(const BackwardSums& p, Stream stream);

struct InputGradient {
  Map map;
  int64_t bins_h, bins_w;
  const void* z;
  Strides z_strides;
  void* dz;  // may be z
  Strides dz_strides;
  void* dresidual;  // or null
  Strides dresidual_strides;
  const void* grad_y;  // or null
  Strides grad_y_strides;
  const void* p;  // or null
  const void* q;  // or null
  Norm norm;
  const void* dgamma;
  const void* dbeta;
  double count;  // elements per channel, 0 with fixed statistics
};
void input_gradient(const InputGradient& p, Stream stream);

// running = (1 - momentum) * running + momentum * batch, with the unbiased variance of `count` elements.
struct RunningStatistics {
  DType dtype;  // float32 or float64, of all arrays
  int64_t channels;
  void* running_mean;
  void* running_var;
  const void* mean;
  const void* var;
  const void* shift;  // added to the mean, or null
  double count, momentum;
};
void update_running_statistics(const RunningStatistics& p, Stream stream);

// Batch norm with fixed statistics, folded into the convolution before it: w' = scale * w, b' = beta + scale * (b - mean)
// with scale = gamma*rstd.  Written in the type of the maps.
struct Fold {
  DType from, to;  // equal, or float32 to a half type
  int64_t channels, weights_per_channel;
  const void* weight;  // channels outermost, the rest in any dense order, which the result has, too
  const void* conv_bias;  // [C] of A, or null
  Norm norm;  // float32, or float64 for float64 maps
  void* folded_weight;
  void* folded_bias;
};
void fold(const Fold& p, Stream stream);

// Average pooling from sums over cells, a linear classifier and cross-entropy (functional.pooled_linear_cross_entropy).
struct Head {
  DType dtype;  // float32 or float64, of all arrays
  Layout layout;  // of the sums and of their gradient, dense
  Shape moments;  // [N, C, bins_h, bins_w]
  int64_t height, width;  // of the map that was summed
  int64_t classes;
  const void* m1;
  const void* weight;  // [classes, C * bins_h * bins_w]
};

struct HeadForward {
  Head head;
  const void* bias;  // [classes], or null
  const int64_t* targets;  // [N]
  double label_smoothing;
  void* logits;  // [N, classes]
  void* grad_logits;  // [N, classes], of the loss
  void* sample_losses;  // [N]
  void* loss;  // mean over the samples that are not ignored
};
void head_forward(const HeadForward& p, Stream stream);

struct HeadBackward {
  Head head;
  const void* grad_logits;
  const void* scale;  // a factor of all gradients on the device, or null: 1
  void* grad_m1;  // each of the three may be null
  void* grad_weight;
  void* grad_bias;
};
void head_backward(const HeadBackward& p, Stream stream);

}  // namespace layerwise::cuda
