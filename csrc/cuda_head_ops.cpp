// The small head on CUDA devices: two launches forward, one backward.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/kernels.h"
#include "cuda_device.h"
#include "head.h"

namespace layerwise {
namespace {

cuda::Head head_of(const Tensor& m1, Layout layout, const Tensor& weight, const Ints& size) {
  cuda::Head head{};
  head.dtype = m1.scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  head.layout = layout;
  head.moments = shape_of(m1);
  head.height = size[0];
  head.width = size[1];
  head.classes = weight.size(0);
  head.m1 = m1.const_data_ptr();
  head.weight = weight.const_data_ptr();
  return head;
}

std::tuple<Tensor, Tensor, Tensor> pooled_linear_cross_entropy(Tensor m1, Tensor weight, OptionalTensor bias,
                                                               Tensor target, Ints size, double label_smoothing) {
  const Layout layout = check_head(m1, weight, size);
  check_head_forward(m1, weight, bias, target, label_smoothing);
  const Device device(m1);
  const Tensor sums = as_dense(m1, layout), w = torch::stable::contiguous(weight);
  const Tensor targets = torch::stable::contiguous(target);
  OptionalTensor b;
  if (bias.has_value()) b = torch::stable::contiguous(*bias);
  const int64_t batch = m1.size(0), classes = weight.size(0);
  Tensor loss = empty_strided(m1, {}, {}, m1.scalar_type());
  Tensor logits = empty_matrix(m1, batch, classes), grad_logits = empty_matrix(m1, batch, classes);
  Tensor sample_losses = empty_vector(m1, batch, m1.scalar_type());
  cuda::HeadForward p{};
  p.head = head_of(sums, layout, w, size);
  p.bias = data_or_null(b);
  p.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  p.label_smoothing = label_smoothing;
  p.logits = logits.mutable_data_ptr();
  p.grad_logits = grad_logits.mutable_data_ptr();
  p.sample_losses = sample_losses.mutable_data_ptr();
  p.loss = loss.mutable_data_ptr();
  cuda::head_forward(p, device.stream());
  return {loss, logits, grad_logits};
}

std::tuple<Tensor, Tensor, Tensor> pooled_linear_cross_entropy_backward(Tensor grad_logits, OptionalTensor scale,
                                                                        Tensor m1, Tensor weight, Ints size,
                                                                        bool needs_m1, bool needs_weight,
                                                                        bool needs_bias) {
  const Layout layout = check_head(m1, weight, size);
  check_head_backward(grad_logits, scale, m1, weight);
  const Device device(m1);
  const Tensor sums = as_dense(m1, layout), w = torch::stable::contiguous(weight);
  const Tensor gradient = torch::stable::contiguous(grad_logits);
  Tensor grad_m1 =
      needs_m1 ? empty_map(m1, shape_of(m1), layout, m1.scalar_type()) : empty_vector(m1, 0, m1.scalar_type());
  Tensor grad_weight = empty_matrix(m1, needs_weight ? weight.size(0) : 0, weight.size(1));
  Tensor grad_bias = empty_vector(m1, needs_bias ? weight.size(0) : 0, m1.scalar_type());
  cuda::HeadBackward p{};
  p.head = head_of(sums, layout, w, size);
  p.grad_logits = gradient.const_data_ptr();
  p.scale = data_or_null(scale);
  if (needs_m1) p.grad_m1 = grad_m1.mutable_data_ptr();
  if (needs_weight) p.grad_weight = grad_weight.mutable_data_ptr();
  if (needs_bias) p.grad_bias = grad_bias.mutable_data_ptr();
  cuda::head_backward(p, device.stream());
  return {grad_m1, grad_weight, grad_bias};
}

}  // namespace
}  // namespace layerwise

LAYERWISE_CUDA_OPERATORS(m) {
  using namespace layerwise;
  m.impl("pooled_linear_cross_entropy", TORCH_BOX(&pooled_linear_cross_entropy));
  m.impl("pooled_linear_cross_entropy_backward", TORCH_BOX(&pooled_linear_cross_entropy_backward));
}
