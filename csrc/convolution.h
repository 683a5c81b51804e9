// The convolution as ATen has it, reached through the dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "checks.h"

namespace layerwise {

inline Window window_of(const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation) {
  return {weight.size(2), weight.size(3), stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

// [N, C, H, W] of the convolution's output.
inline Shape convolution_shape(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                               const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 4,
                  "conv_weight must have 4 dimensions [out_channels, in_channels / groups, kH, kW], got ",
                  to_string(size_of(weight)));
  STD_TORCH_CHECK(weight.numel() > 0, "conv_weight must not be empty, got shape ", to_string(size_of(weight)));
  check_device("conv_weight", weight, input);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation must have two values each");
  STD_TORCH_CHECK(groups >= 1 && weight.size(0) % groups == 0, "groups must divide out_channels ", weight.size(0),
                  ", got ", groups);
  STD_TORCH_CHECK(input.size(1) == weight.size(1) * groups, "input must have ", weight.size(1) * groups,
                  " channels (conv_weight of shape ", to_string(size_of(weight)), ", groups ", groups, "), got shape ",
                  to_string(size_of(input)));
  Ints out;
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0,
                    "stride and dilation must be at least 1 and "
                    "padding at least 0, got ",
                    to_string(stride), ", ", to_string(dilation), ", ", to_string(padding));
    const int64_t extent = input.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1;
    STD_TORCH_CHECK(extent >= 0, "input of shape ", to_string(size_of(input)),
                    " is smaller than the convolution kernel ", to_string(size_of(weight)));
    out.push_back(extent / stride[i] + 1);
  }
  return {input.size(0), weight.size(0), out[0], out[1]};
}

inline Tensor weight_as(const Tensor& weight, ScalarType dtype) {
  return weight.scalar_type() == dtype ? weight : torch::stable::to(weight, dtype);
}

inline Tensor convolution(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                          const Ints& dilation, int64_t groups, const OptionalTensor& bias = {}) {
  using torch::headeronly::IntHeaderOnlyArrayRef;
  using torch::stable::detail::from;
  const Ints output_padding{0, 0};
  std::array<StableIValue, 9> stack{from(input),
                                    from(weight),
                                    from(bias),
                                    from(IntHeaderOnlyArrayRef(stride)),
                                    from(IntHeaderOnlyArrayRef(padding)),
                                    from(IntHeaderOnlyArrayRef(dilation)),
                                    from(false),
                                    from(IntHeaderOnlyArrayRef(output_padding)),
                                    from(groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline std::tuple<Tensor, Tensor> convolution_backward(const Tensor& dz, const Tensor& input, const Tensor& conv_weight,
                                                       const Ints& stride, const Ints& padding, const Ints& dilation,
                                                       int64_t groups, bool needs_input, bool needs_weight) {
  using torch::headeronly::IntHeaderOnlyArrayRef;
  using torch::stable::detail::from;
  const Ints output_padding{0, 0};
  const bool mask[] = {needs_input, needs_weight, false};
  std::array<StableIValue, 11> stack{from(dz),
                                     from(input),
                                     from(conv_weight),
                                     from(std::nullopt),  // the convolution has no bias of its own
                                     from(IntHeaderOnlyArrayRef(stride)),
                                     from(IntHeaderOnlyArrayRef(padding)),
                                     from(IntHeaderOnlyArrayRef(dilation)),
                                     from(false),
                                     from(IntHeaderOnlyArrayRef(output_padding)),
                                     from(groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const auto none = [&] { return empty_vector(dz, 0, dz.scalar_type()); };
  Tensor gradients[3];
  for (int i = 0; i < 3; ++i) gradients[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return {needs_input ? gradients[0] : none(), needs_weight ? gradients[1] : none()};
}

inline void check_convolution_backward(const Tensor& z, const Tensor& input, const Tensor& weight, const Ints& stride,
                                       const Ints& padding, const Ints& dilation, int64_t groups) {
  check_map("input", input);
  check_device("input", input, z);
  const Shape out = convolution_shape(input, weight, stride, padding, dilation, groups);
  const Ints expected{out.n, out.c, out.h, out.w};
  STD_TORCH_CHECK(size_of(z) == expected, "z must have shape ", to_string(expected), ", got ", to_string(size_of(z)));
}

// The gradient in the weight's own dtype and layout, as the optimizer will see it.
inline Tensor as_gradient_of(const Tensor& weight, const Tensor& gradient) {
  bool matches = weight.scalar_type() == gradient.scalar_type();
  for (int64_t i = 0; i < weight.dim(); ++i) matches = matches && weight.stride(i) == gradient.stride(i);
  if (matches) return gradient;
  Tensor matching = torch::stable::empty_like(weight);
  torch::stable::copy_(matching, gradient);
  return matching;
}

// ATen's gradients from dz.
inline std::tuple<Tensor, Tensor> convolution_gradients(const Tensor& dz, const Tensor& input, const Tensor& weight,
                                                        const Ints& stride, const Ints& padding, const Ints& dilation,
                                                        int64_t groups, bool needs_input, bool needs_weight) {
  auto [grad_input, grad_weight] = convolution_backward(dz, input, weight_as(weight, dz.scalar_type()), stride, padding,
                                                        dilation, groups, needs_input, needs_weight);
  if (needs_weight) grad_weight = as_gradient_of(weight, grad_weight);
  return {grad_input, grad_weight};
}

}  // namespace layerwise
