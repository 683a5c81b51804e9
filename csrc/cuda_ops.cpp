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

constexpr bool kHalf = true;  // float16 maps

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
  OptionalTensor weight, bias;
  double eps;
  Activation activation;

  Normalization(const Tensor& map, const Tensor& mean_, const Tensor& var_, const OptionalTensor& weight_,
                const OptionalTensor& bias_, double eps_, Activation activation_)
      : mean(channel_values(mean_, map)),
        var(channel_values(var_, map)),
        weight(channel_values(weight_, map)),
        bias(channel_values(bias_, map)),
        eps(eps_),
        activation(activation_) {}

  cuda::Norm params() const {
    return {mean.const_data_ptr(), var.const_data_ptr(), data_or_null(weight), data_or_null(bias), eps, activation};
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

Moments apply(const Tensor& z, Layout layout, const Normalization& normalization, const Ints& bins, bool second_moment,
              const Device& device) {
  const Shape s = shape_of(z);
  const ScalarType accumulation = accumulation_type(z.scalar_type());
  const Ints cells = cells_or_rows(bins, s);
  const Shape none{0, s.c, 1, 1};
  const Shape moments = bins.empty() ? none : Shape{s.n, s.c, bins[0], bins[1]};
  Tensor y = empty_map(z, s, layout, z.scalar_type());
  Tensor m1 = empty_map(z, moments, layout, accumulation);
  Tensor m2 = empty_map(z, second_moment ? moments : none, layout, accumulation);
  Tensor sums = empty_vector(z, (second_moment ? 4 : 2) * m1.numel(), accumulation);
  cuda::Apply p{};
  p.map = map_of(z, layout);
  p.bins_h = cells[0];
  p.bins_w = cells[1];
  p.z = z.const_data_ptr();
  p.z_strides = strides_of(z);
  p.y = y.mutable_data_ptr();
  p.y_strides = strides_of(y);
  p.norm = normalization.params();
  if (!bins.empty()) {
    p.m1 = m1.mutable_data_ptr();
    p.m2 = second_moment ? m2.mutable_data_ptr() : nullptr;
    p.sums = sums.mutable_data_ptr();
  }
  cuda::apply(p, device.stream());
  return {y, m1, m2, sums};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(Tensor z) {
  check_map("z", z, kHalf);
  return statistics(z, layout_of(z), Device(z));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_moments(
    Tensor z, OptionalTensor weight, OptionalTensor bias, OptionalTensor given_mean, OptionalTensor given_var,
    double eps, std::string activation, double negative_slope, Ints bins, bool second_moment) {
  check_map("z", z, kHalf);
  check_normalization(z, shape_of(z), weight, bias, given_mean, given_var, eps, bins);
  const Activation act = check_activation(activation, negative_slope);
  const Device device(z);
  const Layout layout = layout_of(z);
  const auto [mean, var] = given_mean.has_value() ? std::tuple(*given_mean, *given_var) : statistics(z, layout, device);
  const Normalization normalization(z, mean, var, weight, bias, eps, act);
  auto [y, m1, m2, sums] = apply(z, layout, normalization, bins, second_moment, device);
  // An output must not share memory with an input.
  const bool given = given_mean.has_value();
  return {y,
          m1,
          m2,
          sums,
          given ? torch::stable::clone(normalization.mean) : mean,
          given ? torch::stable::clone(normalization.var) : var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_moments(
    Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor given_mean, OptionalTensor given_var, Ints stride, Ints padding, Ints dilation, int64_t groups,
    double eps, std::string activation, double negative_slope, Ints bins, bool second_moment) {
  check_map("input", input, kHalf);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  check_channels("conv_bias", conv_bias, input, s.c);
  check_normalization(input, s, weight, bias, given_mean, given_var, eps, bins);
  const Activation act = check_activation(activation, negative_slope);
  const Device device(input);
  const Tensor w = conv_weight.scalar_type() == input.scalar_type()
                       ? conv_weight
                       : torch::stable::to(conv_weight, input.scalar_type());
  const auto by_library = [&] { return convolution(input, w, stride, padding, dilation, groups); };
  const auto with_statistics = [&]() -> ConvolutionResult {
    const Tensor z = by_library();
    const auto [mean, var] = statistics(z, layout_of(z), device);
    return {z, mean, var};
  };
  auto [z, mean, var] = given_mean.has_value()
                            ? ConvolutionResult(by_library(), torch::stable::clone(channel_values(*given_mean, input)),
                                                torch::stable::clone(channel_values(*given_var, input)))
                            : convolution_and_statistics(with_statistics, input, w, s,
                                                         window_of(w, stride, padding, dilation), groups, device);
  const Layout layout = layout_of(z);
  // The convolution's bias shifts z and its mean alike, so it is never added: only a given mean must lose it.
  if (given_mean.has_value() && conv_bias.has_value())
    mean = torch::stable::subtract(mean, channel_values(*conv_bias, z));
  const Normalization normalization(z, mean, var, weight, bias, eps, act);
  auto [y, m1, m2, sums] = apply(z, layout, normalization, bins, second_moment, device);
  return {y, m1, m2, sums, mean, var, z};
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
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::cudnn_convolution_relu", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  std::array<StableIValue, 1> stack{from(convolution(input, weight, stride, padding, dilation, groups, bias))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Batch norm folded into the weights by one small launch, then cuDNN's convolution with bias and ReLU in it.
Tensor conv_bn_act_inference(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor weight,
                             OptionalTensor bias, Tensor mean, Tensor var, Ints stride, Ints padding, Ints dilation,
                             int64_t groups, double eps, std::string activation, double negative_slope) {
  check_map("input", input, kHalf);
  const Shape s = convolution_shape(input, conv_weight, stride, padding, dilation, groups);
  check_channels("conv_bias", conv_bias, input, s.c);
  check_normalization(input, s, weight, bias, mean, var, eps, {});
  const Activation act = check_activation(activation, negative_slope);
  if (!act.relu && act.negative_slope != 1)  // cuDNN has no other activation
    return std::get<0>(conv_bn_act_moments(input, conv_weight, conv_bias, weight, bias, mean, var, stride, padding,
                                           dilation, groups, eps, activation, negative_slope, {}, false));
  const Device device(input);
  const ScalarType dtype = input.scalar_type();
  const bool foldable = conv_weight.scalar_type() == dtype ||
                        (conv_weight.scalar_type() == ScalarType::Float && dtype != ScalarType::Double);
  const Tensor typed = foldable ? conv_weight : torch::stable::to(conv_weight, dtype);
  const bool dense = is_dense(typed, Layout::kChannelsLast) || is_dense(typed, Layout::kContiguous);
  const Tensor plain = dense ? typed : torch::stable::contiguous(typed);
  const Normalization normalization(input, mean, var, weight, bias, eps, act);
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
  return act.relu ? convolution_relu(input, folded_weight, folded_bias, stride, padding, dilation, groups)
                  : convolution(input, folded_weight, stride, padding, dilation, groups, folded_bias);
}

std::tuple<Tensor, Tensor> bn_act_moments_backward_sums(Tensor z, OptionalTensor grad_y, OptionalTensor grad_m1,
                                                        OptionalTensor grad_m2, Tensor sums, Tensor mean, Tensor var,
                                                        OptionalTensor weight, OptionalTensor bias, double eps,
                                                        std::string activation, double negative_slope, Ints bins) {
  check_map("z", z, kHalf);
  check_normalization(z, shape_of(z), weight, bias, mean, var, eps, bins);
  check_gradients(z, grad_y, grad_m1, grad_m2, bins);
  check_sums(z, grad_m1, grad_m2, sums, bins);
  const Device device(z);
  const Layout layout = layout_of(z);
  const Normalization normalization(z, mean, var, weight, bias, eps, check_activation(activation, negative_slope));
  const OptionalTensor p1 = moment_gradient(grad_m1, layout), p2 = moment_gradient(grad_m2, layout);
  const Ints cells = cells_or_rows(bins, shape_of(z));
  Tensor dgamma = empty_channels(z), dbeta = empty_channels(z);
  cuda::BackwardSums p{};
  p.map = map_of(z, layout);
  p.bins_h = cells[0];
  p.bins_w = cells[1];
  p.z = z.const_data_ptr();
  p.z_strides = strides_of(z);
  p.grad_y = data_or_null(grad_y);
  if (grad_y.has_value()) p.grad_y_strides = strides_of(*grad_y);
  p.p = data_or_null(p1);
  p.q = data_or_null(p2);
  p.sums = sums.const_data_ptr();
  p.norm = normalization.params();
  Tensor partial = empty_vector(z, cuda::backward_sums_partials(p.map, p.bins_h, p.bins_w), dgamma.scalar_type());
  p.partial = partial.mutable_data_ptr();
  p.dgamma = dgamma.mutable_data_ptr();
  p.dbeta = dbeta.mutable_data_ptr();
  cuda::backward_sums(p, device.stream());
  return {dgamma, dbeta};
}

// dz may be z.
void write_input_gradient(const Tensor& z, Tensor& dz, const OptionalTensor& grad_y, const OptionalTensor& grad_m1,
                          const OptionalTensor& grad_m2, const Tensor& dgamma, const Tensor& dbeta,
                          const Normalization& normalization, const Ints& bins, double count, const Device& device) {
  const Layout layout = layout_of(z);
  const OptionalTensor p1 = moment_gradient(grad_m1, layout), p2 = moment_gradient(grad_m2, layout);
  const Tensor total_dgamma = channel_values(dgamma, z), total_dbeta = channel_values(dbeta, z);
  const Ints cells = cells_or_rows(bins, shape_of(z));
  cuda::InputGradient p{};
  p.map = map_of(z, layout);
  p.bins_h = cells[0];
  p.bins_w = cells[1];
  p.z = z.const_data_ptr();
  p.z_strides = strides_of(z);
  p.dz = dz.mutable_data_ptr();
  p.dz_strides = strides_of(dz);
  p.grad_y = data_or_null(grad_y);
  if (grad_y.has_value()) p.grad_y_strides = strides_of(*grad_y);
  p.p = data_or_null(p1);
  p.q = data_or_null(p2);
  p.norm = normalization.params();
  p.dgamma = total_dgamma.const_data_ptr();
  p.dbeta = total_dbeta.const_data_ptr();
  p.count = count;
  cuda::input_gradient(p, device.stream());
}

Tensor bn_act_moments_backward(Tensor z, OptionalTensor grad_y, OptionalTensor grad_m1, OptionalTensor grad_m2,
                               Tensor dgamma, Tensor dbeta, Tensor mean, Tensor var, OptionalTensor weight,
                               OptionalTensor bias, double eps, std::string activation, double negative_slope,
                               Ints bins, double count) {
  check_backward(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, eps, bins, kHalf);
  const Device device(z);
  const Normalization normalization(z, mean, var, weight, bias, eps, check_activation(activation, negative_slope));
  Tensor dz = empty_map(z, shape_of(z), layout_of(z), z.scalar_type());
  write_input_gradient(z, dz, grad_y, grad_m1, grad_m2, dgamma, dbeta, normalization, bins, count, device);
  return dz;
}

// Gradients of input and conv_weight; an empty tensor stands for one that is not needed.
std::tuple<Tensor, Tensor> conv_backward(bool overwrite, Tensor z, OptionalTensor grad_y, OptionalTensor grad_m1,
                                         OptionalTensor grad_m2, Tensor dgamma, Tensor dbeta, Tensor mean, Tensor var,
                                         OptionalTensor weight, OptionalTensor bias, double eps, std::string activation,
                                         double negative_slope, Ints bins, double count, Tensor input,
                                         Tensor conv_weight, Ints stride, Ints padding, Ints dilation, int64_t groups,
                                         bool needs_input, bool needs_weight) {
  check_backward(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, eps, bins, kHalf);
  check_convolution_backward(z, input, conv_weight, stride, padding, dilation, groups, kHalf);
  const Device device(z);
  const Normalization normalization(z, mean, var, weight, bias, eps, check_activation(activation, negative_slope));
  Tensor dz = overwrite ? z : empty_map(z, shape_of(z), layout_of(z), z.scalar_type());
  write_input_gradient(z, dz, grad_y, grad_m1, grad_m2, dgamma, dbeta, normalization, bins, count, device);
  return convolution_gradients(dz, input, conv_weight, stride, padding, dilation, groups, needs_input, needs_weight);
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
  m.impl("conv_bn_act_moments", TORCH_BOX(&conv_bn_act_moments));
  m.impl("conv_bn_act_inference", TORCH_BOX(&conv_bn_act_inference));
  m.impl("bn_act_moments_backward_sums", TORCH_BOX(&bn_act_moments_backward_sums));
  m.impl("bn_act_moments_backward", TORCH_BOX(&bn_act_moments_backward));
  m.impl("conv_bn_act_moments_backward", TORCH_BOX(&ConvBackward::call));
  m.impl("conv_bn_act_moments_backward_", TORCH_BOX(&ConvBackwardInPlace::call));
  m.impl("update_running_statistics_", TORCH_BOX(&update_running_statistics_));
}
