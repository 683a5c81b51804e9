// Checks of the operators' arguments, and what all backends make of them.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "maps.h"

namespace layerwise {

// -- Checks: each names the argument, what it was and what is allowed --------------------------------------------------

// float32, bfloat16, float64 and, on a device that has it, float16.
inline void check_map(const char* name, const Tensor& t, bool half) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions [N, C, H, W], got shape ", to_string(size_of(t)));
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Double ||
                      (half && dtype == ScalarType::Half),
                  name, " must be float32, bfloat16", half ? ", float16" : "", " or float64, got ", dtype_name(dtype));
  STD_TORCH_CHECK(t.numel() > 0, name, " must not be empty, got shape ", to_string(size_of(t)));
}

inline void check_device(const char* name, const Tensor& t, const Tensor& map) {
  STD_TORCH_CHECK(t.device() == map.device(), name, " must be on the device of the map, ", device_name(map), ", got ",
                  device_name(t));
}

inline void check_channels(const char* name, const OptionalTensor& t, const Tensor& map, int64_t channels) {
  if (!t.has_value()) return;
  check_device(name, *t, map);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, name, " must have shape [", channels,
                  "], one value per channel, got ", to_string(size_of(*t)));
  const ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  name, " must be float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
}

inline Activation check_activation(const std::string& name, double negative_slope) {
  STD_TORCH_CHECK(std::isfinite(negative_slope), "negative_slope must be finite, got ", negative_slope);
  if (name == "relu") return {true, 0.0};
  if (name == "leaky_relu") return {false, negative_slope};
  if (name == "identity") return {false, 1.0};
  STD_TORCH_CHECK(false, "activation must be 'relu', 'leaky_relu' or 'identity', got '", name, "'");
}

// No bins: no moments.
inline void check_bins(const Ints& bins, const Shape& s) {
  if (bins.empty()) return;
  STD_TORCH_CHECK(bins.size() == 2, "bins must be (bins_h, bins_w), got ", to_string(bins));
  STD_TORCH_CHECK(bins[0] >= 1 && bins[0] <= s.h && bins[1] >= 1 && bins[1] <= s.w,
                  "bins must lie between (1, 1) and (", s.h, ", ", s.w, "), the size of the map, got (", bins[0], ", ",
                  bins[1], ")");
}

inline void check_normalization(const Tensor& map, const Shape& s, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
                                double eps, const Ints& bins) {
  check_channels("weight", weight, map, s.c);
  check_channels("bias", bias, map, s.c);
  check_channels("running_mean", mean, map, s.c);
  check_channels("running_var", var, map, s.c);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "running_mean and running_var must be given together");
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), "eps must be at least 0 and finite, got ", eps);
  check_bins(bins, s);
}

inline void check_gradients(const Tensor& z, const OptionalTensor& grad_y, const OptionalTensor& grad_m1,
                            const OptionalTensor& grad_m2, const Ints& bins) {
  STD_TORCH_CHECK(!bins.empty() || (!grad_m1.has_value() && !grad_m2.has_value()),
                  "grad_m1 and grad_m2 must not be given without bins");
  const Ints moments = bins.empty() ? Ints{} : Ints{z.size(0), z.size(1), bins[0], bins[1]};
  const auto check = [&](const char* name, const OptionalTensor& g, const Ints& size, ScalarType dtype) {
    if (!g.has_value()) return;
    check_device(name, *g, z);
    STD_TORCH_CHECK(size_of(*g) == size && g->scalar_type() == dtype, name, " must have shape ", to_string(size),
                    " and dtype ", dtype_name(dtype), ", got ", to_string(size_of(*g)), ", ",
                    dtype_name(g->scalar_type()));
  };
  check("grad_y", grad_y, size_of(z), z.scalar_type());
  check("grad_m1", grad_m1, moments, accumulation_type(z.scalar_type()));
  check("grad_m2", grad_m2, moments, accumulation_type(z.scalar_type()));
}

// Only where they are used: a dense gradient of y does not need them.
inline void check_sums(const Tensor& z, const OptionalTensor& grad_m1, const OptionalTensor& grad_m2,
                       const Tensor& sums, const Ints& bins) {
  if (!grad_m1.has_value() && !grad_m2.has_value()) return;
  check_device("sums", sums, z);
  STD_TORCH_CHECK(sums.numel() == 0 || sums.const_data_ptr() != nullptr,
                  "the sums of this forward pass were given back by a backward pass that failed; run it again");
  const int64_t plane = z.size(0) * z.size(1) * bins[0] * bins[1];
  STD_TORCH_CHECK((sums.numel() == 4 * plane || (sums.numel() == 2 * plane && !grad_m2.has_value())) &&
                      sums.is_contiguous() && sums.scalar_type() == accumulation_type(z.scalar_type()),
                  "sums must be the forward pass's, got shape ", to_string(size_of(sums)));
}

inline void check_backward(const Tensor& z, const OptionalTensor& grad_y, const OptionalTensor& grad_m1,
                           const OptionalTensor& grad_m2, const Tensor& dgamma, const Tensor& dbeta, const Tensor& mean,
                           const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                           const Ints& bins, bool half) {
  check_map("z", z, half);
  check_normalization(z, shape_of(z), weight, bias, mean, var, eps, bins);
  check_gradients(z, grad_y, grad_m1, grad_m2, bins);
  check_channels("dgamma", dgamma, z, z.size(1));
  check_channels("dbeta", dbeta, z, z.size(1));
}

// -- Maps as kernels read them -----------------------------------------------------------------------------------------

inline Map map_of(const Tensor& like, const Shape& shape, Layout layout) {
  const ScalarType dtype = like.scalar_type();
  return {shape, layout,
          dtype == ScalarType::Float      ? DType::kFloat32
          : dtype == ScalarType::BFloat16 ? DType::kBFloat16
          : dtype == ScalarType::Half     ? DType::kFloat16
                                          : DType::kFloat64};
}

inline Map map_of(const Tensor& z, Layout layout) { return map_of(z, shape_of(z), layout); }

// Cells to walk through a map that has no moments: a row at a time.
inline Ints cells_or_rows(const Ints& bins, const Shape& s) { return bins.empty() ? Ints{s.h, 1} : bins; }

// z as the kernels can read it: as it is wherever C or W is innermost.
inline std::pair<Tensor, Layout> readable(const Tensor& z) {
  if (const auto layout = readable_layout(z)) return {z, *layout};
  return {dense_copy(z, Layout::kContiguous), Layout::kContiguous};
}

// Gradients as the kernels read them: grad_y with the innermost dimension of z's layout, p and q laid out as m1.
inline OptionalTensor readable_gradient(const OptionalTensor& gradient, Layout layout) {
  if (!gradient.has_value() || readable_as(*gradient, layout)) return gradient;
  return dense_copy(*gradient, layout);
}
inline OptionalTensor dense_gradient(const OptionalTensor& gradient, Layout layout) {
  if (!gradient.has_value() || is_dense(*gradient, layout)) return gradient;
  return dense_copy(*gradient, layout);
}
inline const void* data_or_null(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

}  // namespace layerwise
