// The operators of the backward pass on the CPU, through the LibTorch stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu_convolution.h"
#include "schemas.h"

namespace layerwise {
namespace {

// Sums over the channels of y that belong to one channel of z.
Values fold_channels(const Values& values, int64_t step) {
  Values folded(values.size() / step);
  for (size_t i = 0; i < values.size(); ++i) folded[i / step] += values[i];
  return folded;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_moments_backward_sums(Tensor z, OptionalTensor grad_y, OptionalTensor grad_m1,
                                                                OptionalTensor grad_m2, Tensor sums, Tensor mean,
                                                                Tensor var, OptionalTensor weight, OptionalTensor bias,
                                                                LAYERWISE_FORM_PARAMETERS) {
  const Form form = LAYERWISE_FORM;
  check_map("z", z);
  check_normalization(z, shape_of(z), weight, bias, mean, var, form);
  check_gradients(z, grad_y, grad_m1, grad_m2, form);
  const bool both = check_sums(z, grad_m1, grad_m2, sums, form);
  const bool learned = slope.has_value();
  const int64_t step = channel_step(form), channels = z.size(1);
  Values dbeta(channels * step), dgamma(channels * step), dslope(channels * step);

  if (grad_m1.has_value() || grad_m2.has_value()) {
    // The sums lie as the forward pass left them.
    const Layout layout = form.downsample == "none" ? result_layout(z) : Layout::kChannelsLast;
    const OptionalTensor p1 = dense_gradient(grad_m1, layout), p2 = dense_gradient(grad_m2, layout);
    CellSumsParams p{};
    p.map = map_of(z, output_shape(shape_of(z), form), layout);
    p.bins_h = bins[0];
    p.bins_w = bins[1];
    p.p = data_or_null(p1);
    p.q = data_or_null(p2);
    p.sums = sums.const_data_ptr();
    p.slope_sums = both ? 4 : 2;
    p.dbeta = dbeta.data();
    p.dgamma = dgamma.data();
    p.dslope = learned ? dslope.data() : nullptr;
    cpu::cell_sums(p, parallel_for);
  }
  dbeta = fold_channels(dbeta, step);
  dgamma = fold_channels(dgamma, step);
  dslope = fold_channels(dslope, step);
  if (grad_y.has_value()) {
    const auto [map, layout] = readable_windows(z, form);
    const Tensor g = *readable_gradient(grad_y, layout);
    Normalization normalization(map, layout, read_values(mean), read_values(var), weight, bias, form);
    DenseSumsParams whole{};
    whole.map = map_of(map, layout);
    whole.z = map.const_data_ptr();
    whole.z_strides = strides_of(map);
    whole.grad_y = g.const_data_ptr();
    whole.grad_y_strides = strides_of(g);
    whole.channels = normalization.channels();
    whole.activation = normalization.activation;
    whole.extension = normalization.extension;
    for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
      DenseSumsParams p = whole;
      if (sub.has_value()) {
        sub->narrow(p.extension, p.map.shape, z.element_size());
        sub->narrow(p.z, p.z_strides, z.element_size());
        sub->spread(p.grad_y, p.grad_y_strides, z.element_size());
      }
      cpu::dense_sums(p, dbeta.data(), dgamma.data(), learned ? dslope.data() : nullptr, parallel_for);
    });
  }
  dslope.resize(learned ? channels : 0);
  return {channel_tensor(z, dgamma), channel_tensor(z, dbeta), channel_tensor(z, dslope)};
}

// The gradients of y, m1 and m2 and everything else that dz depends on, kept alive while kernels read it.
struct GradientInputs {
  Tensor z;
  Layout layout;
  const Form& form;
  OptionalTensor grad_y, grad_m1, grad_m2;
  Normalization normalization;
  InputGradientParams params{};

