// The device and the stream that an operator's kernels run on.  With LAYERWISE_SIMT they run on the host, for tests.
#pragma once

#include <torch/csrc/stable/library.h>

#if !defined(LAYERWISE_SIMT)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "cuda/kernels.h"
#include "maps.h"

// Opens the block that registers operators.
#if defined(LAYERWISE_SIMT)
#define LAYERWISE_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(layerwise_simt, CPU, m)
#else
#define LAYERWISE_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(layerwise_ext, CUDA, m)
#endif

namespace layerwise {

// Whether kernels may read it by 16 bytes.
inline bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

#if defined(LAYERWISE_SIMT)
struct Device {
  explicit Device(const Tensor&) {}
  cuda::Stream stream() const { return nullptr; }
};
#else
// The stream that torch runs on.  The function lives in torch's CUDA library, which is not linked, so that a torch without
// CUDA loads this one, too; there is no CUDA tensor without it having been loaded.
inline cuda::Stream current_stream(int32_t device_index) {
  using Function = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(
        dlsym(library == nullptr ? RTLD_DEFAULT : library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no aoti_torch_get_current_cuda_stream: is it built with CUDA?");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device_index, &stream));
  return stream;
}

// Makes a tensor's device the current one for as long as it lives.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  cuda::Stream stream() const { return current_stream(index_); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

}  // namespace layerwise
