// Piecewise-linear activation and its gradient.  V is a scalar or a vector of scalars.
#pragma once

#include "macros.h"

namespace layerwise {

// y = s * u with the slope s in {1, negative_slope}, picked by the sign of u.
template <class V>
struct Activated {
  V y, slope;
};

// ReLU has its own form because negative_slope * u would turn -inf into NaN.  A NaN in u propagates to y.
template <bool kReLU, class V>
LAYERWISE_INLINE Activated<V> activate(V u, V negative_slope) {
  const V zero = V{};
  const V one = V{} + 1;
  if constexpr (kReLU) return {u <= zero ? zero : u, u <= zero ? zero : one};
  const V slope = u > zero ? one : negative_slope;
  return {slope * u, slope};
}

// dL/du = s * (p + 2*q*y): p is the gradient of m1 = sum y plus any dense gradient of y, q that of m2 = sum y*y.
template <class V>
LAYERWISE_INLINE V affine_gradient(Activated<V> a, V p, V two_q) {
  return a.slope * (p + two_q * a.y);
}

}  // namespace layerwise