  GradientInputs(const Tensor& z_, Layout layout_, const OptionalTensor& grad_y_, const OptionalTensor& grad_m1_,
                 const OptionalTensor& grad_m2_, const Tensor& dgamma, const Tensor& dbeta, const Tensor& mean,
                 const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, const Form& form_,
                 double count)
      : z(z_),
        layout(layout_),
        form(form_),
        grad_y(readable_gradient(grad_y_, layout)),
        grad_m1(dense_gradient(grad_m1_, layout)),
        grad_m2(dense_gradient(grad_m2_, layout)),
        normalization(z, layout, read_values(mean), read_values(var), weight, bias, form) {
    const int64_t channels = z.size(1);
    Values mean_dbeta(channels), mean_dgamma(channels);
    const Values total_dbeta = read_values(dbeta), total_dgamma = read_values(dgamma);
    for (int64_t c = 0; c < channels && count > 0; ++c) {  // none with fixed statistics
      const double scale = normalization.gamma[c] * normalization.rstd[c] / count;
      mean_dbeta[c] = scale * total_dbeta[c];
      mean_dgamma[c] = scale * total_dgamma[c];
    }
    const Ints cells = cells_or_rows(form, shape_of(z));
    params.map = map_of(z, layout);
    params.bins_h = cells[0];
    params.bins_w = cells[1];
    params.z = z.const_data_ptr();
    params.z_strides = strides_of(z);
    params.grad_y = data_or_null(grad_y);
    if (grad_y.has_value()) params.grad_y_strides = strides_of(*grad_y);
    params.p = data_or_null(grad_m1);
    params.q = data_or_null(grad_m2);
    params.channels = normalization.channels();
    params.scaled_mean_dbeta = normalization.arrays.add(mean_dbeta);
    params.scaled_mean_dgamma = normalization.arrays.add(mean_dgamma);
    params.activation = normalization.activation;
    params.extension = normalization.extension;
  }
  GradientInputs(const GradientInputs&) = delete;

  // dz may be z itself; the gradient of the residual may be absent.
  void write(Tensor& dz, OptionalTensor& grad_residual) {
    InputGradientParams whole = params;
    whole.dz = dz.mutable_data_ptr();
    whole.dz_strides = strides_of(dz);
    if (grad_residual.has_value()) {
      whole.dresidual = grad_residual->mutable_data_ptr();
      whole.dresidual_strides = strides_of(*grad_residual);
    }
    for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
      InputGradientParams p = whole;
      if (sub.has_value()) narrow(p, *sub);
      cpu::input_gradient(p, parallel_for);
    });
  }

 private:
  void narrow(InputGradientParams& p, const SubMap& sub) const {
    const int64_t bytes = z.element_size(), sum_bytes = z.scalar_type() == ScalarType::Double ? 8 : 4;
    sub.narrow(p.extension, p.map.shape, bytes);
    sub.narrow(p.z, p.z_strides, bytes);
    sub.narrow(p.dz, p.dz_strides, bytes);
    if (p.dresidual != nullptr) sub.narrow(p.dresidual, p.dresidual_strides, bytes);
    if (p.grad_y != nullptr) sub.spread(p.grad_y, p.grad_y_strides, bytes);
    sub.shift(p.p, 1, sum_bytes);
    sub.shift(p.q, 1, sum_bytes);
  }
};

// Memory for the gradient of the residual.
OptionalTensor empty_residual(const Tensor& z, Layout layout, bool needed) {
  if (!needed) return {};
  return allocate_map(z, shape_of(z), layout);
}

std::tuple<Tensor, Tensor> bn_act_moments_backward(Tensor z, OptionalTensor grad_y, OptionalTensor grad_m1,
                                                   OptionalTensor grad_m2, Tensor dgamma, Tensor dbeta, Tensor mean,
                                                   Tensor var, OptionalTensor weight, OptionalTensor bias,
                                                   LAYERWISE_FORM_PARAMETERS, double count, bool needs_residual) {
  const Form form = LAYERWISE_FORM;
  check_backward(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form);
  const auto [map, layout] = readable_windows(z, form);
  Tensor dz = allocate_map(z, shape_of(z), layout);
  OptionalTensor grad_residual = empty_residual(z, layout, needs_residual && residual.has_value());
  GradientInputs(map, layout, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form, count)
      .write(dz, grad_residual);
  const Layout target = result_layout(z);
  const auto result = [&](const Tensor& t) { return layout == target ? t : dense_copy(t, target); };
  const Tensor none = empty_vector(z, 0, z.scalar_type());
  return {result(dz), grad_residual.has_value() ? result(*grad_residual) : none};
}

