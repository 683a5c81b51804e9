// The operators on CUDA devices: everything stays on the device and on the current stream, nothing waits for it, so a
// step can be captured in a CUDA graph.  With LAYERWISE_SIMT the same code serves the kernels on the host, for tests.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "convolution.h"
#include "cuda/kernels.h"
#include "cuda_convolution.h"
#include "cuda_device.h"
#include "schemas.h"

namespace layerwise {
namespace {

Layout layout_of(const Tensor& z) {
  return z.size(1) > 1 && z.stride(1) == 1 ? Layout::kChannelsLast : Layout::kContiguous;
}

// [C] in the type of the statistics, one value next to the other, aligned.
Tensor channel_values(const Tensor& t, const Tensor& map) {
  const ScalarType dtype = accumulation_type(map.scalar_type());
  const Tensor typed = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  const Tensor values = typed.numel() == 1 || typed.stride(0) == 1 ? typed : torch::stable::contiguous(typed);
  return is_aligned(values) ? values : torch::stable::clone(values);
}
OptionalTensor channel_values(const OptionalTensor& t, const Tensor& map) {
  if (!t.has_value()) return {};
  return channel_values(*t, map);
}

// Laid out as m1, aligned.
OptionalTensor moment_gradient(const OptionalTensor& gradient, Layout layout) {
  const OptionalTensor dense = dense_gradient(gradient, layout);
  return !dense.has_value() || is_aligned(*dense) ? dense : dense_copy(*dense, layout);
}

Tensor empty_channels(const Tensor& map) {
  return empty_vector(map, map.size(1), accumulation_type(map.scalar_type()));
}

// What normalises a map, alive while kernels read it.
struct Normalization {
  Tensor mean, var;
  OptionalTensor weight, bias, slope;
  Form form;
  Extension extension;

  Normalization(const Tensor& map, const Tensor& mean_, const Tensor& var_, const OptionalTensor& weight_,
                const OptionalTensor& bias_, const Form& form_)
      : mean(channel_values(mean_, map)),
        var(channel_values(var_, map)),
        weight(channel_values(weight_, map)),
        bias(channel_values(bias_, map)),
        slope(channel_values(form_.slope, map)),
        form(form_),
        extension(extension_of(form, shape_of(map))) {
    extension.slopes = data_or_null(slope);
    if (!form.residual.has_value()) return;
    extension.residual = form.residual->const_data_ptr();
    extension.residual_strides = strides_of(*form.residual);
  }

