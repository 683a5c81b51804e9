// The convolution on the CPU, by this package's kernels where they are faster and by ATen otherwise, with the statistics
// of its output.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "convolution.h"
#include "cpu_ops.h"
#include "product.h"

namespace layerwise {

struct Statistics {
  Values mean, var;  // of z
};

inline StatisticsParams statistics_params(const Tensor& z, Layout layout) {
  StatisticsParams p{};
  p.map = map_of(z, layout);
  p.z = z.const_data_ptr();
  p.z_strides = strides_of(z);
  return p;
}

inline Statistics finish(const cpu::BatchStatistics& statistics, int64_t channels) {
  Statistics s{Values(channels), Values(channels)};
  statistics.finish(s.mean.data(), s.var.data());
  return s;
}

inline Statistics batch_statistics(const Tensor& z, Layout layout) {
  cpu::BatchStatistics statistics(z.size(1));
  statistics.add(statistics_params(z, layout), parallel_for);
  return finish(statistics, z.size(1));
}

// A large batch is convolved in pieces, each copied into z's pooled memory while its statistics are taken.  The library
// allocates a convolution's output itself, from memory that the C library tends to have returned to the system: the page
// faults of a whole large map cost up to a third of its convolution, those of one piece do not, for the next ones reuse
// it.  Smaller maps mostly come from memory that is still there, and copying them costs more than it saves.
constexpr int64_t kWholeBytes = 16 << 20;
constexpr int64_t kPieceBytes = 4 << 20;
// A piece is at least so many times larger than the weights, which each call reorders.
constexpr int64_t kPieceWeights = 8;

inline int64_t convolution_pieces(const Shape& z, const Tensor& weight, int64_t element_size) {
  const int64_t bytes = z.n * z.c * z.h * z.w * element_size;
  if (bytes < kWholeBytes) return 1;
  const int64_t piece = std::max(kPieceBytes, kPieceWeights * weight.numel() * element_size);
  return std::clamp<int64_t>((bytes + piece / 2) / piece, 1, z.n);
}

// Convolution z of x that this package has; the weight is [z's channels, x's channels, kernel] under its strides, from `w`
// on.
inline void own_convolution(const Tensor& x, const void* w, const Strides& w_strides, const Window& window, Tensor& z,
                            cpu::BatchStatistics* statistics) {
  ConvolutionParams p{};
  p.map = map_of(z, Layout::kChannelsLast);
  p.z = z.mutable_data_ptr();
  p.z_strides = strides_of(z);
  p.x = x.const_data_ptr();
  p.x_shape = shape_of(x);
  p.x_strides = strides_of(x);
  p.window = window;
  p.w = w;
  p.w_strides = w_strides;
  cpu::convolution(p, statistics, parallel_for);
}

inline Tensor widened(const Tensor& t) { return torch::stable::to(t, ScalarType::Float); }

// ATen's convolution.  Of float16 it is float32's, rounded: with processors that cannot multiply float16, ATen's own takes
// up to seventy times as long.
inline Tensor library_convolution(const Tensor& input, const Tensor& w, const Ints& stride, const Ints& padding,
                                  const Ints& dilation, int64_t groups) {
  if (input.scalar_type() != ScalarType::Half) return convolution(input, w, stride, padding, dilation, groups);
  const Tensor z = convolution(widened(input), widened(w), stride, padding, dilation, groups);
  return torch::stable::to(z, ScalarType::Half);
}

// The gradients in the same way.
inline std::tuple<Tensor, Tensor> library_gradients(const Tensor& dz, const Tensor& input, const Tensor& weight,
                                                    const Ints& stride, const Ints& padding, const Ints& dilation,
                                                    int64_t groups, bool needs_input, bool needs_weight) {
  if (dz.scalar_type() != ScalarType::Half)
    return convolution_gradients(dz, input, weight, stride, padding, dilation, groups, needs_input, needs_weight);
  auto [grad_input, grad_weight] =
      convolution_backward(widened(dz), widened(input), widened(weight_as(weight, ScalarType::Half)), stride, padding,
                           dilation, groups, needs_input, needs_weight);
  if (needs_weight) grad_weight = as_gradient_of(weight, grad_weight);
  return {torch::stable::to(grad_input, ScalarType::Half), grad_weight};
}

// Samples [first, last).
inline Tensor samples(const Tensor& t, int64_t first, int64_t last) {
  Tensor narrowed = t;  // narrow takes a tensor that it may change
  return torch::stable::narrow(narrowed, 0, first, last - first);
}

// Whether that is this package's own convolution.
inline bool has_own_convolution(const Tensor& input, const Tensor& w, const Shape& s, const Ints& stride,
                                const Ints& padding, const Ints& dilation, int64_t groups) {
  return groups == 1 && is_nested_channels_last(input) &&
         cpu::has_convolution(map_of(input, s, Layout::kChannelsLast), shape_of(input), strides_of(input),
                              window_of(w, stride, padding, dilation));
}

// Convolution of a small map by this package's own kernel; nothing where the library's is faster.
inline OptionalTensor dot_convolution(const Tensor& input, const Tensor& conv_weight, const Shape& s,
                                      const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  if (groups != 1 || !is_nested_channels_last(input)) return {};
  DotParams p{};
  p.map = map_of(input, s, Layout::kChannelsLast);
  p.z_strides = dense_strides(s, Layout::kChannelsLast);
  p.x = input.const_data_ptr();
  p.x_shape = shape_of(input);
  p.x_strides = strides_of(input);
  p.window = window_of(conv_weight, stride, padding, dilation);
  p.w = conv_weight.const_data_ptr();
  p.w_dtype = dtype_of(conv_weight);
  p.w_strides = strides_of(conv_weight);
  if (!cpu::has_dot_convolution(p)) return {};
  Tensor z = allocate_map(input, s, Layout::kChannelsLast);
  p.z = z.mutable_data_ptr();
  cpu::dot_convolution(p, parallel_for);
  return z;
}

// Whether the convolution reads every stride-th pixel alone: a smaller map, which is convolved without stride.
inline bool skips_pixels(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding) {
  const Ints one{1, 1}, zero{0, 0}, kernel{weight.size(2), weight.size(3)};
  return kernel == one && stride != one && padding == zero && is_nested_channels_last(input);
}

// Those pixels where they lie, [s.n, C, s.h, s.w]; `map` must outlive the result.
inline Tensor pixels_apart(const Tensor& map, const Shape& s, const Ints& stride) {
  const Strides d = strides_of(map);
  const Ints size{s.n, map.size(1), s.h, s.w}, strides{d.n, d.c, d.h * stride[0], d.w * stride[1]};
  return torch::stable::from_blob(const_cast<void*>(map.const_data_ptr()), size, strides, map.device(),
                                  map.scalar_type());
}

inline Tensor take_pixels(const Tensor& map, const Shape& s, const Ints& stride) {
  Tensor taken = allocate_map(map, {s.n, map.size(1), s.h, s.w}, Layout::kChannelsLast);
  torch::stable::copy_(taken, pixels_apart(map, s, stride));
  return taken;
}

// The way back for gradients: zero where no pixel was taken.
inline Tensor spread_pixels(const Tensor& taken, const Shape& whole, const Ints& stride) {
  Tensor map = allocate_map(taken, whole, Layout::kChannelsLast);
  torch::stable::zero_(map);
  Tensor pixels = pixels_apart(map, shape_of(taken), stride);
  torch::stable::copy_(pixels, taken);
  return map;
}

// Whether that is a product of matrices, pixels by channels.
inline bool is_product(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                       int64_t groups) {
  const Ints one{1, 1}, zero{0, 0}, kernel{weight.size(2), weight.size(3)};
  return kernel == one && stride == one && padding == zero && groups == 1 && is_nested_channels_last(input) &&
         is_dense(input, Layout::kChannelsLast) &&
         cpu::prefers_product(dtype_of(input), weight.size(1), weight.size(0));
}

// A dense channels_last map as a matrix, pixels by channels.
inline Tensor pixels_of(const Tensor& map) {
  const Shape s = shape_of(map);
  return matrix_of(map, s.n * s.h * s.w, s.c, s.c, 1);
}

// A 1x1 kernel as a matrix; `back` from output to input channels.
inline Tensor channels_of(const Tensor& weight, bool back) {
  const Strides s = strides_of(weight);
  return back ? matrix_of(weight, weight.size(0), weight.size(1), s.n, s.c)
              : matrix_of(weight, weight.size(1), weight.size(0), s.c, s.n);
}

// Gradients from dz, a dense channels_last map, of a convolution that is_product.
inline std::tuple<Tensor, Tensor> product_gradients(const Tensor& dz, const Tensor& input, const Tensor& conv_weight,
                                                    bool needs_input, bool needs_weight) {
  Tensor grad_input = empty_vector(dz, 0, dz.scalar_type()), grad_weight = grad_input;
  if (needs_input) {
    grad_input = allocate_map(input, shape_of(input), Layout::kChannelsLast);
    Tensor gradient = pixels_of(grad_input);
    product_into(gradient, pixels_of(dz), channels_of(weight_as(conv_weight, dz.scalar_type()), true));
  }
  if (needs_weight) {
    const Shape s = shape_of(conv_weight);
    grad_weight = allocate(dz, s, dense_strides(s, Layout::kContiguous), dz.scalar_type());
    Tensor gradient = channels_of(grad_weight, true);
    product_into(gradient, torch::stable::transpose(pixels_of(dz), 0, 1), pixels_of(input));
    grad_weight = as_gradient_of(conv_weight, grad_weight);
  }
  return {grad_input, grad_weight};
}

// The convolution, of shape s and in a layout that the kernels read, and its statistics where they are asked for.
inline std::pair<Tensor, Statistics> convolve(const Tensor& input, const Tensor& conv_weight, const Shape& s,
                                              const Ints& stride, const Ints& padding, const Ints& dilation,
                                              int64_t groups, bool needs_statistics) {
  if (const OptionalTensor z = dot_convolution(input, conv_weight, s, stride, padding, dilation, groups))
    return {*z, needs_statistics ? batch_statistics(*z, Layout::kChannelsLast) : Statistics{}};
  if (skips_pixels(input, conv_weight, stride, padding))
    return convolve(take_pixels(input, s, stride), conv_weight, s, {1, 1}, padding, dilation, groups, needs_statistics);
  const Tensor w = weight_as(conv_weight, input.scalar_type());
  const bool own = has_own_convolution(input, w, s, stride, padding, dilation, groups);
  if (!own && is_product(input, w, stride, padding, groups)) {
    const Tensor z = allocate_map(input, s, Layout::kChannelsLast);
    Tensor pixels = pixels_of(z);
    product_into(pixels, pixels_of(input), channels_of(w, false));
    return {z, needs_statistics ? batch_statistics(z, Layout::kChannelsLast) : Statistics{}};
  }
  const int64_t pieces = convolution_pieces(s, w, input.element_size());
  Statistics statistics;
  OptionalTensor z;
  cpu::BatchStatistics batch(s.c);
  if (own) {
    z = allocate_map(input, s, Layout::kChannelsLast);
    own_convolution(input, w.const_data_ptr(), strides_of(w), window_of(w, stride, padding, dilation), *z,
                    needs_statistics ? &batch : nullptr);
    if (needs_statistics) statistics = finish(batch, s.c);
  } else if (pieces == 1) {
    z = library_convolution(input, w, stride, padding, dilation, groups);
  } else {
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t first = s.n * i / pieces, last = s.n * (i + 1) / pieces;
      const auto [piece, layout] =
          readable(library_convolution(samples(input, first, last), w, stride, padding, dilation, groups));
      if (!z.has_value()) z = allocate_map(input, s, layout);
      StatisticsParams p = statistics_params(piece, layout);
      p.z_copy_strides = strides_of(*z);
      p.z_copy = static_cast<char*>(z->mutable_data_ptr()) + first * p.z_copy_strides.n * input.element_size();
      batch.add(p, parallel_for);
    }
    if (needs_statistics) statistics = finish(batch, s.c);
  }
  const auto [map, layout] = readable(*z);
  if (!own && pieces == 1 && needs_statistics) statistics = batch_statistics(map, layout);
  return {map, statistics};
}

}  // namespace layerwise