// Uninitialised, float32, with the strides of the weight where it is dense under them.  Gradients stay until the optimizer
// has run, while activations come and go: these leave room for them.
Tensor empty_weight_gradient(const Tensor& weight) {
  if (is_dense(weight, Layout::kChannelsLast) || is_dense(weight, Layout::kContiguous))
    return allocate(weight, shape_of(weight), strides_of(weight), ScalarType::Float);
  const Tensor like = torch::stable::empty_like(weight);
  return like.scalar_type() == ScalarType::Float ? like : torch::stable::to(like, ScalarType::Float);
}

// The weight gradient where this package has it; of a gradient that is formed on the way or, if `is_formed`, of dz itself.
Tensor own_weight_gradient(const InputGradientParams& gradient, bool is_formed, const Tensor& input,
                           const Tensor& conv_weight, const Window& window) {
  WeightGradientParams p{};
  p.gradient = gradient;
  p.is_formed = is_formed;
  p.x = input.const_data_ptr();
  p.x_shape = shape_of(input);
  p.x_strides = strides_of(input);
  p.window = window;
  Tensor dw = empty_weight_gradient(conv_weight);
  cpu::weight_gradient(p, static_cast<float*>(dw.mutable_data_ptr()), strides_of(dw), parallel_for);
  return dw.scalar_type() == conv_weight.scalar_type() ? dw : torch::stable::to(dw, conv_weight.scalar_type());
}

// The gradient of the input, where that is a convolution that this package has: of dz with the weight turned around, from
// output to input channels.
std::optional<Tensor> own_input_gradient(const Tensor& dz, const Tensor& input, const Tensor& conv_weight,
                                         const Window& window) {
  Window turned = window;
  turned.padding_h = window.kernel_h - 1 - window.padding_h;
  turned.padding_w = window.kernel_w - 1 - window.padding_w;
  // Where ATen would write channels_last, too.
  const bool channels_last = is_nested_channels_last(input) || is_nested_channels_last(conv_weight);
  if (!channels_last || window.stride_h != 1 || window.stride_w != 1 || turned.padding_h < 0 || turned.padding_w < 0 ||
      !is_nested_channels_last(dz) ||
      !cpu::has_convolution(map_of(dz, shape_of(input), Layout::kChannelsLast), shape_of(dz), strides_of(dz), turned))
    return std::nullopt;
  const Tensor w = weight_as(conv_weight, dz.scalar_type());
  const Strides s = strides_of(w);
  const int64_t last = (window.kernel_h - 1) * s.h + (window.kernel_w - 1) * s.w;
  Tensor gradient = allocate_map(dz, shape_of(input), Layout::kChannelsLast);
  own_convolution(dz, static_cast<const char*>(w.const_data_ptr()) + last * w.element_size(), {s.c, s.n, -s.h, -s.w},
                  turned, gradient, nullptr);
  return gradient;
}

