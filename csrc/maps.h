// Tensors as the kernels see them: maps in one of two layouts, per-channel values, small helpers.  CPU and CUDA glue.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "params.h"

namespace layerwise {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

inline std::string to_string(const Ints& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return text + "]";
}

inline Ints size_of(const Tensor& t) {
  Ints size;
  for (int64_t i = 0; i < t.dim(); ++i) size.push_back(t.size(i));
  return size;
}

inline std::string dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

// -- Maps -----------------------------------------------------------------------------------------------------------

inline Shape shape_of(const Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }
inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

inline Strides dense_strides(const Shape& s, Layout layout) {
  if (layout == Layout::kChannelsLast) return {s.h * s.w * s.c, 1, s.w * s.c, s.c};
  return {s.c * s.h * s.w, s.h * s.w, s.w, 1};
}

// The layout in which the kernels can read t as it is, or nothing where neither C nor W is innermost.
inline std::optional<Layout> readable_layout(const Tensor& t) {
  if (t.size(1) > 1 && t.stride(1) == 1) return Layout::kChannelsLast;
  if (t.size(3) == 1 || t.stride(3) == 1) return Layout::kContiguous;
  return std::nullopt;
}

// Channels, then width, height and samples, each outside of the one before: an input or a weight like this makes
// ATen's convolution write channels_last.
inline bool is_nested_channels_last(const Tensor& t) {
  int64_t least = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.stride(d) < least) return false;
    least = t.stride(d) * t.size(d);
  }
  return t.size(1) > 1 && t.stride(1) == 1;
}

inline bool readable_as(const Tensor& t, Layout layout) {
  return layout == Layout::kChannelsLast ? t.size(1) == 1 || t.stride(1) == 1 : t.size(3) == 1 || t.stride(3) == 1;
}

inline bool is_dense(const Tensor& t, Layout layout) {
  const Shape s = shape_of(t);
  const Strides have = strides_of(t), want = dense_strides(s, layout);
  return (s.n == 1 || have.n == want.n) && (s.c == 1 || have.c == want.c) && (s.h == 1 || have.h == want.h) &&
         (s.w == 1 || have.w == want.w);
}

inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_strided(const Tensor& like, const Ints& size, const Ints& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  const auto device = like.device();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      size.size(), size.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), device.index(), &handle));
  return Tensor(handle);
}

// Uninitialised [s.n, s.c, s.h, s.w], dense in `layout`.
inline Tensor empty_map(const Tensor& like, const Shape& s, Layout layout, ScalarType dtype) {
  const Strides d = dense_strides(s, layout);
  return empty_strided(like, {s.n, s.c, s.h, s.w}, {d.n, d.c, d.h, d.w}, dtype);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  return empty_strided(like, {size}, {1}, dtype);
}

inline Tensor dense_copy(const Tensor& t, Layout layout) {
  Tensor copy = empty_map(t, shape_of(t), layout, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// -- Per-channel values on the host ----------------------------------------------------------------------------------

using Values = std::vector<double>;

// Calls use(std::type_identity<T>) for the element type T of a [C] tensor.
template <class Use>
void with_value_type(const Tensor& t, const Use& use) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return use(std::type_identity<double>());
    case ScalarType::Float:
      return use(std::type_identity<float>());
    case ScalarType::Half:
      return use(std::type_identity<torch::headeronly::Half>());
    default:
      return use(std::type_identity<torch::headeronly::BFloat16>());
  }
}

inline Values read_values(const Tensor& t) {
  Values values(t.numel());
  with_value_type(t, [&]<class T>(std::type_identity<T>) {
    const T* from = static_cast<const T*>(t.const_data_ptr());
    const int64_t stride = t.stride(0);
    for (size_t i = 0; i < values.size(); ++i) values[i] = from[i * stride];
  });
  return values;
}

inline Values read_values(const OptionalTensor& t, int64_t size, double absent) {
  return t.has_value() ? read_values(*t) : Values(size, absent);
}

inline void write_values(const Values& values, Tensor& t) {
  with_value_type(t, [&]<class T>(std::type_identity<T>) {
    T* to = static_cast<T*>(t.mutable_data_ptr());
    const int64_t stride = t.stride(0);
    for (size_t i = 0; i < values.size(); ++i) to[i * stride] = static_cast<T>(values[i]);
  });
}

// Several [C] arrays in the accumulation type, as kernels read them.
class ChannelArrays {
 public:
  explicit ChannelArrays(ScalarType dtype) : is_double_(dtype == ScalarType::Double) {}

  const void* add(const Values& values) {
    if (is_double_) return doubles_.emplace_back(values).data();
    return floats_.emplace_back(values.begin(), values.end()).data();
  }

 private:
  bool is_double_;
  std::vector<std::vector<double>> doubles_;
  std::vector<std::vector<float>> floats_;
};

}  // namespace layerwise
