// Fixed-width vectors from the compiler's vector extension, and loads and stores that convert to the compute type.
//
// The width follows the instruction set that this header is compiled for, so every name lives in a namespace of that
// instruction set.  Nothing from the standard library with external linkage is used here: see device/macros.h.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../device/macros.h"

namespace layerwise::cpu::LAYERWISE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class T, int kCount>
struct VectorType {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <class T, int kCount>
using Vector = typename VectorType<T, kCount>::type;

// Compute vector: float for float32 and bfloat16 storage, double for float64.
template <class A>
using Vec = Vector<A, kLanes<A>>;

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

template <class A>
LAYERWISE_INLINE Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

// -- Conversions ------------------------------------------------------------------------------------------------

using Half16 = Vector<uint16_t, kLanes<float>>;
using Bits32 = Vector<uint32_t, kLanes<float>>;

LAYERWISE_INLINE Vec<float> widen(Half16 h) { return (Vec<float>)(__builtin_convertvector(h, Bits32) << 16); }

// Round to nearest even; NaN stays NaN.
LAYERWISE_INLINE Half16 narrow(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (Half16)_mm512_cvtneps_pbh((__m512)v);
#else
  const Bits32 bits = (Bits32)v;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 quiet_nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet_nan, Half16);
#endif
}

// -- Whole vectors: no alignment is assumed --------------------------------------------------------------------------

template <class V>
LAYERWISE_INLINE V load_bits(const void* source) {
  V v;
  __builtin_memcpy(&v, source, sizeof(V));
  return v;
}

LAYERWISE_INLINE Vec<float> load(const float* source) { return load_bits<Vec<float>>(source); }
LAYERWISE_INLINE Vec<double> load(const double* source) { return load_bits<Vec<double>>(source); }
LAYERWISE_INLINE Vec<float> load(const BFloat16* source) { return widen(load_bits<Half16>(source)); }

LAYERWISE_INLINE void store(float* target, Vec<float> v) { __builtin_memcpy(target, &v, sizeof v); }
LAYERWISE_INLINE void store(double* target, Vec<double> v) { __builtin_memcpy(target, &v, sizeof v); }
LAYERWISE_INLINE void store(BFloat16* target, Vec<float> v) {
  const Half16 h = narrow(v);
  __builtin_memcpy(target, &h, sizeof h);
}

// -- The first `count` lanes, 0 < count < lanes: the others load as zero and are not stored ---------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
LAYERWISE_INLINE Vec<float> load(const float* source, int count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), source);
}
LAYERWISE_INLINE Vec<double> load(const double* source, int count) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), source);
}
LAYERWISE_INLINE Vec<float> load(const BFloat16* source, int count) {
  return widen((Half16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), source));
}
LAYERWISE_INLINE void store(float* target, Vec<float> v, int count) {
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
LAYERWISE_INLINE void store(double* target, Vec<double> v, int count) {
  _mm512_mask_storeu_pd(target, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
}
LAYERWISE_INLINE void store(BFloat16* target, Vec<float> v, int count) {
  _mm256_mask_storeu_epi16(target, static_cast<__mmask16>((1u << count) - 1), (__m256i)narrow(v));
}
#else
template <class V, class T>
LAYERWISE_INLINE V load_lanes(const T* source, int count) {
  T buffer[sizeof(V) / sizeof(T)] = {};
  for (int i = 0; i < count; ++i) buffer[i] = source[i];
  return load_bits<V>(buffer);
}
template <class T, class V>
LAYERWISE_INLINE void store_lanes(T* target, V v, int count) {
  T buffer[sizeof(V) / sizeof(T)];
  __builtin_memcpy(buffer, &v, sizeof v);
  for (int i = 0; i < count; ++i) target[i] = buffer[i];
}
LAYERWISE_INLINE Vec<float> load(const float* source, int count) { return load_lanes<Vec<float>>(source, count); }
LAYERWISE_INLINE Vec<double> load(const double* source, int count) { return load_lanes<Vec<double>>(source, count); }
LAYERWISE_INLINE Vec<float> load(const BFloat16* source, int count) {
  return widen(load_lanes<Half16>(source, count));
}
LAYERWISE_INLINE void store(float* target, Vec<float> v, int count) { store_lanes(target, v, count); }
LAYERWISE_INLINE void store(double* target, Vec<double> v, int count) { store_lanes(target, v, count); }
LAYERWISE_INLINE void store(BFloat16* target, Vec<float> v, int count) {
  store_lanes(reinterpret_cast<uint16_t*>(target), narrow(v), count);
}
#endif

// Access to a whole vector, or to the tail of a row, behind one name.
struct Whole {
  template <class T>
  __attribute__((always_inline)) auto get(const T* source) const {
    return load(source);
  }
  template <class T, class V>
  __attribute__((always_inline)) void put(T* target, V v) const {
    store(target, v);
  }
  template <class V>
  __attribute__((always_inline)) V keep(V v) const {
    return v;
  }
};
struct Tail {
  int count;
  template <class T>
  __attribute__((always_inline)) auto get(const T* source) const {
    return load(source, count);
  }
  template <class T, class V>
  __attribute__((always_inline)) void put(T* target, V v) const {
    store(target, v, count);
  }
  // Zero in the lanes beyond the tail.
  template <class V>
  __attribute__((always_inline)) V keep(V v) const {
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) v[i] = i < count ? v[i] : 0;
    return v;
  }
};

// One value for all lanes.
template <class A>
struct Broadcast {
  __attribute__((always_inline)) Vec<A> get(const A* source) const { return broadcast(*source); }
};

// Runs body(offset, access) over `size` contiguous elements: whole vectors first, then the tail.
template <class A, class Body>
LAYERWISE_INLINE void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>) body(i, Whole{});
  if (i < size) body(i, Tail{static_cast<int>(size - i)});
}

template <class A>
LAYERWISE_INLINE A horizontal_sum(Vec<A> v) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

}  // namespace layerwise::cpu::LAYERWISE_ISA