// Gradients of input, conv_weight and residual; an empty tensor stands for one that is not needed.
std::tuple<Tensor, Tensor, Tensor> conv_backward(bool overwrite, Tensor z, OptionalTensor grad_y,
                                                 OptionalTensor grad_m1, OptionalTensor grad_m2, Tensor dgamma,
                                                 Tensor dbeta, Tensor mean, Tensor var, OptionalTensor weight,
                                                 OptionalTensor bias, LAYERWISE_FORM_PARAMETERS, double count,
                                                 Tensor input, Tensor conv_weight, Ints stride, Ints padding,
                                                 Ints dilation, int64_t groups, bool needs_input, bool needs_weight,
                                                 bool needs_residual, bool overwrite_grad_y) {
  const Form form = LAYERWISE_FORM;
  check_backward(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form);
  check_convolution_backward(z, input, conv_weight, stride, padding, dilation, groups);
  if (overwrite_grad_y) check_overwritten_gradient(z, grad_y, form, overwrite, needs_residual);
  const Shape whole = shape_of(input);
  const Ints apart = stride;
  const bool skips = skips_pixels(input, conv_weight, stride, padding);
  if (skips) {
    input = take_pixels(input, shape_of(z), stride);
    stride = {1, 1};
  }
  const auto [map, layout] = readable_windows(z, form);
  GradientInputs gradient(map, layout, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form, count);
  const Window kernel = window_of(conv_weight, stride, padding, dilation);
  const bool plain = groups == 1 && input.scalar_type() == z.scalar_type();
  const auto none = [&] { return empty_vector(z, 0, z.scalar_type()); };
  needs_residual = needs_residual && residual.has_value();
  Tensor grad_weight = none();
  const bool own_weight = needs_weight && plain &&
                          cpu::has_weight_gradient(gradient.params.map, shape_of(input), strides_of(input), kernel);
  if (own_weight && !needs_input && !needs_residual && !is_interleaved(form))  // that of interleaved channels has parts
    return {none(), own_weight_gradient(gradient.params, false, input, conv_weight, kernel), none()};
  if (!needs_input && !needs_weight && !needs_residual) return {none(), grad_weight, none()};
  Tensor dz = overwrite ? map : allocate_map(z, shape_of(z), layout);
  OptionalTensor grad_residual = overwrite_grad_y ? grad_y : empty_residual(z, layout, needs_residual);
  gradient.write(dz, grad_residual);
  const bool product =
      plain && is_dense(dz, Layout::kChannelsLast) && is_product(input, conv_weight, stride, padding, groups);
  if (own_weight && !product) {
    InputGradientParams formed{};
    formed.map = gradient.params.map;
    formed.z = dz.const_data_ptr();
    formed.z_strides = strides_of(dz);
    grad_weight = own_weight_gradient(formed, true, input, conv_weight, kernel);
    needs_weight = false;
  }
  std::optional<Tensor> grad_input;
  if (needs_input && plain) grad_input = own_input_gradient(dz, input, conv_weight, kernel);
  if (needs_weight || (needs_input && !grad_input.has_value())) {
    const bool of_input = needs_input && !grad_input.has_value();
    const auto [other_input, other_weight] =
        product ? product_gradients(dz, input, conv_weight, of_input, needs_weight)
                : library_gradients(dz, input, conv_weight, stride, padding, dilation, groups, of_input, needs_weight);
    if (!grad_input.has_value()) grad_input = other_input;
    if (needs_weight) grad_weight = other_weight;
  }
  if (skips && needs_input) grad_input = spread_pixels(*grad_input, whole, apart);
  if (overwrite_grad_y) grad_residual.reset();
  if (grad_residual.has_value() && layout != result_layout(z))
    grad_residual = dense_copy(*grad_residual, result_layout(z));
  return {grad_input.value_or(none()), grad_weight, grad_residual.value_or(none())};
}

using ConvBackward = BackwardForm<&conv_backward, false>;
using ConvBackwardInPlace = BackwardForm<&conv_backward, true>;  // z's memory becomes dz's

}  // namespace
}  // namespace layerwise

STABLE_TORCH_LIBRARY_IMPL(layerwise_ext, CPU, m) {
  using namespace layerwise;
  m.impl("bn_act_moments_backward_sums", TORCH_BOX(&bn_act_moments_backward_sums));
  m.impl("bn_act_moments_backward", TORCH_BOX(&bn_act_moments_backward));
  m.impl("conv_bn_act_moments_backward", TORCH_BOX(&ConvBackward::call));
  m.impl("conv_bn_act_moments_backward_", TORCH_BOX(&ConvBackwardInPlace::call));
}
