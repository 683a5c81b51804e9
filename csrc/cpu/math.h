// Functions of vectors that the smooth activations need.
#pragma once

#include "vec.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

// The normal distribution at a point: the probability of values below it, and its density.
template <class V>
struct Normal {
  V below, density;
};

template <class A>
struct Math;

// Single precision, within a few roundings.
template <>
struct Math<float> {
  using V = Vec<float>;
  using Bits = Vector<int32_t, kLanes<float>>;

  static LAYERWISE_MEMBER V constant(double value) { return broadcast(static_cast<float>(value)); }

  // Cephes' expf: x = n*log(2) + r, and a polynomial in r.  Beyond the range of float32 the nearest power in it.
  static LAYERWISE_MEMBER V exponential(V x) {
    const V low = constant(-87.3), high = constant(88.3);
    V r = x < low ? low : (x > high ? high : x);  // a NaN stays
    const V magic = constant(12582912.0);  // adding it rounds to an integer
    const V n = (r * constant(1.44269504088896341) + magic) - magic;
    r = r - n * constant(0.693359375) - n * constant(-2.12194440e-4);
    V y = constant(1.9875691500e-4);
    y = y * r + constant(1.3981999507e-3);
    y = y * r + constant(8.3334519073e-3);
    y = y * r + constant(4.1665795894e-2);
    y = y * r + constant(1.6666665459e-1);
    y = y * r + constant(5.0000001201e-1);
    y = y * r * r + r + 1;
    const Bits power = (__builtin_convertvector(x == x ? n : V{}, Bits) + 127) << 23;
    return y * (V)power;
  }

  // Cephes' tanhf: a polynomial near zero, where 1 - 2 / (exp(2x) + 1) cancels.
  static LAYERWISE_MEMBER V hyperbolic_tangent(V x) {
    const V square = x * x, size = x < 0 ? -x : x;
    V y = constant(-5.70498872745e-3);
    y = y * square + constant(2.06390887954e-2);
    y = y * square - constant(5.37397155531e-2);
    y = y * square + constant(1.33314422036e-1);
    y = y * square - constant(3.33332819422e-1);
    y = y * square * x + x;
    const V far = 1 - 2 / (exponential(2 * x) + 1);
    return size > constant(0.625) ? far : y;
  }

  // The error function by Abramowitz & Stegun 7.1.26, within 1.5e-7.
  static LAYERWISE_MEMBER Normal<V> normal(V u) {
    const V x = (u < 0 ? -u : u) * constant(0.70710678118654752);
    const V gauss = exponential(-x * x), t = 1 / (1 + constant(0.3275911) * x);
    V y = constant(1.061405429);
    y = y * t + constant(-1.453152027);
    y = y * t + constant(1.421413741);
    y = y * t + constant(-0.284496736);
    y = y * t + constant(0.254829592);
    const V above = y * t * gauss / 2;  // the probability of values beyond |u|
    return {u < 0 ? above : 1 - above, constant(0.39894228040143268) * gauss};
  }
};

template <>
struct Math<double> {
  using V = Vec<double>;

  static LAYERWISE_MEMBER V constant(double value) { return broadcast(value); }
  static LAYERWISE_MEMBER V exponential(V x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
  }
  static LAYERWISE_MEMBER V hyperbolic_tangent(V x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
  }
  static LAYERWISE_MEMBER Normal<V> normal(V u) {
    V below;
    for (int i = 0; i < kLanes<double>; ++i) below[i] = __builtin_erfc(-u[i] * 0.70710678118654752) / 2;
    return {below, constant(0.39894228040143268) * exponential(-u * u / 2)};
  }
};

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
