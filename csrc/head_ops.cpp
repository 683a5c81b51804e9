// The small head on the CPU: ATen's matrix products around one pass over the logits.  The weight is divided by the cells'
// areas and put into the order in which the sums lie in memory, instead of the sums of N samples.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "device/cells.h"
#include "head.h"
#include "product.h"

namespace layerwise {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements per task

template <class A>
std::vector<A> inverse_areas(const Shape& moments, const Ints& size) {
  std::vector<A> areas;
  for (int64_t i = 0; i < moments.h; ++i) {
    for (int64_t j = 0; j < moments.w; ++j) {
      areas.push_back(A(1) / static_cast<A>(cell_size(i, size[0], moments.h) * cell_size(j, size[1], moments.w)));
    }
  }
  return areas;
}

// target[k, place(c, cell)] = source[k, c, cell] / area, or with kBack target[k, c, cell] = source[k, place] / area, where
// place is the order in which the sums lie.
template <class A, bool kBack>
void reorder(const Tensor& source, Tensor& target, const Shape& moments, Layout layout, const Ints& size) {
  const std::vector<A> areas = inverse_areas<A>(moments, size);
  const int64_t cells = moments.h * moments.w, channels = moments.c;
  const bool channels_last = layout == Layout::kChannelsLast;
  const int64_t channel_step = channels_last ? 1 : cells, cell_step = channels_last ? channels : 1;
  const int64_t features = channels * cells, grain = std::max<int64_t>(1, kGrain / features);
  torch::stable::parallel_for(0, source.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const A* from = static_cast<const A*>(source.const_data_ptr()) + k * features;
      A* to = static_cast<A*>(target.mutable_data_ptr()) + k * features;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t cell = 0; cell < cells; ++cell) {
          const int64_t place = c * channel_step + cell * cell_step, plain = c * cells + cell;
          to[kBack ? plain : place] = from[kBack ? place : plain] * areas[cell];
        }
      }
    }
  });
}

// The weight as a matrix for features_of(m1).
template <class A>
Tensor weight_of_sums(const Tensor& weight, const Tensor& m1, Layout layout, const Ints& size) {
  Tensor w = empty_matrix(weight, weight.size(0), weight.size(1));
  reorder<A, false>(torch::stable::contiguous(weight), w, shape_of(m1), layout, size);
  return w;
}

// Loss of one sample and the gradient of its logits, but for the division by the number of samples.
template <class A>
double cross_entropy(const A* logits, A* gradient, int64_t classes, int64_t target, A smoothing) {
  A largest = logits[0];
  for (int64_t k = 1; k < classes; ++k) largest = largest > logits[k] ? largest : logits[k];
  A exponentials = 0, shifted = 0;
  for (int64_t k = 0; k < classes; ++k) {
    gradient[k] = std::exp(logits[k] - largest);
    exponentials += gradient[k];
    shifted += logits[k] - largest;
  }
  const A share = smoothing / static_cast<A>(classes);
  for (int64_t k = 0; k < classes; ++k) gradient[k] = gradient[k] / exponentials - share;
  gradient[target] -= A(1) - smoothing;
  return std::log(exponentials) - (A(1) - smoothing) * (logits[target] - largest) - share * shifted;
}

// Adds the bias to the logits and writes grad_logits; gives the mean loss.
template <class A>
double mean_cross_entropy(Tensor& logits, const OptionalTensor& bias, const Tensor& target, Tensor& grad_logits,
                          double label_smoothing) {
  const int64_t batch = logits.size(0), classes = logits.size(1), stride = target.stride(0);
  const int64_t* targets = static_cast<const int64_t*>(target.const_data_ptr());
  int64_t count = 0;
  for (int64_t n = 0; n < batch; ++n) {
    const int64_t t = targets[n * stride];
    STD_TORCH_CHECK(t == kIgnoredTarget || (t >= 0 && t < classes), "target is out of range: ", t, " of sample ", n,
                    "; allowed: 0 to ", classes - 1, ", and ", kIgnoredTarget, " for a sample to leave out");
    count += t != kIgnoredTarget;
  }
  A* x = static_cast<A*>(logits.mutable_data_ptr());
  const A* b = bias.has_value() ? static_cast<const A*>(bias->const_data_ptr()) : nullptr;
  A* gradient = static_cast<A*>(grad_logits.mutable_data_ptr());
  std::vector<double> losses(batch);
  const A inverse_count = static_cast<A>(1.0 / static_cast<double>(count));
  const int64_t grain = std::max<int64_t>(1, kGrain / classes);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t t = targets[n * stride];
      A* row = gradient + n * classes;
      for (int64_t k = 0; b != nullptr && k < classes; ++k) x[n * classes + k] += b[k];
      if (t == kIgnoredTarget) {
        std::fill_n(row, classes, A(0));
        continue;
      }
      losses[n] = cross_entropy(x + n * classes, row, classes, t, static_cast<A>(label_smoothing));
      for (int64_t k = 0; k < classes; ++k) row[k] *= inverse_count;
    }
  });
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum / static_cast<double>(count);
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& m1, Layout layout, const Tensor& weight,
                                           const OptionalTensor& bias, const Tensor& target, const Ints& size,
                                           double label_smoothing) {
  const Tensor sums = as_dense(m1, layout);
  const Tensor w = weight_of_sums<A>(weight, m1, layout, size);
  Tensor logits = empty_matrix(m1, m1.size(0), weight.size(0)), grad_logits = torch::stable::empty_like(logits);
  product_into(logits, features_of(sums), torch::stable::transpose(w, 0, 1));
  OptionalTensor b;
  if (bias.has_value()) b = torch::stable::contiguous(*bias);
  Tensor loss = empty_strided(m1, {}, {}, m1.scalar_type());
  *static_cast<A*>(loss.mutable_data_ptr()) =
      static_cast<A>(mean_cross_entropy<A>(logits, b, target, grad_logits, label_smoothing));
  return {loss, logits, grad_logits};
}

