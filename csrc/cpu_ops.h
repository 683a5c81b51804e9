// What the operators on the CPU share: memory for their results, and the normalisation as the kernels take it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <utility>

#include "checks.h"
#include "cpu/memory.h"
#include "cpu/passes.h"

namespace layerwise {

inline void parallel_for(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, grain, body);
}

// Uninitialised and dense under its strides.  What is large comes from the pool of memory.h.
inline Tensor allocate(const Tensor& like, const Shape& s, const Strides& d, ScalarType dtype) {
  const Ints size{s.n, s.c, s.h, s.w}, strides{d.n, d.c, d.h, d.w};
#if !defined(__SANITIZE_ADDRESS__)  // the sanitizer sees overruns only in memory of its own allocator
  const int64_t element_size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  const int64_t bytes = s.n * s.c * s.h * s.w * element_size;
  if (bytes >= cpu::kPooledBytes)
    return torch::stable::from_blob(cpu::acquire(bytes), size, strides, like.device(), dtype, &cpu::release);
#endif
  return empty_strided(like, size, strides, dtype);
}

inline Tensor allocate_map(const Tensor& like, const Shape& s, Layout layout) {
  return allocate(like, s, dense_strides(s, layout), like.scalar_type());
}

inline Tensor channel_tensor(const Tensor& z, const Values& values) {
  Tensor t = empty_vector(z, values.size(), accumulation_type(z.scalar_type()));
  write_values(values, t);
  return t;
}

// The layout of a result: channels_last where the map's channels are innermost, contiguous otherwise.
inline Layout result_layout(const Tensor& z) { return readable_layout(z).value_or(Layout::kContiguous); }

// z as the kernels of this form read it: windows are cut from channels_last maps only.
inline std::pair<Tensor, Layout> readable_windows(const Tensor& z, const Form& form) {
  if (form.downsample == "none") return readable(z);
  if (readable_as(z, Layout::kChannelsLast)) return {z, Layout::kChannelsLast};
  return {dense_copy(z, Layout::kChannelsLast), Layout::kChannelsLast};
}

// What the forward and the backward passes share: coefficients per channel, activation, what else the form has.
struct Normalization {
  Values mean, rstd, gamma, beta;
  Activation activation;
  Extension extension;
  ChannelArrays arrays;
  OptionalTensor residual, seed;  // alive while kernels read them

  Normalization(const Tensor& z, Layout layout, Values mean_, const Values& var, const OptionalTensor& weight,
                const OptionalTensor& bias, const Form& form)
      : mean(std::move(mean_)),
        rstd(var),
        gamma(read_values(weight, mean.size(), 1.0)),
        beta(read_values(bias, mean.size(), 0.0)),
        activation(activation_of(form)),
        extension(extension_of(form, shape_of(z))),
        arrays(z.scalar_type()),
        residual(readable_gradient(form.residual, layout)),
        seed(form.seed) {
    for (double& v : rstd) v = 1.0 / std::sqrt(v + form.eps);
    if (form.slope.has_value()) extension.slopes = arrays.add(read_values(*form.slope));
    if (!residual.has_value()) return;
    extension.residual = residual->const_data_ptr();
    extension.residual_strides = strides_of(*residual);
  }

  Channels channels() { return {arrays.add(mean), arrays.add(rstd), arrays.add(gamma), arrays.add(beta)}; }
};

}  // namespace layerwise
