// Function qualifiers shared by host and device code.
#pragma once

// Internal linkage and forced inlining: these headers are compiled once per instruction set, and a merged
// out-of-line copy built for a newer one would crash an older machine.
#if defined(__CUDACC__)
#define LAYERWISE_INLINE static __host__ __device__ __forceinline__
#else
#define LAYERWISE_INLINE static inline __attribute__((always_inline))
#endif
