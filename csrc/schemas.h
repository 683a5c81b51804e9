// The operators' schemas.
//
// Shapes: z, y [N, C, H, W]; m1, m2 [N, C, bins_h, bins_w]; per-channel tensors [C]; sums [4 * N * C * bins_h * bins_w],
// that is A0, A1, B0, B1, each laid out as m1; half of that and an empty m2 without second_moment.  Sums and statistics
// are float32, or float64 for float64 maps.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

namespace layerwise {

template <class Library>
void define_operators(Library& m) {
  m.def("batch_norm_statistics(Tensor z) -> (Tensor mean, Tensor var)");
  m.def(
      "bn_act_moments(Tensor z, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, str activation, "
      "float negative_slope, int[] bins, bool second_moment) -> (Tensor y, Tensor m1, Tensor m2, Tensor sums, "
      "Tensor mean_z, Tensor var_z)");
  m.def(
      "conv_bn_act_moments(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? weight, Tensor? bias, "
      "Tensor? mean, Tensor? var, int[] stride, int[] padding, int[] dilation, int groups, float eps, str activation, "
      "float negative_slope, int[] bins, bool second_moment) -> (Tensor y, Tensor m1, Tensor m2, Tensor sums, "
      "Tensor mean_z, Tensor var_z, Tensor z)");
  // The activation alone, with fixed statistics and without a gradient.
  m.def(
      "conv_bn_act_inference(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor var, int[] stride, int[] padding, int[] dilation, int groups, float eps, str activation, "
      "float negative_slope) -> Tensor");
  m.def(
      "bn_act_moments_backward_sums(Tensor z, Tensor? grad_y, Tensor? grad_m1, Tensor? grad_m2, Tensor sums, Tensor mean, "
      "Tensor var, Tensor? weight, Tensor? bias, float eps, str activation, float negative_slope, int[] bins) -> "
      "(Tensor dgamma, Tensor dbeta)");
  m.def(
      "bn_act_moments_backward(Tensor z, Tensor? grad_y, Tensor? grad_m1, Tensor? grad_m2, Tensor dgamma, Tensor dbeta, "
      "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str activation, float negative_slope, "
      "int[] bins, float count) -> Tensor");
  // The second form may leave dz in z.
  for (const char* form : {"conv_bn_act_moments_backward(Tensor z", "conv_bn_act_moments_backward_(Tensor(a!) z"}) {
    const std::string schema = std::string(form) +
                               ", Tensor? grad_y, Tensor? grad_m1, Tensor? grad_m2, Tensor dgamma, Tensor dbeta, "
                               "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str activation, "
                               "float negative_slope, int[] bins, float count, Tensor input, Tensor conv_weight, "
                               "int[] stride, int[] padding, int[] dilation, int groups, bool needs_input, "
                               "bool needs_weight) -> (Tensor grad_input, Tensor grad_conv_weight)";
    m.def(schema.c_str());
  }
  m.def(
      "update_running_statistics_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
      "Tensor? shift, int count, float momentum) -> ()");
  // m1 sums a map of size (H, W) over its cells.  An empty tensor stands for a gradient that is not needed.
  m.def(
      "pooled_linear_cross_entropy(Tensor m1, Tensor weight, Tensor? bias, Tensor target, int[] size, "
      "float label_smoothing) -> (Tensor loss, Tensor logits, Tensor grad_logits)");
  m.def(
      "pooled_linear_cross_entropy_backward(Tensor grad_logits, Tensor? scale, Tensor m1, Tensor weight, int[] size, "
      "bool needs_m1, bool needs_weight, bool needs_bias) -> (Tensor grad_m1, Tensor grad_weight, Tensor grad_bias)");
}

// One of two forms of a function whose first argument says whether it may leave dz in z.
template <auto kFunction, bool kOverwrite, class Type = decltype(kFunction)>
struct BackwardForm;
template <auto kFunction, bool kOverwrite, class R, class... Args>
struct BackwardForm<kFunction, kOverwrite, R (*)(bool, Args...)> {
  static R call(Args... args) { return kFunction(kOverwrite, std::move(args)...); }
};

}  // namespace layerwise
