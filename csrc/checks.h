// Checks of the operators' arguments, and what all backends make of them.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "maps.h"

namespace layerwise {

// -- Checks: each names the argument, what it was and what is allowed --------------------------------------------------

inline void check_dtype(const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  name, " must be float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
}

inline void check_map(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions [N, C, H, W], got shape ", to_string(size_of(t)));
  check_dtype(name, t);
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
  check_dtype(name, *t);
}

// What follows the convolution, as the operators take it; kForm in schemas.h.
struct Form {
  double eps;
  std::string activation;
  double negative_slope, upper_slope;
  OptionalTensor slope;     // [C], of 'prelu'
  OptionalTensor seed;      // one int64, of 'rrelu'
  OptionalTensor residual;  // as z, added before the activation
  std::string downsample;   // 'none', 'max', 'avg' or 'space_to_depth'
  Ints window;
  bool ceil_mode;
  Ints bins;  // empty: no moments
};
// Not std::string: torch's conversion to it (2.11 to 2.13 at least) copies from a string that it never deletes.  These 32
// bytes of each call also keep the blocks beside them from being used again, as glibc before 2.38 cannot put an aligned
// block into a hole of exactly its size: memory grew by a map at each training step.
#define LAYERWISE_FORM_PARAMETERS                                                                       \
  double eps, StringHandle activation, double negative_slope, double upper_slope, OptionalTensor slope, \
      OptionalTensor seed, OptionalTensor residual, StringHandle downsample, Ints window, bool ceil_mode, Ints bins
#define LAYERWISE_FORM                                                                                                \
  Form {                                                                                                              \
    eps, taken(activation), negative_slope, upper_slope, slope, seed, residual, taken(downsample), window, ceil_mode, \
        bins                                                                                                          \
  }

// The string of an argument, which is deleted.
inline std::string taken(StringHandle argument) {
  const char* data = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(argument, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(argument, &length));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(argument));
  return text;
}