template <class A>
void column_sums(const Tensor& matrix, Tensor& sums) {
  const A* values = static_cast<const A*>(matrix.const_data_ptr());
  const int64_t columns = matrix.size(1);
  for (int64_t k = 0; k < columns; ++k) {
    double sum = 0;
    for (int64_t n = 0; n < matrix.size(0); ++n) sum += values[n * columns + k];
    static_cast<A*>(sums.mutable_data_ptr())[k] = static_cast<A>(sum);
  }
}

template <class A>
Tensor scaled(const Tensor& grad_logits, const OptionalTensor& scale) {
  const Tensor gradient = torch::stable::contiguous(grad_logits);
  const A factor = scale.has_value() ? *static_cast<const A*>(scale->const_data_ptr()) : A(1);
  if (factor == A(1)) return gradient;
  Tensor product = empty_matrix(gradient, gradient.size(0), gradient.size(1));
  const A* from = static_cast<const A*>(gradient.const_data_ptr());
  A* to = static_cast<A*>(product.mutable_data_ptr());
  for (int64_t i = 0; i < gradient.numel(); ++i) to[i] = from[i] * factor;
  return product;
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_logits, const OptionalTensor& scale, const Tensor& m1,
                                            Layout layout, const Tensor& weight, const Ints& size, bool needs_m1,
                                            bool needs_weight, bool needs_bias) {
  const Tensor gradient = scaled<A>(grad_logits, scale);
  Tensor grad_m1 =
      needs_m1 ? empty_map(m1, shape_of(m1), layout, m1.scalar_type()) : empty_vector(m1, 0, m1.scalar_type());
  Tensor grad_weight = empty_matrix(m1, needs_weight ? weight.size(0) : 0, weight.size(1));
  Tensor grad_bias = empty_vector(m1, needs_bias ? weight.size(0) : 0, m1.scalar_type());
  if (needs_m1) {
    Tensor features = features_of(grad_m1);
    product_into(features, gradient, weight_of_sums<A>(weight, m1, layout, size));
  }
  if (needs_weight) {
    Tensor of_sums = empty_matrix(m1, weight.size(0), weight.size(1));
    product_into(of_sums, torch::stable::transpose(gradient, 0, 1), features_of(as_dense(m1, layout)));
    reorder<A, true>(of_sums, grad_weight, shape_of(m1), layout, size);
  }
  if (needs_bias) column_sums<A>(gradient, grad_bias);
  return {grad_m1, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> pooled_linear_cross_entropy(Tensor m1, Tensor weight, OptionalTensor bias,
                                                               Tensor target, Ints size, double label_smoothing) {
  const Layout layout = check_head(m1, weight, size);
  check_head_forward(m1, weight, bias, target, label_smoothing);
  return m1.scalar_type() == ScalarType::Double
             ? forward<double>(m1, layout, weight, bias, target, size, label_smoothing)
             : forward<float>(m1, layout, weight, bias, target, size, label_smoothing);
}

std::tuple<Tensor, Tensor, Tensor> pooled_linear_cross_entropy_backward(Tensor grad_logits, OptionalTensor scale,
                                                                        Tensor m1, Tensor weight, Ints size,
                                                                        bool needs_m1, bool needs_weight,
                                                                        bool needs_bias) {
  const Layout layout = check_head(m1, weight, size);
  check_head_backward(grad_logits, scale, m1, weight);
  return m1.scalar_type() == ScalarType::Double
             ? backward<double>(grad_logits, scale, m1, layout, weight, size, needs_m1, needs_weight, needs_bias)
             : backward<float>(grad_logits, scale, m1, layout, weight, size, needs_m1, needs_weight, needs_bias);
}

}  // namespace
}  // namespace layerwise

STABLE_TORCH_LIBRARY_IMPL(layerwise_ext, CPU, m) {
  using namespace layerwise;
  m.impl("pooled_linear_cross_entropy", TORCH_BOX(&pooled_linear_cross_entropy));
  m.impl("pooled_linear_cross_entropy_backward", TORCH_BOX(&pooled_linear_cross_entropy_backward));
}
