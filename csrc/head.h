// Checks of the small head, pooled_linear_cross_entropy, and the shape of what it works on.
#pragma once

#include <cmath>

#include "checks.h"

namespace layerwise {

// Names the argument, what it was and what is allowed.  Gives the layout of m1.
inline Layout check_head(const Tensor& m1, const Tensor& weight, const Ints& size) {
  STD_TORCH_CHECK(m1.dim() == 4 && m1.numel() > 0,
                  "m1 must have 4 dimensions [N, C, bins_h, bins_w], none of them 0, got ", to_string(size_of(m1)));
  STD_TORCH_CHECK(m1.scalar_type() == ScalarType::Float || m1.scalar_type() == ScalarType::Double,
                  "m1 must be float32 or float64, got ", dtype_name(m1.scalar_type()));
  check_device("weight", weight, m1);
  const Shape s = shape_of(m1);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == s.c * s.h * s.w &&
                      weight.scalar_type() == m1.scalar_type(),
                  "weight must have shape [classes, ", s.c * s.h * s.w,
                  "], a value per channel and cell of m1, and dtype ", dtype_name(m1.scalar_type()), ", got ",
                  to_string(size_of(weight)), ", ", dtype_name(weight.scalar_type()));
  STD_TORCH_CHECK(size.size() == 2 && size[0] >= s.h && size[1] >= s.w, "size must be (H, W) of the map, at least (",
                  s.h, ", ", s.w, "), one element per cell, got ", to_string(size));
  return s.c > 1 && m1.stride(1) == 1 ? Layout::kChannelsLast : Layout::kContiguous;
}

inline void check_vector(const char* name, const Tensor& t, const Tensor& m1, int64_t length, ScalarType dtype) {
  check_device(name, t, m1);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == length && t.scalar_type() == dtype, name, " must have shape [", length,
                  "] and dtype ", dtype_name(dtype), ", got ", to_string(size_of(t)), ", ",
                  dtype_name(t.scalar_type()));
}

inline void check_head_forward(const Tensor& m1, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                               double label_smoothing) {
  if (bias.has_value()) check_vector("bias", *bias, m1, weight.size(0), m1.scalar_type());
  check_vector("target", target, m1, m1.size(0), ScalarType::Long);
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must lie between 0 and 1, got ",
                  label_smoothing);
}

inline void check_head_backward(const Tensor& grad_logits, const OptionalTensor& scale, const Tensor& m1,
                                const Tensor& weight) {
  check_device("grad_logits", grad_logits, m1);
  const Ints logits{m1.size(0), weight.size(0)};
  STD_TORCH_CHECK(size_of(grad_logits) == logits && grad_logits.scalar_type() == m1.scalar_type(),
                  "grad_logits must have shape ", to_string(logits), " and dtype ", dtype_name(m1.scalar_type()),
                  ", got ", to_string(size_of(grad_logits)), ", ", dtype_name(grad_logits.scalar_type()));
  if (!scale.has_value()) return;
  check_device("scale", *scale, m1);
  STD_TORCH_CHECK(scale->numel() == 1 && scale->scalar_type() == m1.scalar_type(), "scale must be one number of dtype ",
                  dtype_name(m1.scalar_type()));
}

inline Tensor as_dense(const Tensor& t, Layout layout) { return is_dense(t, layout) ? t : dense_copy(t, layout); }

inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  return empty_strided(like, {rows, columns}, {columns, 1}, like.scalar_type());
}

// The sums of a batch, dense in a layout, as a matrix [N, C * bins_h * bins_w] in the order of memory.  Shares memory.
inline Tensor features_of(const Tensor& m1) {
  const int64_t rows = m1.size(0), columns = m1.numel() / rows;
  return torch::stable::from_blob(m1.data_ptr(), {rows, columns}, {columns, 1}, m1.device(), m1.scalar_type());
}

}  // namespace layerwise
