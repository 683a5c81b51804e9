// What the CPU kernels share: element addresses, per-channel coefficients, choice of a template instance.
#pragma once

#include "../device/activation.h"
#include "../params.h"
#include "vec.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

#define ALWAYS_INLINE __attribute__((always_inline))

template <class T>
const T* at(const void* base, const Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<const T*>(base) + n * s.n + c * s.c + h * s.h + w * s.w;
}
template <class T>
T* at(void* base, const Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<T*>(base) + n * s.n + c * s.c + h * s.h + w * s.w;
}

// The coefficients of one channel (contiguous: broadcast) or of a vector of channels (channels_last).
template <class A>
struct Coefficients {
  Vec<A> mean, rstd, gamma, beta;

  template <class Access>
  ALWAYS_INLINE Coefficients(const Channels& p, int64_t c, const Access& access)
      : mean(access.get(static_cast<const A*>(p.mean) + c)),
        rstd(access.get(static_cast<const A*>(p.rstd) + c)),
        gamma(access.get(static_cast<const A*>(p.gamma) + c)),
        beta(access.get(static_cast<const A*>(p.beta) + c)) {}

  ALWAYS_INLINE Vec<A> xhat(Vec<A> z) const { return normalize(z, mean, rstd); }
  ALWAYS_INLINE Vec<A> u(Vec<A> x) const { return gamma * x + beta; }
};

template <class Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat64:
      return body(double{});
  }
}

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

template <class Body>
void for_bool(bool condition, const Body& body) {
  condition ? body(Yes{}) : body(No{});
}

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
