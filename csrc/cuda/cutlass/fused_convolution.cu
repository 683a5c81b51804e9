// Choice of the kernel, and what all of them need of a convolution beyond what CUTLASS itself checks.
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace layerwise::cuda {
namespace {

const FusedKernel* const kKernels[] = {&kTile128x64,      &kTile128x64Pair, &kTile128x128,
                                       &kTile128x128Pair, &kTile64x128,     &kTile64x64};
constexpr int kCount = sizeof(kKernels) / sizeof(kKernels[0]);
constexpr int64_t kMostStride = 8;  // of a descriptor of im2col

// Offsets and counts of elements are int in CUTLASS.
bool fits(const Shape& s) {
  for (const int64_t extent : {s.n, s.c, s.h, s.w})
    if (extent < 1 || extent > INT32_MAX) return false;
  return static_cast<double>(s.n) * static_cast<double>(s.c) * static_cast<double>(s.h) * static_cast<double>(s.w) <=
         INT32_MAX;
}

bool matches(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  for (const int64_t v : {kernel, stride, padding + 1, dilation})
    if (v < 1 || v > UINT8_MAX + 1) return false;
  const int64_t extent = input + 2 * padding - dilation * (kernel - 1) - 1;
  return stride <= kMostStride && extent >= 0 && output == extent / stride + 1;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

int fused_convolution_count() { return kCount; }

const char* fused_convolution_name(int kernel) { return kKernels[kernel]->name; }

bool fused_convolution_runs_here() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

FusedConvolutionPlan plan_fused_convolution(int kernel, const FusedConvolution& p) {
  const Shape &x = p.input, &z = p.output;
  const Window& w = p.window;
  const bool possible = (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && fits(x) && fits(z) &&
                        x.n == z.n && matches(x.h, z.h, w.kernel_h, w.stride_h, w.padding_h, w.dilation_h) &&
                        matches(x.w, z.w, w.kernel_w, w.stride_w, w.padding_w, w.dilation_w) &&
                        fits({z.c, x.c, w.kernel_h, w.kernel_w});
  return possible ? kKernels[kernel]->plan(p) : FusedConvolutionPlan{};
}

void fused_convolution(int kernel, const FusedConvolution& p, Stream stream) {
  const std::string name = fused_convolution_name(kernel);
  if (!plan_fused_convolution(kernel, p).possible || !aligned(p.x) || !aligned(p.w) || !aligned(p.z))
    throw std::runtime_error(name + ": not made for this convolution");
  try {
    kKernels[kernel]->run(p, stream);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(name + ": " + error.what());
  }
}

}  // namespace layerwise::cuda