  cuda::Norm params() const {
    return {mean.const_data_ptr(),
            var.const_data_ptr(),
            data_or_null(weight),
            data_or_null(bias),
            form.eps,
            activation_of(form),
            extension};
  }
};

std::tuple<Tensor, Tensor> statistics(const Tensor& z, Layout layout, const Device& device) {
  Tensor mean = empty_channels(z), var = empty_channels(z);
  cuda::Statistics p{};
  p.map = map_of(z, layout);
  p.z = z.const_data_ptr();
  p.z_strides = strides_of(z);
  constexpr int64_t kDoubles = sizeof(cuda::Moments) / sizeof(double);
  Tensor partial = empty_vector(z, kDoubles * cuda::statistics_partials(p.map), ScalarType::Double);
  p.partial = static_cast<cuda::Moments*>(partial.mutable_data_ptr());
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  cuda::statistics(p, device.stream());
  return {mean, var};
}

using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, m1, m2, sums; the last three empty without bins

Moments apply(const Tensor& z, Layout layout, const Normalization& normalization, bool second_moment, bool needs_y,
              const Device& device) {
  const Form& form = normalization.form;
  const Shape s = shape_of(z), out = output_shape(s, form);
  const ScalarType accumulation = accumulation_type(z.scalar_type());
  const Ints cells = cells_or_rows(form, s);
  const Shape none{0, out.c, 1, 1};
  const Shape moments = form.bins.empty() ? none : Shape{out.n, out.c, form.bins[0], form.bins[1]};
  Tensor y = empty_map(z, needs_y ? out : none, layout, z.scalar_type());
  Tensor m1 = empty_map(z, moments, layout, accumulation);
  Tensor m2 = empty_map(z, second_moment ? moments : none, layout, accumulation);
  Tensor sums = empty_vector(z, sum_kinds(form, second_moment) * m1.numel(), accumulation);
  cuda::Apply whole{};
  whole.map = map_of(z, layout);
  whole.bins_h = cells[0];
  whole.bins_w = cells[1];
  whole.z = z.const_data_ptr();
  whole.z_strides = strides_of(z);
  whole.y = needs_y ? y.mutable_data_ptr() : nullptr;
  whole.y_strides = strides_of(y);
  whole.norm = normalization.params();
  if (!form.bins.empty()) {
    whole.m1 = m1.mutable_data_ptr();
    whole.m2 = second_moment ? m2.mutable_data_ptr() : nullptr;
    whole.sums = sums.mutable_data_ptr();
  }
  for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
    cuda::Apply p = whole;
    if (sub.has_value()) {
      const int64_t bytes = z.element_size(), sum_bytes = m1.element_size();
      const int64_t apart = dense_strides(moments, layout).c;
      sub->narrow(p.norm.extension, p.map.shape, bytes);
      sub->narrow(p.z, p.z_strides, bytes);
      sub->spread(p.y, p.y_strides, bytes);
      sub->shift(p.m1, apart, sum_bytes);
      sub->shift(p.m2, apart, sum_bytes);
      sub->shift(p.sums, apart, sum_bytes);
    }
    cuda::apply(p, device.stream());
  });
  return {y, m1, m2, sums};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor z) {
  check_map("z", z);
  return statistics(z, layout_of(z), Device(z));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_moments(
    Tensor z, OptionalTensor weight, OptionalTensor bias, OptionalTensor given_mean, OptionalTensor given_var,
    LAYERWISE_FORM_PARAMETERS, bool second_moment, bool needs_y) {
  const Form form = LAYERWISE_FORM;
  check_outputs(form, needs_y);
  check_map("z", z);
  check_normalization(z, shape_of(z), weight, bias, given_mean, given_var, form);
  const Device device(z);
  const Layout layout = layout_of(z);
  const auto [mean, var] = given_mean.has_value() ? std::tuple(*given_mean, *given_var) : statistics(z, layout, device);
  const Normalization normalization(z, mean, var, weight, bias, form);
  auto [y, m1, m2, sums] = apply(z, layout, normalization, second_moment, needs_y, device);
  // An output must not share memory with an input.
  const bool given = given_mean.has_value();
  return {y,
          m1,
          m2,
          sums,
          given ? torch::stable::clone(normalization.mean) : mean,
          given ? torch::stable::clone(normalization.var) : var};
}

// The convolution, of shape s, and its statistics.
ConvolutionResult convolve(const Tensor& input, const Tensor& conv_weight, const Shape& s, const Ints& stride,
                           const Ints& padding, const Ints& dilation, int64_t groups, const Device& device) {
  const Tensor w = weight_as(conv_weight, input.scalar_type());
  const auto by_library = [&]() -> ConvolutionResult {
    const Tensor z = convolution(input, w, stride, padding, dilation, groups);
    const auto [mean, var] = statistics(z, layout_of(z), device);
    return {z, mean, var};
  };
  return convolution_and_statistics(by_library, input, w, s, window_of(w, stride, padding, dilation), groups, device);
}

std::tuple<Tensor, Tensor, Tensor> convolution_statistics(Tensor input, Tensor conv_weight, Ints stride, Ints padding,
                                                          Ints dilation, int64_t groups) {
  check_map("input", input);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  return convolve(input, conv_weight, s, stride, padding, dilation, groups, Device(input));
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult forward(const Tensor& input, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& given_mean,
                      const OptionalTensor& given_var, const Ints& stride, const Ints& padding, const Ints& dilation,
                      int64_t groups, const Form& form, bool second_moment, bool needs_y) {
  check_outputs(form, needs_y);
  check_map("input", input);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  check_channels("conv_bias", conv_bias, input, s.c);
  check_normalization(input, s, weight, bias, given_mean, given_var, form);
  const Device device(input);
  auto [z, mean, var] = given_mean.has_value()
                            ? ConvolutionResult(convolution(input, weight_as(conv_weight, input.scalar_type()), stride,
                                                            padding, dilation, groups),
                                                torch::stable::clone(channel_values(*given_mean, input)),
                                                torch::stable::clone(channel_values(*given_var, input)))
                            : convolve(input, conv_weight, s, stride, padding, dilation, groups, device);
  const Layout layout = layout_of(z);
  // The convolution's bias shifts z and its mean alike, so it is never added: only a given mean must lose it.
  if (given_mean.has_value() && conv_bias.has_value())
    mean = torch::stable::subtract(mean, channel_values(*conv_bias, z));
  const Normalization normalization(z, mean, var, weight, bias, form);
  auto [y, m1, m2, sums] = apply(z, layout, normalization, second_moment, needs_y, device);
  return {y, m1, m2, sums, mean, var, z};
}

ForwardResult conv_bn_act_moments(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor weight,
                                  OptionalTensor bias, OptionalTensor given_mean, OptionalTensor given_var, Ints stride,
                                  Ints padding, Ints dilation, int64_t groups, LAYERWISE_FORM_PARAMETERS,
                                  bool second_moment, bool needs_y) {
  return forward(input, conv_weight, conv_bias, weight, bias, given_mean, given_var, stride, padding, dilation, groups,
                 LAYERWISE_FORM, second_moment, needs_y);
}

// Where cuDNN has convolution, bias and ReLU as one kernel: on tensor cores, by 16-byte accesses over the channels.
bool has_convolution_relu(const Tensor& input, const Tensor& weight, int64_t groups) {
  const bool half = input.scalar_type() == ScalarType::BFloat16 || input.scalar_type() == ScalarType::Half;
  return input.is_cuda() && half && groups == 1 && input.size(1) % 8 == 0 && weight.size(0) % 8 == 0 &&
         is_dense(input, Layout::kChannelsLast);
}

Tensor convolution_relu(const Tensor& input, const Tensor& weight, const Tensor& bias, const Ints& stride,
                        const Ints& padding, const Ints& dilation, int64_t groups) {
  using torch::headeronly::IntHeaderOnlyArrayRef;
  using torch::stable::detail::from;
  if (has_convolution_relu(input, weight, groups)) {
    std::array<StableIValue, 7> stack{from(input),
                                      from(weight),
                                      from(OptionalTensor(bias)),
                                      from(IntHeaderOnlyArrayRef(stride)),
                                      from(IntHeaderOnlyArrayRef(padding)),
                                      from(IntHeaderOnlyArrayRef(dilation)),
                                      from(groups)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cudnn_convolution_relu", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  std::array<StableIValue, 1> stack{from(convolution(input, weight, stride, padding, dilation, groups, bias))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Batch norm folded into the weights by one small launch, then cuDNN's convolution with bias and ReLU in it.
Tensor conv_bn_act_inference(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor weight,
                             OptionalTensor bias, Tensor mean, Tensor var, Ints stride, Ints padding, Ints dilation,
                             int64_t groups, LAYERWISE_FORM_PARAMETERS) {
  const Form form = LAYERWISE_FORM;
  check_map("input", input);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  check_channels("conv_bias", conv_bias, input, s.c);
  check_normalization(input, s, weight, bias, mean, var, form);
  const bool relu = form.activation == "relu";
  // cuDNN has no other activation, and nothing behind it.
  if ((!relu && form.activation != "identity") || residual.has_value() || form.downsample != "none")
    return std::get<0>(forward(input, conv_weight, conv_bias, weight, bias, mean, var, stride, padding, dilation,
                               groups, form, false, true));
  const Device device(input);
  const ScalarType dtype = input.scalar_type();
  const bool foldable = conv_weight.scalar_type() == dtype ||
                        (conv_weight.scalar_type() == ScalarType::Float && dtype != ScalarType::Double);
  const Tensor typed = foldable ? conv_weight : weight_as(conv_weight, dtype);
  const bool dense = is_dense(typed, Layout::kChannelsLast) || is_dense(typed, Layout::kContiguous);
  const Tensor plain = dense ? typed : torch::stable::contiguous(typed);
  const Normalization normalization(input, mean, var, weight, bias, form);
  const OptionalTensor b = channel_values(conv_bias, input);
  const Strides d = strides_of(plain);
  Tensor folded_weight = empty_strided(input, size_of(plain), {d.n, d.c, d.h, d.w}, dtype);
  Tensor folded_bias = empty_vector(input, s.c, dtype);
  cuda::Fold p{};
  p.from = map_of(plain, Layout::kContiguous).dtype;
  p.to = map_of(input, Layout::kContiguous).dtype;
  p.channels = s.c;
  p.weights_per_channel = plain.numel() / s.c;
  p.weight = plain.const_data_ptr();
  p.conv_bias = data_or_null(b);
  p.norm = normalization.params();
  p.folded_weight = folded_weight.mutable_data_ptr();
  p.folded_bias = folded_bias.mutable_data_ptr();
  cuda::fold(p, device.stream());
  return relu ? convolution_relu(input, folded_weight, folded_bias, stride, padding, dilation, groups)
              : convolution(input, folded_weight, stride, padding, dilation, groups, folded_bias);
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
  const Device device(z);
  const Layout layout = layout_of(z);
  const Normalization normalization(z, mean, var, weight, bias, form);
  const OptionalTensor p1 = moment_gradient(grad_m1, layout), p2 = moment_gradient(grad_m2, layout);
  const Ints cells = cells_or_rows(form, shape_of(z));
  const Shape out = output_shape(shape_of(z), form);
  Tensor dgamma = empty_channels(z), dbeta = empty_channels(z);
  Tensor dslope = slope.has_value() ? empty_channels(z) : empty_vector(z, 0, dgamma.scalar_type());
  std::vector<cuda::DenseMap> dense;
  if (grad_y.has_value()) {
    const cuda::DenseMap whole{map_of(z, layout),        z.const_data_ptr(),  strides_of(z),
                               grad_y->const_data_ptr(), strides_of(*grad_y), normalization.extension};
    for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
      cuda::DenseMap& p = dense.emplace_back(whole);
      if (!sub.has_value()) return;
      sub->narrow(p.extension, p.map.shape, z.element_size());
      sub->narrow(p.z, p.z_strides, z.element_size());
      sub->spread(p.grad_y, p.grad_y_strides, z.element_size());
    });
  }
  cuda::BackwardSums p{};
  p.moments = map_of(z, {out.n, out.c, cells[0], cells[1]}, layout);
  p.p = data_or_null(p1);
  p.q = data_or_null(p2);
  p.sums = sums.const_data_ptr();
  p.slope_sums = both ? 4 : 2;
  p.dense = dense.data();
  p.dense_maps = dense.size();
  p.norm = normalization.params();
  p.dgamma = dgamma.mutable_data_ptr();
  p.dbeta = dbeta.mutable_data_ptr();
  p.dslope = slope.has_value() ? dslope.mutable_data_ptr() : nullptr;
  Tensor partial = empty_vector(z, cuda::backward_sums_partials(p), dgamma.scalar_type());
  p.partial = partial.mutable_data_ptr();
  cuda::backward_sums(p, device.stream());
  return {dgamma, dbeta, dslope};
}

// dz may be z; the gradient of the residual may be absent.
void write_input_gradient(const Tensor& z, Tensor& dz, OptionalTensor& grad_residual, const OptionalTensor& grad_y,
                          const OptionalTensor& grad_m1, const OptionalTensor& grad_m2, const Tensor& dgamma,
                          const Tensor& dbeta, const Normalization& normalization, double count, const Device& device) {
  const Form& form = normalization.form;
  const Layout layout = layout_of(z);
  const OptionalTensor p1 = moment_gradient(grad_m1, layout), p2 = moment_gradient(grad_m2, layout);
  const Tensor total_dgamma = channel_values(dgamma, z), total_dbeta = channel_values(dbeta, z);
  const Ints cells = cells_or_rows(form, shape_of(z));
  cuda::InputGradient whole{};
  whole.map = map_of(z, layout);
  whole.bins_h = cells[0];
  whole.bins_w = cells[1];
  whole.z = z.const_data_ptr();
  whole.z_strides = strides_of(z);
  whole.dz = dz.mutable_data_ptr();
  whole.dz_strides = strides_of(dz);
  if (grad_residual.has_value()) {
    whole.dresidual = grad_residual->mutable_data_ptr();
    whole.dresidual_strides = strides_of(*grad_residual);
  }
  whole.grad_y = data_or_null(grad_y);
  if (grad_y.has_value()) whole.grad_y_strides = strides_of(*grad_y);
  whole.p = data_or_null(p1);
  whole.q = data_or_null(p2);
  whole.norm = normalization.params();
  whole.dgamma = total_dgamma.const_data_ptr();
  whole.dbeta = total_dbeta.const_data_ptr();
  whole.count = count;
  for_each_sub_map(form, [&](const std::optional<SubMap>& sub) {
    cuda::InputGradient p = whole;
    if (sub.has_value()) {
      const int64_t bytes = z.element_size(), sum_bytes = total_dgamma.element_size();
      const Shape out = output_shape(shape_of(z), form);
      const int64_t apart = dense_strides({out.n, out.c, cells[0], cells[1]}, layout).c;
      sub->narrow(p.norm.extension, p.map.shape, bytes);
      sub->narrow(p.z, p.z_strides, bytes);
      sub->narrow(p.dz, p.dz_strides, bytes);
      if (p.dresidual != nullptr) sub->narrow(p.dresidual, p.dresidual_strides, bytes);
      if (p.grad_y != nullptr) sub->spread(p.grad_y, p.grad_y_strides, bytes);
      sub->shift(p.p, apart, sum_bytes);
      sub->shift(p.q, apart, sum_bytes);
    }
    cuda::input_gradient(p, device.stream());
  });
}

OptionalTensor empty_residual(const Tensor& z, const Form& form, bool needed) {
  if (!needed || !form.residual.has_value()) return {};
  return empty_map(z, shape_of(z), layout_of(z), z.scalar_type());
}

std::tuple<Tensor, Tensor> bn_act_moments_backward(Tensor z, OptionalTensor grad_y, OptionalTensor grad_m1,
                                                   OptionalTensor grad_m2, Tensor dgamma, Tensor dbeta, Tensor mean,
                                                   Tensor var, OptionalTensor weight, OptionalTensor bias,
                                                   LAYERWISE_FORM_PARAMETERS, double count, bool needs_residual) {
  const Form form = LAYERWISE_FORM;
  check_backward(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, form);
  const Device device(z);
  const Normalization normalization(z, mean, var, weight, bias, form);
  Tensor dz = empty_map(z, shape_of(z), layout_of(z), z.scalar_type());
  OptionalTensor grad_residual = empty_residual(z, form, needs_residual);
  write_input_gradient(z, dz, grad_residual, grad_y, grad_m1, grad_m2, dgamma, dbeta, normalization, count, device);
  return {dz, grad_residual.value_or(empty_vector(z, 0, z.scalar_type()))};
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
  const Device device(z);
  const Normalization normalization(z, mean, var, weight, bias, form);
  Tensor dz = overwrite ? z : empty_map(z, shape_of(z), layout_of(z), z.scalar_type());
  OptionalTensor grad_residual = overwrite_grad_y ? grad_y : empty_residual(z, form, needs_residual);
  write_input_gradient(z, dz, grad_residual, grad_y, grad_m1, grad_m2, dgamma, dbeta, normalization, count, device);
  if (overwrite_grad_y) grad_residual.reset();
  const auto none = [&] { return empty_vector(z, 0, z.scalar_type()); };
  auto [grad_input, grad_weight] =
      needs_input || needs_weight
          ? convolution_gradients(dz, input, conv_weight, stride, padding, dilation, groups, needs_input, needs_weight)
          : std::tuple(none(), none());
  return {grad_input, grad_weight, grad_residual.value_or(none())};
}

using ConvBackward = BackwardForm<&conv_backward, false>;
using ConvBackwardInPlace = BackwardForm<&conv_backward, true>;  // z's memory becomes dz's

void update_running_statistics_(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, OptionalTensor shift,
                                int64_t count, double momentum) {
  const int64_t channels = mean.numel();
  check_channels("running_mean", running_mean, mean, channels);
  check_channels("running_var", running_var, mean, channels);
  check_channels("var", var, mean, channels);
  check_channels("conv_bias", shift, mean, channels);
  const Device device(mean);
  if (channels == 0) return;
  const ScalarType dtype = mean.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  // The kernel works on arrays of one type; running statistics of another one are converted there and back.
  const auto in_dtype = [&](const Tensor& t) {
    return t.scalar_type() == dtype && (channels == 1 || t.stride(0) == 1)
               ? t
               : torch::stable::contiguous(torch::stable::to(t, dtype));
  };
  Tensor new_mean = in_dtype(running_mean), new_var = in_dtype(running_var);
  const Tensor batch_mean = in_dtype(mean), batch_var = in_dtype(var);
  OptionalTensor offset;
  if (shift.has_value()) offset = in_dtype(*shift);
  cuda::RunningStatistics p{};
  p.dtype = dtype == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  p.channels = channels;
  p.running_mean = new_mean.mutable_data_ptr();
  p.running_var = new_var.mutable_data_ptr();
  p.mean = batch_mean.const_data_ptr();
  p.var = batch_var.const_data_ptr();
  p.shift = data_or_null(offset);
  p.count = static_cast<double>(count);
  p.momentum = momentum;
  cuda::update_running_statistics(p, device.stream());
  if (new_mean.data_ptr() != running_mean.data_ptr()) torch::stable::copy_(running_mean, new_mean);
  if (new_var.data_ptr() != running_var.data_ptr()) torch::stable::copy_(running_var, new_var);
}

}  // namespace
}  // namespace layerwise

#if defined(LAYERWISE_SIMT)
STABLE_TORCH_LIBRARY(layerwise_simt, m) { layerwise::define_operators(m); }
#endif

LAYERWISE_CUDA_OPERATORS(m) {
  using namespace layerwise;
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("bn_act_moments", TORCH_BOX(&bn_act_moments));
  m.impl("convolution_statistics", TORCH_BOX(&convolution_statistics));
  m.impl("conv_bn_act_moments", TORCH_BOX(&conv_bn_act_moments));
  m.impl("conv_bn_act_inference", TORCH_BOX(&conv_bn_act_inference));
  m.impl("bn_act_moments_backward_sums", TORCH_BOX(&bn_act_moments_backward_sums));
  m.impl("bn_act_moments_backward", TORCH_BOX(&bn_act_moments_backward));
  m.impl("conv_bn_act_moments_backward", TORCH_BOX(&ConvBackward::call));
  m.impl("conv_bn_act_moments_backward_", TORCH_BOX(&ConvBackwardInPlace::call));
  m.impl("update_running_statistics_", TORCH_BOX(&update_running_statistics_));
}
