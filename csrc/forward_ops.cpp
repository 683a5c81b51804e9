// The operators of the forward pass on the CPU, through the LibTorch stable ABI, and every schema.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu_convolution.h"
#include "schemas.h"

namespace layerwise {
namespace {

using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, m1, m2, sums; the last three empty without bins

// z is read in `layout`; the results have that of `target`, but for a given y, whose memory may be that of z.
Moments apply(const Tensor& z, Layout layout, Layout target, Normalization& normalization, const Form& form,
              bool second_moment, bool needs_y, const OptionalTensor& given_y = {}) {
  const Shape s = shape_of(z), out = output_shape(s, form);
  const ScalarType accumulation = accumulation_type(z.scalar_type());
  const Ints cells = cells_or_rows(form, s);
  const Shape none{0, out.c, 1, 1};
  const Shape moments = form.bins.empty() ? none : Shape{out.n, out.c, form.bins[0], form.bins[1]};
  Tensor y = given_y.has_value() ? *given_y : allocate_map(z, needs_y ? out : none, layout);
  Tensor m1 = empty_map(z, moments, layout, accumulation);
  Tensor m2 = empty_map(z, second_moment ? moments : none, layout, accumulation);
  Tensor sums = empty_vector(z, sum_kinds(form, second_moment) * m1.numel(), accumulation);

  ApplyParams whole{};
  whole.map = map_of(z, layout);
  whole.bins_h = cells[0];
  whole.bins_w = cells[1];
  whole.z = z.const_data_ptr();
  whole.z_strides = strides_of(z);
  whole.y = needs_y ? y.mutable_data_ptr() : nullptr;
  whole.y_strides = strides_of(y);
  whole.channels = normalization.channels();
  whole.activation = normalization.activation;
  whole.extension = normalization.extension;
  if (!form.bins.empty()) {
    whole.m1 = m1.mutable_data_ptr();
    whole.m2 = second_moment ? m2.mutable_data_ptr() : nullptr;
    whole.sums = sums.mutable_data_ptr();
  }
  for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
    ApplyParams p = whole;
    if (sub.has_value()) {
      const int64_t bytes = z.element_size(), sum_bytes = m1.element_size();
      sub->narrow(p.extension, p.map.shape, bytes);
      sub->narrow(p.z, p.z_strides, bytes);
      sub->spread(p.y, p.y_strides, bytes);
      sub->shift(p.m1, 1, sum_bytes);
      sub->shift(p.m2, 1, sum_bytes);
      sub->shift(p.sums, 1, sum_bytes);
    }
    cpu::apply(p, parallel_for);
  });
  if (layout != target) {
    y = dense_copy(y, target);
    m1 = dense_copy(m1, target);
    m2 = dense_copy(m2, target);
  }
  return {y, m1, m2, sums};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor z) {
  check_map("z", z);
  const auto [map, layout] = readable(z);
  const Statistics s = batch_statistics(map, layout);
  return {channel_tensor(z, s.mean), channel_tensor(z, s.var)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_moments(Tensor z, OptionalTensor weight,
                                                                          OptionalTensor bias, OptionalTensor mean,
                                                                          OptionalTensor var, LAYERWISE_FORM_PARAMETERS,
                                                                          bool second_moment, bool needs_y) {
  const Form form = LAYERWISE_FORM;
  check_outputs(form, needs_y);
  check_map("z", z);
  check_normalization(z, shape_of(z), weight, bias, mean, var, form);

  const auto [map, layout] = readable_windows(z, form);
  const Statistics s =
      mean.has_value() ? Statistics{read_values(*mean), read_values(*var)} : batch_statistics(map, layout);
  Normalization normalization(map, layout, s.mean, s.var, weight, bias, form);
  auto [y, m1, m2, sums] = apply(map, layout, result_layout(z), normalization, form, second_moment, needs_y);
  return {y, m1, m2, sums, channel_tensor(z, s.mean), channel_tensor(z, s.var)};
}

std::tuple<Tensor, Tensor, Tensor> convolution_statistics(Tensor input, Tensor conv_weight, Ints stride, Ints padding,
                                                          Ints dilation, int64_t groups) {
  check_map("input", input);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  const auto [z, statistics] = convolve(input, conv_weight, s, stride, padding, dilation, groups, true);
  return {z, channel_tensor(z, statistics.mean), channel_tensor(z, statistics.var)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_moments(
    Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor mean, OptionalTensor var, Ints stride, Ints padding, Ints dilation, int64_t groups,
    LAYERWISE_FORM_PARAMETERS, bool second_moment, bool needs_y) {
  const Form form = LAYERWISE_FORM;
  check_outputs(form, needs_y);
  check_map("input", input);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  check_channels("conv_bias", conv_bias, input, s.c);
  check_normalization(input, s, weight, bias, mean, var, form);

  auto [map, statistics] = convolve(input, conv_weight, s, stride, padding, dilation, groups, !mean.has_value());
  if (mean.has_value()) statistics = {read_values(*mean), read_values(*var)};

  // The convolution's bias shifts z and its mean alike, so it is never added: only a given mean must lose it.
  if (mean.has_value() && conv_bias.has_value()) {
    const Values shift = read_values(*conv_bias);
    for (size_t c = 0; c < shift.size(); ++c) statistics.mean[c] -= shift[c];
  }
  const Layout layout = result_layout(map);
  const auto [cut, cut_layout] = readable_windows(map, form);
  Normalization normalization(cut, cut_layout, statistics.mean, statistics.var, weight, bias, form);
  auto [y, m1, m2, sums] = apply(cut, cut_layout, layout, normalization, form, second_moment, needs_y);
  return {y, m1, m2, sums, channel_tensor(map, statistics.mean), channel_tensor(map, statistics.var), map};
}

// Nobody else has z: y takes its place while it is in a cache.  Of a large map that is a piece of the batch at a time.
Tensor conv_bn_act_inference(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor weight,
                             OptionalTensor bias, Tensor mean, Tensor var, Ints stride, Ints padding, Ints dilation,
                             int64_t groups, LAYERWISE_FORM_PARAMETERS) {
  const Form form = LAYERWISE_FORM;
  check_map("input", input);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  check_channels("conv_bias", conv_bias, input, s.c);
  check_normalization(input, s, weight, bias, mean, var, form);
  Values shifted = read_values(mean);
  const Values shift = read_values(conv_bias, s.c, 0.0), variance = read_values(var);
  for (int64_t c = 0; c < s.c; ++c) shifted[c] -= shift[c];
  const bool in_place = form.downsample == "none";
  const int64_t pieces =
      in_place && !seed.has_value() && !has_own_convolution(input, conv_weight, s, stride, padding, dilation, groups)
          ? convolution_pieces(s, conv_weight, input.element_size())
          : 1;
  const Tensor w = pieces > 1 ? weight_as(conv_weight, input.scalar_type()) : conv_weight;
  OptionalTensor y;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = s.n * i / pieces, last = s.n * (i + 1) / pieces;
    Form part = form;
    if (pieces > 1 && residual.has_value()) part.residual = samples(*residual, first, last);
    const Tensor z =
        pieces > 1
            ? readable(library_convolution(samples(input, first, last), w, stride, padding, dilation, groups)).first
            : convolve(input, w, s, stride, padding, dilation, groups, false).first;
    const Layout layout = result_layout(z);
    const auto [cut, cut_layout] = readable_windows(z, form);
    Normalization normalization(cut, cut_layout, shifted, variance, weight, bias, part);
    if (pieces > 1) {
      if (!y.has_value()) y = allocate_map(input, s, layout);
      apply(cut, cut_layout, layout, normalization, part, false, true, samples(*y, first, last));
    } else {
      y = std::get<0>(apply(cut, cut_layout, layout, normalization, part, false, true,
                            in_place ? OptionalTensor(cut) : std::nullopt));
    }
  }
  return *y;
}

// running = (1 - momentum) * running + momentum * batch, with the unbiased variance of `count` elements.
void update_running_statistics_(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, OptionalTensor shift,
                                int64_t count, double momentum) {
  const int64_t channels = mean.numel();
  check_channels("running_mean", running_mean, mean, channels);
  check_channels("running_var", running_var, mean, channels);
  check_channels("var", var, mean, channels);
  check_channels("conv_bias", shift, mean, channels);
  Values new_mean = read_values(running_mean), new_var = read_values(running_var);
  const Values batch_mean = read_values(mean), batch_var = read_values(var), offset = read_values(shift, channels, 0.0);
  const double unbiased = count / (count - 1.0);
  for (int64_t c = 0; c < channels; ++c) {
    new_mean[c] = (1 - momentum) * new_mean[c] + momentum * (batch_mean[c] + offset[c]);
    new_var[c] = (1 - momentum) * new_var[c] + momentum * batch_var[c] * unbiased;
  }
  write_values(new_mean, running_mean);
  write_values(new_var, running_var);
}

}  // namespace
}  // namespace layerwise

STABLE_TORCH_LIBRARY(layerwise_ext, m) { layerwise::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(layerwise_ext, CPU, m) {
  using namespace layerwise;
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("bn_act_moments", TORCH_BOX(&bn_act_moments));
  m.impl("convolution_statistics", TORCH_BOX(&convolution_statistics));
  m.impl("conv_bn_act_moments", TORCH_BOX(&conv_bn_act_moments));
  m.impl("conv_bn_act_inference", TORCH_BOX(&conv_bn_act_inference));
  m.impl("update_running_statistics_", TORCH_BOX(&update_running_statistics_));
}
