// The operators' schemas.
//
// Shapes: z and residual [N, C, H, W]; y the same or what downsampling leaves of it; m1, m2 [N, channels of y, bins_h,
// bins_w]; per-channel tensors [C]; sums [4 * numel of m1], that is A0, A1, B0, B1, each laid out as m1, for 'prelu' also
// C0 and C1; half of that and an empty m2 without second_moment, an empty y without needs_y.  Sums and statistics are
// float32, or float64 for float64 maps.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

namespace layerwise {

// What follows the convolution: Form in checks.h.
#define LAYERWISE_FORM_SCHEMA                                                                                           \
  "float eps, str activation, float negative_slope, float upper_slope, Tensor? slope, Tensor? seed, Tensor? residual, " \
  "str downsample, int[] window, bool ceil_mode, int[] bins"

template <class Library>
void define_operators(Library& m) {
  m.def("batch_norm_statistics(Tensor z) -> (Tensor mean, Tensor var)");
  // The first half of conv_bn_act_moments, for statistics that replicas combine before the second.
  m.def(
      "convolution_statistics(Tensor input, Tensor conv_weight, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> (Tensor z, Tensor mean, Tensor var)");
  m.def("bn_act_moments(Tensor z, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, " LAYERWISE_FORM_SCHEMA
        ", bool second_moment, bool needs_y) -> "
        "(Tensor y, Tensor m1, Tensor m2, Tensor sums, Tensor mean_z, Tensor var_z)");
  m.def(
      "conv_bn_act_moments(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? weight, Tensor? bias, "
      "Tensor? mean, Tensor? var, int[] stride, int[] padding, int[] dilation, int groups, " LAYERWISE_FORM_SCHEMA
      ", bool second_moment, bool needs_y) -> "
      "(Tensor y, Tensor m1, Tensor m2, Tensor sums, Tensor mean_z, Tensor var_z, Tensor z)");
  // The activation alone, with fixed statistics and without a gradient.
  m.def(
      "conv_bn_act_inference(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor var, int[] stride, int[] padding, int[] dilation, int groups, " LAYERWISE_FORM_SCHEMA
      ") -> Tensor");
  // dslope is empty but for 'prelu'.
  m.def(
      "bn_act_moments_backward_sums(Tensor z, Tensor? grad_y, Tensor? grad_m1, Tensor? grad_m2, Tensor sums, "
      "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, " LAYERWISE_FORM_SCHEMA
      ") -> (Tensor dgamma, Tensor dbeta, Tensor dslope)");
  // An empty tensor stands for a gradient that is not needed, here and below.
  m.def(
      "bn_act_moments_backward(Tensor z, Tensor? grad_y, Tensor? grad_m1, Tensor? grad_m2, Tensor dgamma, Tensor dbeta, "
      "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, " LAYERWISE_FORM_SCHEMA
      ", float count, bool needs_residual) -> (Tensor dz, Tensor grad_residual)");
  // The second form may leave dz in z; with overwrite_grad_y it leaves the residual's gradient in grad_y, which has the
  // strides of z, and returns an empty one.
  for (const char* form : {"conv_bn_act_moments_backward(Tensor z, Tensor? grad_y",
                           "conv_bn_act_moments_backward_(Tensor(a!) z, Tensor(b!)? grad_y"}) {
    const std::string schema =
        std::string(form) +
        ", Tensor? grad_m1, Tensor? grad_m2, Tensor dgamma, Tensor dbeta, Tensor mean, Tensor var, "
        "Tensor? weight, Tensor? bias, " LAYERWISE_FORM_SCHEMA
        ", float count, Tensor input, Tensor conv_weight, int[] stride, int[] padding, int[] dilation, int groups, "
        "bool needs_input, bool needs_weight, bool needs_residual, bool overwrite_grad_y) -> "
        "(Tensor grad_input, Tensor grad_conv_weight, Tensor grad_residual)";
    m.def(schema.c_str());
  }
  m.def(
      "update_running_statistics_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
      "Tensor? shift, int count, float momentum) -> ()");
  // m1 sums a map of size (H, W) over its cells.
  m.def(
      "pooled_linear_cross_entropy(Tensor m1, Tensor weight, Tensor? bias, Tensor target, int[] size, "
      "float label_smoothing) -> (Tensor loss, Tensor logits, Tensor grad_logits)");
  m.def(
      "pooled_linear_cross_entropy_backward(Tensor grad_logits, Tensor? scale, Tensor m1, Tensor weight, int[] size, "
      "bool needs_m1, bool needs_weight, bool needs_bias) -> (Tensor grad_m1, Tensor grad_weight, Tensor grad_bias)");
}

// One of two variants of a function whose first argument says whether it may leave dz in z.
template <auto kFunction, bool kOverwrite, class Type = decltype(kFunction)>
struct BackwardForm;
template <auto kFunction, bool kOverwrite, class R, class... Args>
struct BackwardForm<kFunction, kOverwrite, R (*)(bool, Args...)> {
  static R call(Args... args) { return kFunction(kOverwrite, std::move(args)...); }
};

}  // namespace layerwise
