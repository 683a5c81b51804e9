// The convolution and its batch statistics: by the library and the statistics kernel, or by a convolution that sums on
// its way, where that was measured to be faster.
#pragma once

#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autotune.h"
#include "convolution.h"
#include "cuda/fused_convolution.h"
#include "cuda/timer.h"
#include "cuda_device.h"

namespace layerwise {

using ConvolutionResult = std::tuple<Tensor, Tensor, Tensor>;  // z, mean, biased variance

// One way to compute it.
struct ConvolutionWay {
  std::string name;
  std::function<ConvolutionResult()> run;
};

inline ConvolutionResult run_fused_convolution(int kernel, const cuda::FusedConvolution& shapes,
                                               const cuda::FusedConvolutionPlan& plan, const Tensor& input,
                                               const Tensor& weight, const Device& device) {
  const bool readable = is_dense(weight, Layout::kChannelsLast) && is_aligned(weight);
  const Tensor w = readable ? weight : dense_copy(weight, Layout::kChannelsLast);
  const int64_t channels = shapes.output.c;
  Tensor z = empty_map(input, shapes.output, Layout::kChannelsLast, input.scalar_type());
  Tensor sums = empty_vector(input, plan.tiles * plan.row_stride, ScalarType::Float);
  Tensor squares = torch::stable::empty_like(sums);
  Tensor mean = empty_vector(input, channels, ScalarType::Float), var = torch::stable::empty_like(mean);
  cuda::FusedConvolution p = shapes;
  p.x = input.const_data_ptr();
  p.w = w.const_data_ptr();
  p.z = z.mutable_data_ptr();
  p.tile_sums = static_cast<float*>(sums.mutable_data_ptr());
  p.tile_squares = static_cast<float*>(squares.mutable_data_ptr());
  cuda::fused_convolution(kernel, p, device.stream());
  cuda::TileSums tiles{};
  tiles.rows = shapes.output.n * shapes.output.h * shapes.output.w;
  tiles.channels = channels;
  tiles.tiles = plan.tiles;
  tiles.row_stride = plan.row_stride;
  tiles.sums = p.tile_sums;
  tiles.squares = p.tile_squares;
  tiles.mean = static_cast<float*>(mean.mutable_data_ptr());
  tiles.var = static_cast<float*>(var.mutable_data_ptr());
  cuda::combine_tile_sums(tiles, device.stream());
  return {z, mean, var};
}

// Those of this build that can do it on this device.
inline void add_fused_convolutions(std::vector<ConvolutionWay>& ways, const Tensor& input, const Tensor& weight,
                                   const Shape& output, const Window& window, int64_t groups, const Device& device) {
  const bool half = input.scalar_type() == ScalarType::BFloat16 || input.scalar_type() == ScalarType::Half;
  if (!half || groups != 1 || !is_aligned(input) || input.size(1) == 1 || !is_dense(input, Layout::kChannelsLast))
    return;
  if (cuda::fused_convolution_count() == 0 || !cuda::fused_convolution_runs_here()) return;
  cuda::FusedConvolution shapes{};
  shapes.dtype = input.scalar_type() == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
  shapes.input = shape_of(input);
  shapes.output = output;
  shapes.window = window;
  for (int kernel = 0; kernel < cuda::fused_convolution_count(); ++kernel) {
    const cuda::FusedConvolutionPlan plan = cuda::plan_fused_convolution(kernel, shapes);
    if (!plan.possible) continue;
    ways.push_back({cuda::fused_convolution_name(kernel),
                    [=, &device] { return run_fused_convolution(kernel, shapes, plan, input, weight, device); }});
  }
}

// What is measured once: this convolution on this device.
inline std::string describe_convolution(const Tensor& input, const Tensor& weight, const Window& w) {
  const auto pair = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
  return cuda::device_name() + ", " + dtype_name(input.scalar_type()) + " " + to_string(size_of(input)) + " * " +
         to_string(size_of(weight)) + ", stride " + pair(w.stride_h, w.stride_w) + ", padding " +
         pair(w.padding_h, w.padding_w) + ", dilation " + pair(w.dilation_h, w.dilation_w);
}

// The first way is the library's: it is taken where the autotuner is off, has no choice, or nothing may be measured now.
inline ConvolutionResult convolution_and_statistics(const std::function<ConvolutionResult()>& by_library,
                                                    const Tensor& input, const Tensor& weight, const Shape& output,
                                                    const Window& window, int64_t groups, const Device& device) {
  Autotuner& tuner = autotuner();
  if (!tuner.enabled()) return by_library();
  std::vector<ConvolutionWay> ways{{"library", by_library}};
  add_fused_convolutions(ways, input, weight, output, window, groups, device);
  if (ways.size() == 1) return by_library();
  std::vector<std::string> names;
  for (const ConvolutionWay& way : ways) names.push_back(way.name);
  const std::string what = describe_convolution(input, weight, window);
  if (const auto way = tuner.remembered(what, names)) return ways[*way].run();
  if (cuda::is_capturing(device.stream())) return by_library();
  const size_t best = tuner.measure(
      what, names, [&](size_t way) { return cuda::seconds_of([&] { ways[way].run(); }, device.stream()); });
  return ways[best].run();
}

}  // namespace layerwise
