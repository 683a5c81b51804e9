// Fixed-width vectors from the compiler's vector extension, and loads and stores that convert to the compute type.
//
// The width follows the instruction set that this header is compiled for, so every name lives in a namespace of that
// instruction set.  Nothing from the standard library with external linkage is used here: see device/macros.h.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
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

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class T, int kCount>
struct VectorType {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <class T, int kCount>
using Vector = typename VectorType<T, kCount>::type;

// Compute vector: float for float32, bfloat16 and float16 storage, double for float64.
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

// -- Storage types of 16 bits -----------------------------------------------------------------------------------------

using Bits16 = Vector<uint16_t, kLanes<float>>;
using Bits32 = Vector<uint32_t, kLanes<float>>;

// Both round to nearest even; NaN stays NaN.
struct BFloat16 {
  uint16_t bits;

  static LAYERWISE_MEMBER Vec<float> widen(Bits16 h) { return (Vec<float>)(__builtin_convertvector(h, Bits32) << 16); }

  static LAYERWISE_MEMBER Bits16 narrow(Vec<float> v) {
#if defined(__AVX512BF16__)
    return (Bits16)_mm512_cvtneps_pbh((__m512)v);
#else
    const Bits32 bits = (Bits32)v;
    const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits32 quiet_nan = (bits >> 16) | 0x40;
    return __builtin_convertvector(v == v ? rounded : quiet_nan, Bits16);
#endif
  }
};

struct Float16 {
  uint16_t bits;

#if defined(__AVX512F__)
  static LAYERWISE_MEMBER Vec<float> widen(Bits16 h) { return (Vec<float>)_mm512_cvtph_ps((__m256i)h); }
  static LAYERWISE_MEMBER Bits16 narrow(Vec<float> v) {
    return (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(__F16C__)
  static LAYERWISE_MEMBER Vec<float> widen(Bits16 h) { return (Vec<float>)_mm256_cvtph_ps((__m128i)h); }
  static LAYERWISE_MEMBER Bits16 narrow(Vec<float> v) {
    return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#else
  // The exponent's bias is 15 instead of 127, the fraction has 10 bits instead of 23.
  static constexpr uint32_t kBias = (127 - 15) << 23;

  static LAYERWISE_MEMBER Vec<float> widen(Bits16 h) {
    const Bits32 bits = __builtin_convertvector(h, Bits32), size = (bits & 0x7fff) << 13;
    const Bits32 exponent = size & (0x1f << 23), least = size + kBias + (1 << 23);
    // Below the least exponent the fraction has no leading one: it is added and, as a number, taken away again.
    const Bits32 subnormal = (Bits32)((Vec<float>)least - (Vec<float>)(Bits32{} + kBias + (1 << 23)));
    const Bits32 infinite_or_nan = size + 2 * kBias;
    const Bits32 normal = exponent == (0x1f << 23) ? infinite_or_nan : size + kBias;
    return (Vec<float>)((exponent == 0 ? subnormal : normal) | (bits & 0x8000) << 16);
  }

  static LAYERWISE_MEMBER Bits16 narrow(Vec<float> v) {
    const Bits32 bits = (Bits32)v, size = bits & 0x7fffffff;
    // The sum with a number whose last bit is float16's last one is rounded there.
    const Bits32 magic = Bits32{} + kBias + (14 << 23);
    const Bits32 subnormal = (Bits32)((Vec<float>)size + (Vec<float>)magic) - magic;
    const Bits32 normal = (size - kBias + 0xfff + ((size >> 13) & 1)) >> 13;
    const Bits32 infinite_or_nan = size > 0x7f800000 ? Bits32{} + 0x7e00 : Bits32{} + 0x7c00;
    const Bits32 finite = size < kBias + (1 << 23) ? subnormal : normal;
    const Bits32 rounded = size < kBias + (0x1f << 23) ? finite : infinite_or_nan;
    return __builtin_convertvector(rounded | (bits >> 16 & 0x8000), Bits16);
  }
#endif
};

template <class T>
concept Stored16 = sizeof(T) == 2;

// -- Whole vectors: no alignment is assumed --------------------------------------------------------------------------

template <class V>
LAYERWISE_INLINE V load_bits(const void* source) {
  V v;
  __builtin_memcpy(&v, source, sizeof(V));
  return v;
}

LAYERWISE_INLINE Vec<float> load(const float* source) { return load_bits<Vec<float>>(source); }
LAYERWISE_INLINE Vec<double> load(const double* source) { return load_bits<Vec<double>>(source); }
template <Stored16 T>
LAYERWISE_INLINE Vec<float> load(const T* source) {
  return T::widen(load_bits<Bits16>(source));
}

LAYERWISE_INLINE void store(float* target, Vec<float> v) { __builtin_memcpy(target, &v, sizeof v); }
LAYERWISE_INLINE void store(double* target, Vec<double> v) { __builtin_memcpy(target, &v, sizeof v); }
template <Stored16 T>
LAYERWISE_INLINE void store(T* target, Vec<float> v) {
  const Bits16 h = T::narrow(v);
  __builtin_memcpy(target, &h, sizeof h);
}

LAYERWISE_INLINE float load_one(const float* source) { return *source; }
LAYERWISE_INLINE float load_one(const BFloat16* source) {
  const uint32_t bits = static_cast<uint32_t>(source->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// -- The first `count` lanes, 0 < count < lanes: the others load as zero and are not stored ---------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
LAYERWISE_INLINE Vec<float> load(const float* source, int count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), source);
}
LAYERWISE_INLINE Vec<double> load(const double* source, int count) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), source);
}
template <Stored16 T>
LAYERWISE_INLINE Vec<float> load(const T* source, int count) {
  return T::widen((Bits16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), source));
}
LAYERWISE_INLINE void store(float* target, Vec<float> v, int count) {
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
LAYERWISE_INLINE void store(double* target, Vec<double> v, int count) {
  _mm512_mask_storeu_pd(target, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
}
template <Stored16 T>
LAYERWISE_INLINE void store(T* target, Vec<float> v, int count) {
  _mm256_mask_storeu_epi16(target, static_cast<__mmask16>((1u << count) - 1), (__m256i)T::narrow(v));
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
template <Stored16 T>
LAYERWISE_INLINE Vec<float> load(const T* source, int count) {
  return T::widen(load_lanes<Bits16>(source, count));
}
LAYERWISE_INLINE void store(float* target, Vec<float> v, int count) { store_lanes(target, v, count); }
LAYERWISE_INLINE void store(double* target, Vec<double> v, int count) { store_lanes(target, v, count); }
template <Stored16 T>
LAYERWISE_INLINE void store(T* target, Vec<float> v, int count) {
  store_lanes(reinterpret_cast<uint16_t*>(target), T::narrow(v), count);
}
#endif

// -- Groups: how a kernel steps along contiguous elements ------------------------------------------------------------
//
// A group reads and writes kVectors vectors of elements or of the compute type at once: a pair of vectors where there
// are registers for it, one vector, or the tail of a row.

struct Whole {
  static constexpr int kVectors = 1;

  template <class A>
  static constexpr int size() {
    return kLanes<A>;
  }

  template <class T, class V>
  __attribute__((always_inline)) void get(const T* source, V (&v)[1]) const {
    v[0] = load(source);
  }
  template <class T, class V>
  __attribute__((always_inline)) void put(T* target, const V (&v)[1]) const {
    store(target, v[0]);
  }
  template <class V>
  __attribute__((always_inline)) V keep(V v) const {
    return v;
  }
};

struct Tail {
  static constexpr int kVectors = 1;
  int count;

  template <class A>
  __attribute__((always_inline)) int size() const {
    return count;
  }

  template <class T, class V>
  __attribute__((always_inline)) void get(const T* source, V (&v)[1]) const {
    v[0] = load(source, count);
  }
  template <class T, class V>
  __attribute__((always_inline)) void put(T* target, const V (&v)[1]) const {
    store(target, v[0], count);
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
  static constexpr int kVectors = 1;
  __attribute__((always_inline)) void get(const A* source, Vec<A> (&v)[1]) const { v[0] = broadcast(*source); }
};

#if defined(__AVX512F__)
template <class T>
struct Pair {
  static constexpr int kVectors = 2;

  // Of elements T or of its compute type.
  template <class S, class V>
  __attribute__((always_inline)) void get(const S* source, V (&v)[2]) const {
    v[0] = load(source);
    v[1] = load(source + kLanes<typename ComputeType<T>::type>);
  }
  template <class S, class V>
  __attribute__((always_inline)) void put(S* target, const V (&v)[2]) const {
    store(target, v[0]);
    store(target + kLanes<typename ComputeType<T>::type>, v[1]);
  }
};

// 32 bfloat16: the even ones in the first vector, the odd ones in the second.  Widening is then one instruction for
// each, and what belongs to channels is put in that order as it is read, once for many elements.
template <>
struct Pair<BFloat16> {
  static constexpr int kVectors = 2;

  __attribute__((always_inline)) void get(const BFloat16* source, Vec<float> (&v)[2]) const {
    const __m512i bits = _mm512_loadu_si512(source);
    v[0] = (Vec<float>)_mm512_slli_epi32(bits, 16);
    v[1] = (Vec<float>)_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }
  __attribute__((always_inline)) void put(BFloat16* target, const Vec<float> (&v)[2]) const {
#if defined(__AVX512BF16__)
    const __m512i evens_then_odds = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    _mm512_storeu_si512(target, _mm512_permutexvar_epi16(interleaved_halves(), evens_then_odds));
#else
    const __m512i even = _mm512_cvtepu16_epi32((__m256i)BFloat16::narrow(v[0]));
    const __m512i odd = _mm512_cvtepu16_epi32((__m256i)BFloat16::narrow(v[1]));
    _mm512_storeu_si512(target, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
#endif
  }
  __attribute__((always_inline)) void get(const float* source, Vec<float> (&v)[2]) const {
    const __m512 low = _mm512_loadu_ps(source), high = _mm512_loadu_ps(source + 16);
    v[0] = (Vec<float>)_mm512_permutex2var_ps(low, even_indices(), high);
    v[1] = (Vec<float>)_mm512_permutex2var_ps(low, _mm512_add_epi32(even_indices(), _mm512_set1_epi32(1)), high);
  }
  __attribute__((always_inline)) void put(float* target, const Vec<float> (&v)[2]) const {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(target, _mm512_permutex2var_ps((__m512)v[0], first, (__m512)v[1]));
    _mm512_storeu_ps(target + 16, _mm512_permutex2var_ps((__m512)v[0], second, (__m512)v[1]));
  }

 private:
#if defined(__AVX512BF16__)
  // Word 2i from word i, word 2i + 1 from word 16 + i.
  static __attribute__((always_inline)) __m512i interleaved_halves() {
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(16)), 16));
  }
#endif
  static __attribute__((always_inline)) __m512i even_indices() {
    return _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  }
};
#endif

// Runs body(offset, access) over `size` contiguous elements: whole vectors first, then the tail.
template <class A, class Body>
LAYERWISE_INLINE void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>) body(i, Whole{});
  if (i < size) body(i, Tail{static_cast<int>(size - i)});
}

// The same for elements T of compute type A, by pairs of vectors where registers allow.
template <class T, class A, class Body>
LAYERWISE_INLINE void for_each_group(int64_t size, const Body& body) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 2 * kLanes<A> <= size; i += 2 * kLanes<A>) body(i, Pair<T>{});
#endif
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
