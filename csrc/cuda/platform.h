// What the kernels need of CUDA, and the one place that launches them.  tests/simt stands in for it without a GPU.
#pragma once

#include <cstdint>

#if defined(LAYERWISE_SIMT)
#include "simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

// Ends the program of the device, as PyTorch's own kernels do.
#define LAYERWISE_REQUIRE(condition, what) \
  if (!(condition)) __assert_fail(what, __FILE__, __LINE__, __func__)
// Shared memory of a block.
#define LAYERWISE_SHARED(type, name, count) __shared__ type name[count]

namespace layerwise::cuda {

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    throw std::runtime_error("CUDA: the device cannot be asked for its number of multiprocessors");
  return count;
}

// Threads of one dimension; stream is a cudaStream_t.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            std::type_identity_t<Parameters>... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error("too many blocks for a CUDA grid: " + std::to_string(blocks));
  void* pointers[] = {&arguments...};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)), pointers, 0, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA kernel launch: ") + cudaGetErrorString(error));
}

}  // namespace layerwise::cuda

#endif
