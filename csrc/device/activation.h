// Activations and their slopes.  V is a scalar or a vector of scalars.
#pragma once

#include "../params.h"
#include "macros.h"

namespace layerwise {

// y = act(u) and dy/du.
template <class V>
struct Activated {
  V y, slope;
};

// y = s * u with the slope s in {1, negative_slope}, picked by the sign of u.  ReLU has its own form because
// negative_slope * u would turn -inf into NaN.  A NaN in u propagates to y.
template <bool kReLU, class V>
LAYERWISE_INLINE Activated<V> activate(V u, V negative_slope) {
  const V zero = V{};
  const V one = V{} + 1;
  if constexpr (kReLU) return {u <= zero ? zero : u, u <= zero ? zero : one};
  const V slope = u > zero ? one : negative_slope;
  return {slope * u, slope};
}

// Any of them; negative_slope is that of this element.  Math has the functions below for V.
template <class Math, class V>
LAYERWISE_INLINE Activated<V> activate(ActivationKind kind, V u, V negative_slope) {
  const V zero = V{}, one = V{} + 1;
  switch (kind) {
    case ActivationKind::kReLU:
      return activate<true>(u, negative_slope);
    case ActivationKind::kLeakyReLU:
    case ActivationKind::kPReLU:
    case ActivationKind::kRReLU:
      return activate<false>(u, negative_slope);
    case ActivationKind::kReLU6: {
      const V six = V{} + 6;
      const V slope = u <= zero ? zero : one;
      return {u <= zero ? zero : (u >= six ? six : u), u >= six ? zero : slope};
    }
    case ActivationKind::kTanh: {
      const V y = Math::hyperbolic_tangent(u);
      return {y, one - y * y};
    }
    case ActivationKind::kSigmoid: {
      const V y = one / (one + Math::exponential(-u));
      return {y, y * (one - y)};
    }
    case ActivationKind::kSiLU: {
      const V sigmoid = one / (one + Math::exponential(-u)), y = u * sigmoid;
      return {y, sigmoid * (one + u * (one - sigmoid))};
    }
    case ActivationKind::kGELU: {
      const auto normal = Math::normal(u);
      return {u * normal.below, normal.below + u * normal.density};
    }
    case ActivationKind::kGELUTanh: {  // Hendrycks & Gimpel 2016, arXiv 1606.08415
      const V a = Math::constant(0.7978845608028654), b = Math::constant(0.044715);  // sqrt(2 / pi)
      const V square = u * u, th = Math::hyperbolic_tangent(a * u * (one + b * square));
      const V half_up = (one + th) / 2;
      return {u * half_up, half_up + u / 2 * (one - th * th) * a * (one + 3 * b * square)};
    }
    case ActivationKind::kHardswish: {
      const V three = V{} + 3;
      const V slope = u <= -three ? zero : u / 3 + one / 2;
      const V y = u <= -three ? zero : u * (u + three) / 6;
      return {u >= three ? u : y, u >= three ? one : slope};
    }
  }
  return {u, one};
}

// dL/du = s * (p + 2*q*y): p is the gradient of m1 = sum y plus any dense gradient of y, q that of m2 = sum y*y.
template <class V>
LAYERWISE_INLINE V affine_gradient(Activated<V> a, V p, V two_q) {
  return a.slope * (p + two_q * a.y);
}

// A number of 24 random bits for element `index` of a tensor.  U is uint32_t or a vector of it.  Each mix is the
// "lowbias32" of Wellons' hash-prospector (public domain).
template <class U>
LAYERWISE_INLINE U mix_bits(U x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}
template <class U>
LAYERWISE_INLINE U random_bits(U index, int64_t seed) {
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  return mix_bits<U>(mix_bits<U>(index ^ low) + high) >> 8;
}
constexpr double kRandomUnit = 1.0 / (1 << 24);

}  // namespace layerwise
