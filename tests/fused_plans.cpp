// What CUTLASS's convolutions say they can do, which needs no device: prints "correct", or what is wrong.
#include <cstdio>
#include <stdexcept>
#include <string>

#include "cuda/fused_convolution.h"

namespace {

using namespace layerwise;
using namespace layerwise::cuda;

struct Case {
  const char* name;
  bool possible;
  FusedConvolution p;
};

FusedConvolution convolution(DType dtype, int64_t n, int64_t c_in, int64_t c_out, int64_t size, int64_t kernel,
                             int64_t stride = 1, int64_t padding = 0, int64_t dilation = 1) {
  const int64_t out = (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  FusedConvolution p{};
  p.dtype = dtype;
  p.input = {n, c_in, size, size};
  p.output = {n, c_out, out, out};
  p.window = {kernel, kernel, stride, stride, padding, padding, dilation, dilation};
  return p;
}

}  // namespace

int main() {
  FusedConvolution mismatch = convolution(DType::kBFloat16, 2, 64, 64, 8, 3, 1, 1);
  mismatch.output.h = 7;
  const Case cases[] = {
      {"3x3", true, convolution(DType::kBFloat16, 128, 64, 64, 32, 3, 1, 1)},
      {"float16, 512 channels of 7x7", true, convolution(DType::kFloat16, 64, 512, 512, 7, 3, 1, 1)},
      {"1x1 with stride", true, convolution(DType::kBFloat16, 3, 64, 128, 57, 1, 2)},
      {"dilated, no whole tiles", true, convolution(DType::kFloat16, 1, 8, 72, 9, 3, 1, 2, 2)},
      {"7x7, stride 2", true, convolution(DType::kBFloat16, 8, 8, 64, 224, 7, 2, 3)},
      {"float32", false, convolution(DType::kFloat32, 2, 64, 64, 8, 3, 1, 1)},
      {"3 channels", false, convolution(DType::kBFloat16, 2, 3, 64, 8, 3, 1, 1)},
      {"12 output channels", false, convolution(DType::kBFloat16, 2, 64, 12, 8, 3, 1, 1)},
      {"no samples", false, convolution(DType::kBFloat16, 0, 64, 64, 8, 3, 1, 1)},
      {"stride 9", false, convolution(DType::kBFloat16, 2, 64, 64, 32, 3, 9)},
      {"much padding", false, convolution(DType::kBFloat16, 2, 64, 64, 8, 3, 1, 200)},
      {"more than 2**31 elements", false, convolution(DType::kBFloat16, 1 << 14, 64, 64, 64, 3, 1, 1)},
      {"another output", false, mismatch},
  };
  for (int kernel = 0; kernel < fused_convolution_count(); ++kernel) {
    for (const Case& k : cases) {
      const FusedConvolutionPlan plan = plan_fused_convolution(kernel, k.p);
      const int64_t pixels = k.p.output.n * k.p.output.h * k.p.output.w;
      const bool tiled = plan.tile_rows > 0 && plan.tiles == (pixels + plan.tile_rows - 1) / plan.tile_rows &&
                         plan.row_stride >= k.p.output.c && plan.row_stride < k.p.output.c + 128;
      if (plan.possible != k.possible || (k.possible && !tiled)) {
        std::printf("%s, %s: possible %d, %ld tiles of %ld, %ld floats\n", fused_convolution_name(kernel), k.name,
                    plan.possible, static_cast<long>(plan.tiles), static_cast<long>(plan.tile_rows),
                    static_cast<long>(plan.row_stride));
        return 1;
      }
    }
    try {
      fused_convolution(kernel, mismatch, nullptr);
      return std::puts("the wrong output shape was accepted"), 1;
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()).find(fused_convolution_name(kernel)) != 0) return std::puts(error.what()), 1;
    }
  }
  std::printf("%d kernels correct\n", fused_convolution_count());
}
