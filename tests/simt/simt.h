// Runs CUDA kernels on the host, thread by thread, so that they can be tested and sanitised without a GPU.
//
// Each thread of a block is a fiber.  Fibers run in random order until they wait at a barrier or at a warp collective,
// finish, or all wait for something that cannot happen, which is an error: a lane that a mask names but that never
// comes, threads at different barriers.  Shared memory is filled with NaN before a block starts and fenced, so that
// reading what no thread has written yet shows in the result, and writing past the end is an error.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

namespace simt {

struct Index {
  unsigned x;
};

// Of the fiber that is running.
Index thread_index();
Index block_index();

// Runs body() once for each thread of each block.  Throws std::runtime_error for what no GPU would do.
void run(int64_t blocks, int threads, const std::function<void()>& body);

void barrier(int line);
// The 64 bits that the lane `lane ^ offset` of the same warp brings.
uint64_t exchange(unsigned mask, uint64_t bits, int offset, int line);
// Ends the launch with an error.
void fail(const char* what, int line);
// The shared array that stands at `line` of the kernel.
void* shared(size_t bytes, int line);

template <class T>
T shuffle_xor(unsigned mask, T value, int offset, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, offset, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_half(uint16_t bits) { return std::bit_cast<_Float16>(bits); }
inline uint16_t to_half(float v) { return std::bit_cast<uint16_t>(static_cast<_Float16>(v)); }
inline uint16_t to_bfloat16(float v) {  // to nearest even; NaN stays NaN
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if (v != v) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace simt

// -- CUDA's own names, as far as the kernels use them ----------------------------------------------------------------------

#define __global__
#define __launch_bounds__(...)
#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define __syncthreads() (::simt::barrier(__LINE__))
#define __shfl_xor_sync(mask, value, offset) (::simt::shuffle_xor(mask, value, offset, __LINE__))
#define LAYERWISE_REQUIRE(condition, what) \
  if (!(condition)) ::simt::fail(what, __LINE__)
#define LAYERWISE_SHARED(type, name, count) \
  type* const name = static_cast<type*>(::simt::shared(sizeof(type) * (count), __LINE__))

namespace layerwise::cuda {

template <class A>
A rsqrt(A v) {
  return A(1) / std::sqrt(v);
}
inline int multiprocessors() { return 4; }

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void*,
            std::type_identity_t<Parameters>... arguments) {
  simt::run(blocks, threads, [&] { kernel(arguments...); });
}

}  // namespace layerwise::cuda