inline Activation activation_of(const Form& form) {
  static constexpr std::pair<const char*, ActivationKind> kKinds[] = {
      {"relu", ActivationKind::kReLU},          {"leaky_relu", ActivationKind::kLeakyReLU},
      {"identity", ActivationKind::kLeakyReLU}, {"prelu", ActivationKind::kPReLU},
      {"rrelu", ActivationKind::kRReLU},        {"relu6", ActivationKind::kReLU6},
      {"tanh", ActivationKind::kTanh},          {"sigmoid", ActivationKind::kSigmoid},
      {"silu", ActivationKind::kSiLU},          {"gelu", ActivationKind::kGELU},
      {"gelu_tanh", ActivationKind::kGELUTanh}, {"hardswish", ActivationKind::kHardswish}};
  const double slope = form.activation == "identity" ? 1 : form.negative_slope;
  std::string allowed;
  for (const auto& [name, kind] : kKinds) {
    if (form.activation == name) return {kind, slope, form.upper_slope};
    allowed += (allowed.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  STD_TORCH_CHECK(false, "activation must be one of ", allowed, ", got '", form.activation, "'");
}

inline bool is_pooled(const Form& form) { return form.downsample == "max" || form.downsample == "avg"; }
inline bool is_interleaved(const Form& form) { return form.downsample == "space_to_depth"; }
// Channels of y for each of z.
inline int64_t channel_step(const Form& form) { return is_interleaved(form) ? form.window[0] * form.window[1] : 1; }
// Kinds of sums that the forward pass gathers, see ApplyParams.
inline void check_outputs(const Form& form, bool needs_y) {
  STD_TORCH_CHECK(needs_y || !form.bins.empty(), "needs_y=False needs bins: without both there is nothing to compute");
}

inline int64_t sum_kinds(const Form& form, bool second_moment) {
  return (second_moment ? 2 : 1) * (form.activation == "prelu" ? 3 : 2);
}

// [N, C, H, W] of y.
inline Shape output_shape(const Shape& z, const Form& form) {
  if (!is_pooled(form) && !is_interleaved(form)) return z;
  const int64_t h = form.window[0], w = form.window[1], extra = form.ceil_mode ? 1 : 0;
  return {z.n, z.c * channel_step(form), (z.h + extra * (h - 1)) / h, (z.w + extra * (w - 1)) / w};
}

inline void check_form(const Tensor& map, const Shape& s, const Form& form) {
  STD_TORCH_CHECK(form.eps >= 0 && std::isfinite(form.eps), "eps must be at least 0 and finite, got ", form.eps);
  STD_TORCH_CHECK(std::isfinite(form.negative_slope), "negative_slope must be finite, got ", form.negative_slope);
  STD_TORCH_CHECK(std::isfinite(form.upper_slope), "upper_slope must be finite, got ", form.upper_slope);
  activation_of(form);
  check_channels("slope", form.slope, map, s.c);
  STD_TORCH_CHECK(form.slope.has_value() == (form.activation == "prelu"),
                  "slope must be given with activation 'prelu' and with no other one, got it ",
                  form.slope.has_value() ? "with '" : "not with '", form.activation, "'");
  STD_TORCH_CHECK(form.seed.has_value() == (form.activation == "rrelu"),
                  "seed must be given with activation 'rrelu' and with no other one, got it ",
                  form.seed.has_value() ? "with '" : "not with '", form.activation, "'");
  if (form.seed.has_value()) {
    check_device("seed", *form.seed, map);
    STD_TORCH_CHECK(form.seed->numel() == 1 && form.seed->scalar_type() == ScalarType::Long,
                    "seed must be one int64, got shape ", to_string(size_of(*form.seed)), ", ",
                    dtype_name(form.seed->scalar_type()));
  }
  if (form.residual.has_value()) {
    const Ints size{s.n, s.c, s.h, s.w};
    check_device("residual", *form.residual, map);
    STD_TORCH_CHECK(size_of(*form.residual) == size && form.residual->scalar_type() == map.scalar_type(),
                    "residual must have shape ", to_string(size), " and dtype ", dtype_name(map.scalar_type()),
                    ", as what it is added to, got ", to_string(size_of(*form.residual)), ", ",
                    dtype_name(form.residual->scalar_type()));
  }
  const Ints& window = form.window;
  STD_TORCH_CHECK(form.downsample == "none" || is_pooled(form) || is_interleaved(form),
                  "downsample must be 'none', 'max', 'avg' or 'space_to_depth', got '", form.downsample, "'");
  if (form.downsample != "none") {
    STD_TORCH_CHECK(window.size() == 2 && window[0] >= 1 && window[1] >= 1, "window must be two positive values, got ",
                    to_string(window));
    STD_TORCH_CHECK(!is_interleaved(form) || (s.h % window[0] == 0 && s.w % window[1] == 0),
                    "space_to_depth needs a map whose size is a multiple of the window ", to_string(window), ", got ",
                    to_string({s.h, s.w}));
  }
  const Shape y = output_shape(s, form);
  STD_TORCH_CHECK(y.h > 0 && y.w > 0, "the downsampling window ", to_string(window), " is larger than the map ",
                  to_string({s.h, s.w}));
  if (form.bins.empty()) return;
  STD_TORCH_CHECK(form.bins.size() == 2, "bins must be (bins_h, bins_w), got ", to_string(form.bins));
  STD_TORCH_CHECK(form.bins[0] >= 1 && form.bins[0] <= y.h && form.bins[1] >= 1 && form.bins[1] <= y.w,
                  "bins must lie between (1, 1) and (", y.h, ", ", y.w, "), the size of the map, got (", form.bins[0],
                  ", ", form.bins[1], ")");
}

inline void check_normalization(const Tensor& map, const Shape& s, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
                                const Form& form) {
  check_channels("weight", weight, map, s.c);
  check_channels("bias", bias, map, s.c);
  check_channels("running_mean", mean, map, s.c);
  check_channels("running_var", var, map, s.c);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "running_mean and running_var must be given together");
  check_form(map, s, form);
}

inline void check_gradients(const Tensor& z, const OptionalTensor& grad_y, const OptionalTensor& grad_m1,
                            const OptionalTensor& grad_m2, const Form& form) {
  const Ints& bins = form.bins;
  STD_TORCH_CHECK(!bins.empty() || (!grad_m1.has_value() && !grad_m2.has_value()),
                  "grad_m1 and grad_m2 must not be given without bins");
  const Shape y = output_shape(shape_of(z), form);
  const Ints moments = bins.empty() ? Ints{} : Ints{y.n, y.c, bins[0], bins[1]};
  const auto check = [&](const char* name, const OptionalTensor& g, const Ints& size, ScalarType dtype) {
    if (!g.has_value()) return;
    check_device(name, *g, z);
    STD_TORCH_CHECK(size_of(*g) == size && g->scalar_type() == dtype, name, " must have shape ", to_string(size),
                    " and dtype ", dtype_name(dtype), ", got ", to_string(size_of(*g)), ", ",
                    dtype_name(g->scalar_type()));
  };
  check("grad_y", grad_y, {y.n, y.c, y.h, y.w}, z.scalar_type());
  check("grad_m1", grad_m1, moments, accumulation_type(z.scalar_type()));
  check("grad_m2", grad_m2, moments, accumulation_type(z.scalar_type()));
}

// Only where they are used: a dense gradient of y does not need them.  Returns whether they are for both moments.
inline bool check_sums(const Tensor& z, const OptionalTensor& grad_m1, const OptionalTensor& grad_m2,
                       const Tensor& sums, const Form& form) {
  if (!grad_m1.has_value() && !grad_m2.has_value()) return false;
  check_device("sums", sums, z);
  STD_TORCH_CHECK(sums.numel() == 0 || sums.const_data_ptr() != nullptr,
                  "the sums of this forward pass were given back by a backward pass that failed; run it again");
  const Shape y = output_shape(shape_of(z), form);
  const int64_t plane = y.n * y.c * form.bins[0] * form.bins[1];
  const bool both = sums.numel() == sum_kinds(form, true) * plane;
  STD_TORCH_CHECK((both || (sums.numel() == sum_kinds(form, false) * plane && !grad_m2.has_value())) &&
                      sums.is_contiguous() && sums.scalar_type() == accumulation_type(z.scalar_type()),
                  "sums must be the forward pass's, got shape ", to_string(size_of(sums)));
  return both;
}

inline void check_backward(const Tensor& z, const OptionalTensor& grad_y, const OptionalTensor& grad_m1,
                           const OptionalTensor& grad_m2, const Tensor& dgamma, const Tensor& dbeta, const Tensor& mean,
                           const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                           const Form& form) {
  check_map("z", z);
  check_normalization(z, shape_of(z), weight, bias, mean, var, form);
  check_gradients(z, grad_y, grad_m1, grad_m2, form);
  check_channels("dgamma", dgamma, z, z.size(1));
  check_channels("dbeta", dbeta, z, z.size(1));
}

// For the gradient of a residual that is to take the place of grad_y.
inline void check_overwritten_gradient(const Tensor& z, const OptionalTensor& grad_y, const Form& form, bool in_place,
                                       bool needs_residual) {
  STD_TORCH_CHECK(in_place && needs_residual && form.residual.has_value() && form.downsample == "none" &&
                      grad_y.has_value() && strides_of(*grad_y) == strides_of(z),
                  "overwrite_grad_y needs the operator that works in place, a residual whose gradient is wanted, no "
                  "downsampling, and a grad_y with the strides of z");
}

// -- The extended form as kernels take it ------------------------------------------------------------------------------

// Without the residual and the slopes, which each backend makes readable in its own way.
inline Extension extension_of(const Form& form, const Shape& z) {
  const Shape y = output_shape(z, form);
  Extension e{};
  if (form.seed.has_value()) e.seed = static_cast<const int64_t*>(form.seed->const_data_ptr());
  e.noise = dense_strides(z, Layout::kContiguous);
  e.pooling = form.downsample == "max" ? Pooling::kMax : form.downsample == "avg" ? Pooling::kAverage : Pooling::kNone;
  e.window_h = is_pooled(form) ? form.window[0] : 1;
  e.window_w = is_pooled(form) ? form.window[1] : 1;
  e.pooled_h = y.h;
  e.pooled_w = y.w;
  e.channel_step = channel_step(form);
  return e;
}

// For space_to_depth the kernels take one element of each window at a time: a map with larger strides, of which y has
// every window'th channel.
struct SubMap {
  int64_t h, w, window_h, window_w, index;

  void narrow(const void*& data, Strides& strides, int64_t bytes) const {
    data = narrowed<const char>(data, strides, bytes);
  }
  void narrow(void*& data, Strides& strides, int64_t bytes) const { data = narrowed<char>(data, strides, bytes); }
  void narrow(Extension& e, Shape& shape, int64_t bytes) const {
    shape.h = e.pooled_h;
    shape.w = e.pooled_w;
    if (e.residual != nullptr) narrow(e.residual, e.residual_strides, bytes);
    e.first_noise += h * e.noise.h + w * e.noise.w;
    e.noise.h *= window_h;
    e.noise.w *= window_w;
  }
  // The first of its channels, which are `stride` apart each.
  void shift(const void*& data, int64_t stride, int64_t bytes) const {
    if (data != nullptr) data = static_cast<const char*>(data) + index * stride * bytes;
  }
  void shift(void*& data, int64_t stride, int64_t bytes) const {
    if (data != nullptr) data = static_cast<char*>(data) + index * stride * bytes;
  }
  // Its channels of y.
  template <class Pointer>
  void spread(Pointer& data, Strides& strides, int64_t bytes) const {
    shift(data, strides.c, bytes);
    strides.c *= window_h * window_w;
  }

 private:
  template <class Byte, class Pointer>
  Byte* narrowed(Pointer data, Strides& strides, int64_t bytes) const {
    Byte* const first = static_cast<Byte*>(data) + (h * strides.h + w * strides.w) * bytes;
    strides.h *= window_h;
    strides.w *= window_w;
    return first;
  }
};

// body(sub_map) for each of them; once, with the whole map, in all other forms.
template <class Body>
void for_each_sub_map(const Form& form, const Body& body) {
  if (!is_interleaved(form)) return body(std::optional<SubMap>());
  const int64_t h = form.window[0], w = form.window[1];
  for (int64_t i = 0; i < h * w; ++i) body(std::optional<SubMap>({i / w, i % w, h, w, i}));
}

// -- Maps as kernels read them -----------------------------------------------------------------------------------------

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat64;
  }
}

inline Map map_of(const Tensor& like, const Shape& shape, Layout layout) { return {shape, layout, dtype_of(like)}; }

inline Map map_of(const Tensor& z, Layout layout) { return map_of(z, shape_of(z), layout); }

// Cells to walk through a map that has no moments: a row of y at a time.
inline Ints cells_or_rows(const Form& form, const Shape& z) {
  return form.bins.empty() ? Ints{output_shape(z, form).h, 1} : form.bins;
}

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
