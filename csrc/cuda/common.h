// What the CUDA kernels share: element types, 16-byte accesses, and how threads are laid over a map.
//
// A warp is `lanes` threads across channels (V neighbouring ones each) by 32 / lanes threads across pixels.  Where the
// channels are not next to each other in memory (contiguous maps), lanes is 1 and the whole warp runs over pixels.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../device/activation.h"
#include "../device/cells.h"
#include "kernels.h"
#include "platform.h"

namespace layerwise::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// -- Elements ------------------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

LAYERWISE_INLINE float widen(float v) { return v; }
LAYERWISE_INLINE double widen(double v) { return v; }
LAYERWISE_INLINE float widen(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
LAYERWISE_INLINE void narrow(float v, float& t) { t = v; }
LAYERWISE_INLINE void narrow(double v, double& t) { t = v; }
#if defined(LAYERWISE_SIMT)
LAYERWISE_INLINE float widen(Float16 v) { return simt::from_half(v.bits); }
LAYERWISE_INLINE void narrow(float v, Float16& t) { t.bits = simt::to_half(v); }
LAYERWISE_INLINE void narrow(float v, BFloat16& t) { t.bits = simt::to_bfloat16(v); }
#else
LAYERWISE_INLINE float widen(Float16 v) { return __half2float(__ushort_as_half(v.bits)); }
LAYERWISE_INLINE void narrow(float v, Float16& t) { t.bits = __half_as_ushort(__float2half_rn(v)); }
LAYERWISE_INLINE void narrow(float v, BFloat16& t) { t.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
#endif

template <class T, int V>
struct alignas(sizeof(T) * V) Packed {
  T values[V];
};

// V elements by one access; `source` is aligned to all of them.
template <int V, class T>
LAYERWISE_INLINE void load(const T* source, Compute<T> (&values)[V]) {
  const Packed<T, V> packed = *reinterpret_cast<const Packed<T, V>*>(source);
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = widen(packed.values[v]);
}
template <int V, class T>
LAYERWISE_INLINE void store(T* target, const Compute<T> (&values)[V]) {
  Packed<T, V> packed;
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(values[v], packed.values[v]);
  *reinterpret_cast<Packed<T, V>*>(target) = packed;
}

// -- Threads over channels and pixels ------------------------------------------------------------------------------------

// How many lanes of a warp lie across channels, and how many pieces of so many channels there are.
struct ChannelSplit {
  int lanes;
  int64_t chunks;
};
inline ChannelSplit split_channels(int64_t channels, int v, Layout layout) {
  if (layout == Layout::kContiguous) return {1, channels};
  const int64_t vectors = channels / v;
  int lanes = 1;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  return {lanes, (vectors + lanes - 1) / lanes};
}

struct Lane {
  int x, row;  // across channels, across pixels
  int rows;    // 32 / lanes
};
LAYERWISE_INLINE Lane lane_of(int thread, int lanes) {
  const int lane = thread % kWarp;
  return {lane % lanes, lane / lanes, kWarp / lanes};
}

// Sum over the lanes of a warp that have the same channels; all of them get it.
template <class A>
LAYERWISE_DEVICE A sum_over_rows(A value, int lanes) {
  for (int offset = lanes; offset < kWarp; offset *= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Walks pixels `step` apart, row by row, over the columns [w_begin, w_end).
struct PixelWalk {
  int64_t h, w, w_begin, w_end, step_h, step_w;

  LAYERWISE_MEMBER PixelWalk(int64_t first, int64_t step, int64_t h_begin, int64_t w_begin_, int64_t w_end_)
      : w_begin(w_begin_), w_end(w_end_) {
    const int64_t width = w_end - w_begin;
    h = h_begin + first / width;
    w = w_begin + first % width;
    step_h = step / width;
    step_w = step % width;
  }
  LAYERWISE_MEMBER void next() {
    h += step_h;
    w += step_w;
    if (w >= w_end) {
      w -= w_end - w_begin;
      ++h;
    }
  }
};

// Offset of an element in the index type I, which the launcher picks by the size of the tensor.
template <class I>
LAYERWISE_INLINE I offset_of(const Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<I>(n) * static_cast<I>(s.n) + static_cast<I>(c) * static_cast<I>(s.c) +
         static_cast<I>(h) * static_cast<I>(s.h) + static_cast<I>(w) * static_cast<I>(s.w);
}

// -- Per-channel values ----------------------------------------------------------------------------------------------------

// With the centred t = z - mean, u = gamma*rstd * t + beta; a mean much larger than the deviation does not cancel.  Sums
// over xhat are taken over t and scaled by rstd at their end.
template <class A, int V>
struct Coefficients {
  A mean[V], rstd[V], scale[V], beta[V];

  LAYERWISE_MEMBER Coefficients(const Norm& p, int64_t c) {
    const A *means = static_cast<const A*>(p.mean), *vars = static_cast<const A*>(p.var);
    const A *weights = static_cast<const A*>(p.weight), *biases = static_cast<const A*>(p.bias);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] = means[c + v];
      rstd[v] = A(1) / std::sqrt(vars[c + v] + static_cast<A>(p.eps));
      scale[v] = (weights == nullptr ? A(1) : weights[c + v]) * rstd[v];
      beta[v] = biases == nullptr ? A(0) : biases[c + v];
    }
  }
  LAYERWISE_MEMBER A u(int v, A t) const { return scale[v] * t + beta[v]; }
};

// Which of the two is the same for all threads, so that the branch costs less than twice the kernels would.
template <class A>
LAYERWISE_INLINE Activated<A> activated(const Activation& activation, A u) {
  const A negative_slope = static_cast<A>(activation.negative_slope);
  return activation.relu ? activate<true>(u, negative_slope) : activate<false>(u, negative_slope);
}

// Strides of m1, [N, C, bins_h, bins_w], and of what is laid out as it.
LAYERWISE_INLINE Strides moment_strides(const Map& map, int64_t bins_h, int64_t bins_w) {
  const int64_t c = map.shape.c;
  if (map.layout == Layout::kChannelsLast) return {bins_h * bins_w * c, 1, bins_w * c, c};
  return {c * bins_h * bins_w, bins_h * bins_w, bins_w, 1};
}

// -- Choice of an instance -------------------------------------------------------------------------------------------------

template <class Body>
void with_bool(bool value, const Body& body) {
  value ? body.template operator()<true>() : body.template operator()<false>();
}

// One map of a launch and its strides.
struct Access {
  const void* data;
  Strides strides;
};

// Whether 16-byte accesses over the channels are possible.
inline bool aligned(const Map& map, int element_size, const Access& a) {
  const int64_t v = 16 / element_size;
  return a.data == nullptr ||
         (a.strides.c == 1 && reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && a.strides.n % v == 0 &&
          a.strides.h % v == 0 && a.strides.w % v == 0 && map.shape.c % v == 0);
}

inline bool needs_64_bits(const Map& map, const Access& a) {
  const Shape& s = map.shape;
  const int64_t last =
      (s.n - 1) * a.strides.n + (s.c - 1) * a.strides.c + (s.h - 1) * a.strides.h + (s.w - 1) * a.strides.w;
  return last > INT32_MAX - 64;
}

// Calls body<T, I, V>() for the element type of the map, the index type that its size needs, and the widest access that
// all of the maps allow.
template <class Body, class... Accesses>
void with_instance(const Map& map, const Body& body, const Accesses&... accesses) {
  const bool wide = (needs_64_bits(map, accesses) || ...);
  const auto choose = [&]<class T>() {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const bool vectors = map.layout == Layout::kChannelsLast && (aligned(map, sizeof(T), accesses) && ...);
    with_bool(wide, [&]<bool kWide>() {
      using I = std::conditional_t<kWide, int64_t, int32_t>;
      vectors ? body.template operator()<T, I, kVector>() : body.template operator()<T, I, 1>();
    });
  };
  switch (map.dtype) {
    case DType::kFloat32:
      return choose.template operator()<float>();
    case DType::kBFloat16:
      return choose.template operator()<BFloat16>();
    case DType::kFloat16:
      return choose.template operator()<Float16>();
    case DType::kFloat64:
      return choose.template operator()<double>();
  }
}

}  // namespace layerwise::cuda
