// Stands for CUTLASS's convolutions, which the simulator cannot run: the same contract in plain loops, so that what
// surrounds them is tested.  And the switches of the autotuner, which the simulator has to itself.
#include "../../csrc/cuda/fused_convolution.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../../csrc/autotune.h"
#include "simt.h"

namespace layerwise::cuda {
namespace {

constexpr const char* kNames[] = {"stand-in of 128 pixels", "stand-in of 64 pixels", "stand-in that fails"};
constexpr int64_t kTileRows[] = {128, 64, 128};
std::atomic<int> runs[3];
std::atomic<bool> may_fail{false};  // whether the third takes part

float load(const void* map, int64_t at, DType dtype) {
  const uint16_t bits = static_cast<const uint16_t*>(map)[at];
  if (dtype == DType::kFloat16) return simt::from_half(bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

float convolve(const FusedConvolution& p, int64_t n, int64_t k, int64_t row, int64_t column) {
  const Shape& in = p.input;
  const Window& w = p.window;
  float sum = 0;
  for (int64_t i = 0; i < w.kernel_h; ++i) {
    for (int64_t j = 0; j < w.kernel_w; ++j) {
      const int64_t h = row * w.stride_h - w.padding_h + i * w.dilation_h;
      const int64_t x = column * w.stride_w - w.padding_w + j * w.dilation_w;
      if (h < 0 || h >= in.h || x < 0 || x >= in.w) continue;
      for (int64_t c = 0; c < in.c; ++c)
        sum += load(p.x, ((n * in.h + h) * in.w + x) * in.c + c, p.dtype) *
               load(p.w, ((k * w.kernel_h + i) * w.kernel_w + j) * in.c + c, p.dtype);
    }
  }
  return sum;
}

}  // namespace

int fused_convolution_count() { return 3; }
const char* fused_convolution_name(int kernel) { return kNames[kernel]; }
bool fused_convolution_runs_here() { return true; }

FusedConvolutionPlan plan_fused_convolution(int kernel, const FusedConvolution& p) {
  if (p.input.c % 8 != 0 || p.output.c % 8 != 0 || (kernel == 2 && !may_fail)) return {};
  const int64_t rows = p.output.n * p.output.h * p.output.w, tile = kTileRows[kernel];
  return {true, (rows + tile - 1) / tile, tile, (p.output.c + 63) / 64 * 64};
}

void fused_convolution(int kernel, const FusedConvolution& p, Stream) {
  ++runs[kernel];
  if (kernel == 2) throw std::runtime_error("the stand-in fails");
  const FusedConvolutionPlan plan = plan_fused_convolution(kernel, p);
  const Shape& out = p.output;
  // What no tile writes stays NaN.
  std::memset(p.tile_sums, 0xff, plan.tiles * plan.row_stride * sizeof(float));
  std::memset(p.tile_squares, 0xff, plan.tiles * plan.row_stride * sizeof(float));
  for (int64_t row = 0; row < out.n * out.h * out.w; ++row) {
    for (int64_t k = 0; k < out.c; ++k) {
      const float value = convolve(p, row / out.w / out.h, k, row / out.w % out.h, row % out.w);
      static_cast<uint16_t*>(p.z)[row * out.c + k] =
          p.dtype == DType::kFloat16 ? simt::to_half(value) : simt::to_bfloat16(value);
      const int64_t at = row / plan.tile_rows * plan.row_stride + k;
      const bool begins = row % plan.tile_rows == 0;
      p.tile_sums[at] = value + (begins ? 0 : p.tile_sums[at]);
      p.tile_squares[at] = value * value + (begins ? 0 : p.tile_squares[at]);
    }
  }
}

}  // namespace layerwise::cuda

// For ctypes.
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void simt_autotune(bool enabled) { layerwise::autotuner().set_enabled(enabled); }
EXPORTED void simt_let_fail(bool value) { layerwise::cuda::may_fail = value; }
EXPORTED int simt_fused_runs(int kernel) { return layerwise::cuda::runs[kernel]; }
// All choices become this one; returns how many there are.
EXPORTED int simt_choose(const char* way) {
  auto choices = layerwise::autotuner().choices();
  for (auto& [what, choice] : choices) choice = way;
  layerwise::autotuner().set_choices(choices);
  return static_cast<int>(choices.size());
}
EXPORTED void simt_forget() { layerwise::autotuner().set_choices({}); }
// The first choice, as "what: way".
EXPORTED void simt_choice(char* text, int size) {
  const auto choices = layerwise::autotuner().choices();
  const std::string line = choices.empty() ? "" : choices.begin()->first + ": " + choices.begin()->second;
  std::strncpy(text, line.c_str(), size - 1);
}
