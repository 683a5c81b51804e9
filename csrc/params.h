// Plain-data parameters: the only thing that passes from the glue (*_ops.cpp) to the kernels.
#pragma once

#include <cstdint>

#include "device/cells.h"

namespace layerwise {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Which dimension is innermost in memory: C (channels_last, NHWC) or W (contiguous, NCHW).
enum class Layout { kChannelsLast, kContiguous };

struct Shape {
  int64_t n, c, h, w;
};

// In elements; the innermost dimension of the layout has stride 1.
struct Strides {
  int64_t n, c, h, w;

  bool operator==(const Strides&) const = default;
};

struct Map {
  Shape shape;      // [N, C, H, W]
  Layout layout;
  DType dtype;      // of the elements; statistics and sums are float, or double for float64: the type A below
};

// Per channel, [C] of A each.
struct Channels {
  const void* mean;
  const void* rstd;
  const void* gamma;
  const void* beta;
};

constexpr int64_t kIgnoredTarget = -100;  // of a sample that cross-entropy leaves out, as in PyTorch

enum class ActivationKind {
  kReLU,
  kLeakyReLU,  // the identity, too
  kPReLU,
  kRReLU,
  kReLU6,
  kTanh,
  kSigmoid,
  kSiLU,
  kGELU,
  kGELUTanh,
  kHardswish
};

struct Activation {
  ActivationKind kind;
  double negative_slope;  // of kLeakyReLU; 1 is the identity.  Of kRReLU the least one
  double upper_slope;     // of kRReLU the largest one
};

enum class Pooling { kNone, kMax, kAverage };

// What else may stand between batch norm and y.
struct Extension {
  const void* residual;  // of z's shape and type, added before the activation, or null
  Strides residual_strides;
  const void* slopes;    // kPReLU: [C] of A
  const int64_t* seed;   // kRReLU: one value, on the device of the map
  Strides noise;         // kRReLU: number of an element, of which with the seed its slope is made
  int64_t first_noise;
  Pooling pooling;
  int64_t window_h, window_w;  // size and stride of the windows of z that y is pooled from; 1 without pooling
  int64_t pooled_h, pooled_w;  // size of y: that of z without pooling
  int64_t channel_step;        // between channels of y, moments and sums: 1 but for space_to_depth
};

// The common case but for a residual: a ReLU with a fixed slope, and y as large as z.
inline bool is_plain(const Activation& a, const Extension& e) {
  const bool fixed_slope = a.kind == ActivationKind::kReLU || a.kind == ActivationKind::kLeakyReLU;
  return fixed_slope && e.pooling == Pooling::kNone && e.channel_step == 1;
}

// Whether the kernels for the common case, which know nothing of an extension, do not suffice.
inline bool is_extended(const Activation& a, const Extension& e) { return !is_plain(a, e) || e.residual != nullptr; }

// Pass 1: blocks of the map -> mean and sum of squared deviations of each block.  The mean is block_mean +
// block_mean_rest: in A alone its rounding would spoil the variance between blocks where the mean is large.
struct StatisticsParams {
  Map map;
  const void* z;
  Strides z_strides;
  void* z_copy;           // null, or a dense map that receives z in the same pass
  Strides z_copy_strides;
  void* block_mean;       // [blocks, C] of A
  void* block_mean_rest;  // [blocks, C] of A
  void* block_m2;         // [blocks, C] of A
};

// Pass 2: y = pool(act(gamma*xhat + beta + residual)) and, per sample, cell of y and channel, the sums that loss and
// backward need.
struct ApplyParams {
  Map map;
  int64_t bins_h, bins_w;
  const void* z;
  Strides z_strides;
  void* y;  // or null: not wanted
  Strides y_strides;
  Channels channels;
  Activation activation;
  Extension extension;
  void* m1;               // [N, C, bins_h, bins_w] of A in the map's layout, or null: no moments
  void* m2;               // or null: no second moment
  void* sums;  // A0, A1 and, for the second moment, B0, B1; for kPReLU then C0 and C1; each laid out as m1
};

// Backward 1a: dense part, blocks of the map -> sum of s*g, of s*g*xhat and, for kPReLU, of g*dy/dslope per block.
struct DenseSumsParams {
  Map map;
  const void* z;
  Strides z_strides;
  const void* grad_y;
  Strides grad_y_strides;
  Channels channels;
  Activation activation;
  Extension extension;
  void* block_dbeta;  // [blocks, C] of A
  void* block_dgamma;  // [blocks, C] of A
  void* block_dslope;  // [blocks, C] of A, or null
};

// Backward 1b: affine part, dbeta = sum p*A0 + 2*q*B0, dgamma = sum p*A1 + 2*q*B1, dslope = sum p*C0 + 2*q*C1 over
// samples and cells.
struct CellSumsParams {
  Map map;  // of the moments' channels
  int64_t bins_h, bins_w;
  const void* p;  // dL/dm1 laid out as m1, or null
  const void* q;  // dL/dm2, or null
  const void* sums;
  int64_t slope_sums;  // which of the sums is C0
  double* dbeta;  // [C], added to
  double* dgamma;  // [C], added to
  double* dslope;  // [C], added to, or null
};

// Backward 2: dz, possibly in place over z, and the gradient of the residual.
struct InputGradientParams {
  Map map;
  int64_t bins_h, bins_w;
  const void* z;
  Strides z_strides;
  void* dz;
  Strides dz_strides;
  void* dresidual;  // or null
  Strides dresidual_strides;
  const void* grad_y;  // or null
  Strides grad_y_strides;
  const void* p;  // or null
  const void* q;  // or null
  Channels channels;
  const void* scaled_mean_dbeta;  // [C] of A: gamma*rstd * dbeta/M, zero with fixed statistics
  const void* scaled_mean_dgamma;  // [C] of A
  Activation activation;
  Extension extension;
};

// Kernel of a convolution and how it moves.
struct Window {
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// Weight gradient of a convolution without groups, channels_last, summed in float32: dw[k, c, kh, kw] = sum over samples and output
// pixels of dz[k] * x[c].  dz is formed in cache, a few rows at a time, and never written to memory, or lies there already.
struct WeightGradientParams {
  InputGradientParams gradient;  // its dz is not used
  bool is_formed;  // gradient.z is dz already, and nothing but it and its map is looked at
  const void* x;  // [N, C_in, H_in, W_in], channels_last
  Shape x_shape;
  Strides x_strides;
  Window window;
  int64_t chunks;  // the samples are cut into so many parts, each with its own dw
  bool winograd;  // by transformed tiles, see winograd.h
};

// Convolution z of x without groups, channels_last, by a kernel of this package; for some of the output channels, and with
// the statistics of z on the way.
struct ConvolutionParams {
  Map map;  // of z
  void* z;  // dense
  Strides z_strides;
  const void* x;  // in the dtype of z
  Shape x_shape;
  Strides x_strides;
  Window window;
  const void* w;  // [C_out, C_in, kernel_h, kernel_w] in the dtype of z
  Strides w_strides;
  int64_t channel_begin, channel_end;  // output channels, whole blocks of them
  void* weights;  // theirs, as the kernel reads them; see winograd.h and direct_convolution.h
  void* block_mean;  // as in StatisticsParams, [groups * group_blocks, C], or null: no statistics
  void* block_mean_rest;
  void* block_m2;
};

constexpr int64_t kDotPixels = 6;  // at most, whose sums with some output channels are in registers at a time

// What one tap of the kernel adds to a group of pixels.
struct DotTap {
  int64_t weights;            // elements from the weights of the first tap to those of this one
  const void* x[kDotPixels];  // first channels; of zeros where the tap is outside of x
};

// Convolution z of x without groups, channels_last, by dot products over the input channels.
struct DotParams {
  Map map;  // of z
  void* z;
  Strides z_strides;
  const void* x;  // in the dtype of z
  Shape x_shape;
  Strides x_strides;
  Window window;
  const void* w;  // [C_out, C_in, kernel_h, kernel_w], input channels innermost
  DType w_dtype;  // of z, or float32
  Strides w_strides;
  const DotTap* taps;  // of each group of pixels, those that reach x first
  const int64_t* tap_counts;
};

}  // namespace layerwise
