// Normalisation, piecewise-linear activation and their gradient.  V is a scalar or a vector of scalars.
#pragma once

#include "macros.h"

namespace layerwise {

// xhat = (z - mean) * rstd.  The subtraction comes first so that a mean much larger than the deviation does not cancel.
template <class V>
LAYERWISE_INLINE V normalize(V z, V mean, V rstd) {
  return (z - mean) * rstd;
}

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

// dL/du = s * (g + p + 2*q*y): the dense gradient g of y plus the affine one of the moments (m1 = sum y, m2 = sum y*y).
template <class V>
LAYERWISE_INLINE V affine_gradient(Activated<V> a, V p, V two_q) {
  return a.slope * (p + two_q * a.y);
}

// dz = gamma*rstd * (du - dbeta/M - xhat*dgamma/M), with scale = gamma*rstd and the two means premultiplied by it.
template <class V>
LAYERWISE_INLINE V input_gradient(V du, V xhat, V scale, V scaled_mean_dbeta, V scaled_mean_dgamma) {
  return scale * du - scaled_mean_dbeta - xhat * scaled_mean_dgamma;
}

}  // namespace layerwise
