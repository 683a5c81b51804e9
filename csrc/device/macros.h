// Function qualifiers shared by host and device code.
#pragma once

// Internal linkage and forced inlining: these headers are compiled once per instruction set, and a merged
// out-of-line copy built for a newer one would crash an older machine.
#if defined(__CUDACC__)
#define LAYERWISE_INLINE static __host__ __device__ __forceinline__
#define LAYERWISE_MEMBER __host__ __device__ __forceinline__
// For what only threads of a device can do.
#define LAYERWISE_DEVICE static __device__ __forceinline__
#define LAYERWISE_DEVICE_MEMBER __device__ __forceinline__
#else
#define LAYERWISE_INLINE static inline __attribute__((always_inline))
#define LAYERWISE_MEMBER inline __attribute__((always_inline))
#define LAYERWISE_DEVICE LAYERWISE_INLINE
#define LAYERWISE_DEVICE_MEMBER LAYERWISE_MEMBER
#endif
