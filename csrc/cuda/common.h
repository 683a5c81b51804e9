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

template <int V, class T>
LAYERWISE_INLINE void widen_all(const Packed<T, V>& packed, Compute<T> (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = widen(packed.values[v]);
}

// V elements by one access; `source` is aligned to all of them.
template <int V, class T>
LAYERWISE_INLINE void load(const T* source, Compute<T> (&values)[V]) {
  widen_all(*reinterpret_cast<const Packed<T, V>*>(source), values);
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
template <class I>
struct PixelWalk {
  I h, w, w_begin, w_end, step_h, step_w;

  LAYERWISE_MEMBER PixelWalk(I first, I step, I h_begin, I w_begin_, I w_end_) : w_begin(w_begin_), w_end(w_end_) {
    const I width = w_end - w_begin;
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

// Loads of a thread that are under way at once.  The memory answers after some 700 ns, in which it could have brought
// 25 KB to each multiprocessor; 512 threads, what the registers of these kernels leave room for, ask for 32 KB by four
// accesses of 16 bytes.
constexpr int kAhead = 4;

// A map to read, and where a pixel of a walk lies in it.
template <class T, class Offset>
struct Source {
  const T* data;
  Offset offset;
};
template <class T, class Offset>
Source(const T*, Offset) -> Source<T, Offset>;

// use(values, walk) for `count` pixels of a walk; values[m] are the V of map m, loaded up to kAhead pixels ahead of their
// use.
template <int V, int kAhead = layerwise::cuda::kAhead, class T, class I, class Use, class... Offsets>
LAYERWISE_DEVICE void for_each_pixel(PixelWalk<I> walk, I count, const Use& use, const Source<T, Offsets>&... sources) {
  constexpr int kMaps = sizeof...(sources);
  PixelWalk<I> ahead = walk;
  for (I i = 0; i < count; i += kAhead) {
    Packed<T, V> loaded[kAhead][kMaps];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= count) break;
      int m = 0;
      ((loaded[k][m++] = *reinterpret_cast<const Packed<T, V>*>(sources.data + sources.offset(ahead))), ...);
      ahead.next();
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= count) break;
      Compute<T> values[kMaps][V];
#pragma unroll
      for (int m = 0; m < kMaps; ++m) widen_all(loaded[k][m], values[m]);
      use(values, walk);
      walk.next();
    }
  }
}

// How many of `count` pixels a thread takes that begins with `first` and goes on in steps.
template <class I>
LAYERWISE_INLINE I share_of(I first, I step, I count) {
  return first < count ? (count - first + step - 1) / step : I(0);
}

// Offset of an element in the index type I, which the launcher picks by the size of the tensor.
template <class I>
LAYERWISE_INLINE I offset_of(const Strides& s, I n, I c, I h, I w) {
  return n * static_cast<I>(s.n) + c * static_cast<I>(s.c) + h * static_cast<I>(s.h) + w * static_cast<I>(s.w);
}

// Where the rows of all samples lie at equal distances they are one long row: no division per pixel then.
inline bool is_one_row(const Shape& s, const Strides& d) {
  return (s.h == 1 || d.h == s.w * d.w) && (s.n == 1 || d.n == s.h * s.w * d.w);
}
inline Shape one_row(const Shape& s) { return {1, s.c, 1, s.n * s.h * s.w}; }

// -- Per-channel values ----------------------------------------------------------------------------------------------------

// How blocks share the rows of a task, whatever those are.
struct Cut {
  int64_t rows, size, blocks;  // of all, of a block but for a shorter last one

  LAYERWISE_MEMBER int64_t begin(int64_t block) const { return block * size; }
  LAYERWISE_MEMBER int64_t end(int64_t block) const { return begin(block) + size < rows ? begin(block) + size : rows; }
};
inline Cut cut_rows(int64_t rows, int64_t wanted_size, int64_t most_blocks) {
  const int64_t least = (rows + most_blocks - 1) / most_blocks, size = wanted_size > least ? wanted_size : least;
  return {rows, size, (rows + size - 1) / size};
}

// With the centred t = z - mean, u = gamma*rstd * t + beta; a mean much larger than the deviation does not cancel.  Sums
// over xhat are taken over t and scaled by rstd at their end.
// V neighbouring values of an array of A, by accesses of 16 bytes.
template <int V, class A>
LAYERWISE_INLINE void load_values(const void* source, int64_t at, A (&values)[V]) {
  constexpr int kPart = V * static_cast<int>(sizeof(A)) < 16 ? V : 16 / static_cast<int>(sizeof(A));
  const A* from = static_cast<const A*>(source) + at;
#pragma unroll
  for (int v = 0; v < V; v += kPart) {
    const Packed<A, kPart> part = *reinterpret_cast<const Packed<A, kPart>*>(from + v);
#pragma unroll
    for (int k = 0; k < kPart; ++k) values[v + k] = part.values[k];
  }
}
template <int V, class A>
LAYERWISE_INLINE void load_values(const void* source, int64_t at, A absent, A (&values)[V]) {
  if (source != nullptr) return load_values(source, at, values);
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = absent;
}
template <int V, class A>
LAYERWISE_INLINE void store_values(A* target, const A (&values)[V]) {
  constexpr int kPart = V * static_cast<int>(sizeof(A)) < 16 ? V : 16 / static_cast<int>(sizeof(A));
#pragma unroll
  for (int v = 0; v < V; v += kPart) {
    Packed<A, kPart> part;
#pragma unroll
    for (int k = 0; k < kPart; ++k) part.values[k] = values[v + k];
    *reinterpret_cast<Packed<A, kPart>*>(target + v) = part;
  }
}

template <int V, class A>
LAYERWISE_DEVICE void load_rstd(const Norm& p, int64_t c, A (&rstd)[V]) {
  load_values(p.var, c, rstd);
#pragma unroll
  for (int v = 0; v < V; ++v) rstd[v] = rsqrt(rstd[v] + static_cast<A>(p.eps));
}

template <class A, int V>
struct Coefficients {
  A mean[V], scale[V], beta[V];

  LAYERWISE_DEVICE_MEMBER Coefficients(const Norm& p, int64_t c) {
    A rstd[V], weight[V];
    load_values(p.mean, c, mean);
    load_values(p.bias, c, A(0), beta);
    load_values(p.weight, c, A(1), weight);
    load_rstd(p, c, rstd);
#pragma unroll
    for (int v = 0; v < V; ++v) scale[v] = weight[v] * rstd[v];
  }
  LAYERWISE_MEMBER A u(int v, A t) const { return scale[v] * t + beta[v]; }
};

// Which of the two is the same for all threads, so that the branch costs less than twice the kernels would.
template <class A>
LAYERWISE_INLINE Activated<A> activated(const Activation& activation, A u) {
  const A negative_slope = static_cast<A>(activation.negative_slope);
  return activation.kind == ActivationKind::kReLU ? activate<true>(u, negative_slope)
                                                  : activate<false>(u, negative_slope);
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

// Whether accesses of v elements over the channels are possible.
inline bool aligned(const Map& map, int element_size, int v, const Access& a) {
  return a.data == nullptr ||
         (a.strides.c == 1 && reinterpret_cast<uintptr_t>(a.data) % (v * element_size) == 0 && a.strides.n % v == 0 &&
          a.strides.h % v == 0 && a.strides.w % v == 0 && map.shape.c % v == 0);
}

constexpr int64_t kMostOf32Bits = INT32_MAX - (1 << 20);  // a step of any walk ends below 2^31, too

// For offsets, and for numbers of elements, of which an expanded map has more than its memory.
inline bool needs_64_bits(const Map& map, const Access& a) {
  const Shape& s = map.shape;
  const int64_t last =
      (s.n - 1) * a.strides.n + (s.c - 1) * a.strides.c + (s.h - 1) * a.strides.h + (s.w - 1) * a.strides.w;
  return last > kMostOf32Bits || s.n * s.c * s.h * s.w > kMostOf32Bits;
}
inline bool cells_need_64_bits(const Map& map) { return map.shape.h > 32767 || map.shape.w > 32767; }

// Calls body<T, I, V>() for the element type of the map, an index type of 64 bits if it is wide or its size needs them,
// and the widest access that all of the maps allow.
template <class Body, class... Accesses>
void with_instance(const Map& map, bool wide, const Body& body, const Accesses&... accesses) {
  wide = wide || (needs_64_bits(map, accesses) || ...);
  const auto choose = [&]<class T>() {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const bool vectors = map.layout == Layout::kChannelsLast && (aligned(map, sizeof(T), kVector, accesses) && ...);
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
    case DType::kFloat64:  // for checks: one plain instance
      return body.template operator()<double, int64_t, 1>();
  }
}

}  // namespace layerwise::cuda
