// Elements of z, and of y pooled from windows of them, for the kernels of the extended form.
//
// What is an element of y in the plain form is a window here: max pooling selects one element of z, average pooling and
// its slopes are means over the window, and without pooling a window is one element.
#pragma once

#include "common.h"

namespace layerwise::cuda {

// Functions that the smooth activations need.
template <class A>
struct Math {
  struct Normal {
    A below, density;  // the probability of smaller values, and the density
  };
  static LAYERWISE_DEVICE_MEMBER A constant(double value) { return static_cast<A>(value); }
  static LAYERWISE_DEVICE_MEMBER A exponential(A x) { return exp(x); }
  static LAYERWISE_DEVICE_MEMBER A hyperbolic_tangent(A x) { return tanh(x); }
  static LAYERWISE_DEVICE_MEMBER Normal normal(A u) {
    return {A(0.5) * erfc(u * A(-0.70710678118654752)), A(0.39894228040143268) * exp(u * u * A(-0.5))};
  }
};

template <class A>
struct Unit {
  A y, slope, slope_t;  // of act: dy/du, and dy/du * t
  A learned;  // dy/dslope of kPReLU

  LAYERWISE_MEMBER void add(const Unit& o) {
    y += o.y;
    slope += o.slope;
    slope_t += o.slope_t;
    learned += o.learned;
  }
  LAYERWISE_MEMBER void scale(A factor) {
    y *= factor;
    slope *= factor;
    slope_t *= factor;
    learned *= factor;
  }
};

// As it is stored.
template <class T>
LAYERWISE_INLINE Compute<T> rounded(Compute<T> v) {
  T stored;
  narrow(v, stored);
  return widen(stored);
}

// Piecewise linear with a slope that is fixed or that of the channel; the other activations take more code, of which the
// kernels then have one copy instead of four.
inline bool is_piecewise(const Activation& a) {
  return a.kind == ActivationKind::kReLU || a.kind == ActivationKind::kLeakyReLU || a.kind == ActivationKind::kPReLU;
}

template <class T, class I, int V, bool kPiecewise>
class Elements {
 public:
  using A = Compute<T>;
  static constexpr int kLoads = kPiecewise ? kAhead : 1;  // under way at once
  Coefficients<A, V> k;

  LAYERWISE_DEVICE_MEMBER Elements(const Shape& shape, const Norm& p, const void* z, const Strides& z_strides, I n, I c)
      : k(p, c), p_(p), height_(shape.h), width_(shape.w), z_strides_(z_strides) {
    const Extension& x = p.extension;
    z_ = static_cast<const T*>(z) + offset_of<I>(z_strides, n, c, 0, 0);
    residual_ = static_cast<const T*>(x.residual);
    if (residual_ != nullptr) residual_ += offset_of<I>(x.residual_strides, n, c, 0, 0);
    noise_ = static_cast<uint32_t>(x.first_noise + n * x.noise.n + c * x.noise.c);
    load_values(x.slopes, c, static_cast<A>(p.activation.negative_slope), negative_slope_);
  }

  // Where a pixel lies, for for_each_pixel; without a residual its place is taken by z.
  struct Offset {
    const Strides& strides;
    LAYERWISE_MEMBER I operator()(const PixelWalk<I>& at) const { return offset_of<I>(strides, 0, 0, at.h, at.w); }
  };
  LAYERWISE_MEMBER Source<T, Offset> z() const { return {z_, {z_strides_}}; }
  LAYERWISE_MEMBER Source<T, Offset> residual() const {
    return residual_ == nullptr ? z() : Source<T, Offset>{residual_, {p_.extension.residual_strides}};
  }

  LAYERWISE_MEMBER A t(int v, A z) const { return z - k.mean[v]; }

  LAYERWISE_DEVICE_MEMBER Unit<A> element(int v, A t, A residual, I h, I w) const {
    A u = k.u(v, t);
    if (residual_ != nullptr) u += residual;
    Activated<A> a;
    if constexpr (kPiecewise) {
      a = p_.activation.kind == ActivationKind::kReLU ? activate<true>(u, negative_slope_[v])
                                                      : activate<false>(u, negative_slope_[v]);
    } else {
      A negative_slope = negative_slope_[v];
      if (p_.activation.kind == ActivationKind::kRReLU) negative_slope = random_slope(v, h, w);
      a = activate<Math<A>>(p_.activation.kind, u, negative_slope);
    }
    return {a.y, a.slope, a.slope * t, p_.extension.slopes != nullptr && u <= A(0) ? u : A(0)};
  }

  struct Window {
    I h, w, rows, columns;
  };
  // Of element (h, w) of y; the last windows may be cut off by the edge.
  LAYERWISE_MEMBER Window window(I h, I w) const {
    const I window_h = p_.extension.window_h, window_w = p_.extension.window_w;
    const I first_h = h * window_h, first_w = w * window_w;
    const I rows = height_ - first_h, columns = width_ - first_w;
    return {first_h, first_w, rows < window_h ? rows : window_h, columns < window_w ? columns : window_w};
  }

  // use(place, h, w, z, residual) for the elements of a window, counted by `place`.
  template <class Use>
  LAYERWISE_DEVICE_MEMBER void for_each_element(const Window& in, const Use& use) const {
    const Strides& r_strides = p_.extension.residual_strides;
    I h = 0, w = 0;
    for (I first = 0; first < in.rows * in.columns; first += kLoads) {
      Packed<T, V> z[kLoads], residual[kLoads];
      I at_h[kLoads], at_w[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (h == in.rows) break;
        at_h[i] = in.h + h;
        at_w[i] = in.w + w;
        z[i] = *reinterpret_cast<const Packed<T, V>*>(z_ + offset_of<I>(z_strides_, 0, 0, at_h[i], at_w[i]));
        if (residual_ != nullptr)
          residual[i] =
              *reinterpret_cast<const Packed<T, V>*>(residual_ + offset_of<I>(r_strides, 0, 0, at_h[i], at_w[i]));
        if (++w == in.columns) {
          w = 0;
          ++h;
        }
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i >= in.rows * in.columns) break;
        A values[V], residuals[V] = {};
        widen_all(z[i], values);
        if (residual_ != nullptr) widen_all(residual[i], residuals);
        use(first + i, at_h[i], at_w[i], values, residuals);
      }
    }
  }

  // An element of y.  Which one max pooling selects, counted in its window, goes to `chosen`.
  LAYERWISE_DEVICE_MEMBER void pooled(I h, I w, Unit<A> (&out)[V], I (&chosen)[V]) const {
    const Window in = window(h, w);
    const bool max = p_.extension.pooling == Pooling::kMax;
    A key[V] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = {};
      chosen[v] = 0;
    }
    for_each_element(in, [&](I place, I row, I column, const A(&z)[V], const A(&residual)[V]) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Unit<A> e = element(v, t(v, z[v]), residual[v], row, column);
        if (!max) {
          out[v].add(e);
          continue;
        }
        // As max_pool2d: the first of equal values as they are stored, and the last NaN.
        const A y = rounded<T>(e.y);
        if (place > 0 && !(y > key[v]) && y == y) continue;
        key[v] = y;
        out[v] = e;
        chosen[v] = place;
      }
    });
    if (max) return;
    const A inverse = A(1) / static_cast<A>(in.rows * in.columns);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v].scale(inverse);
  }

 private:
  LAYERWISE_DEVICE_MEMBER A random_slope(int v, I h, I w) const {
    const Extension& x = p_.extension;
    const uint32_t index = noise_ + static_cast<uint32_t>(v * x.noise.c + h * x.noise.h + w * x.noise.w);
    const A uniform = static_cast<A>(random_bits(index, *x.seed)) * static_cast<A>(kRandomUnit);
    return negative_slope_[v] + uniform * static_cast<A>(p_.activation.upper_slope - p_.activation.negative_slope);
  }

  const Norm& p_;
  I height_, width_;
  const Strides& z_strides_;
  const T* z_;
  const T* residual_;
  uint32_t noise_;
  A negative_slope_[V];
};

// V elements `step` apart.
template <int V, class T>
LAYERWISE_INLINE void load_apart(const T* source, int64_t step, Compute<T> (&values)[V]) {
  if (step == 1) return load<V>(source, values);
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = widen(source[v * step]);
}
template <int V, class T>
LAYERWISE_INLINE void store_apart(T* target, int64_t step, const Compute<T> (&values)[V]) {
  if (step == 1) return store<V>(target, values);
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(values[v], target[v * step]);
}

// Calls body<T, I, V, kPiecewise>() for the element type of the map, indices of 64 bits if it is wide or its size needs
// them, and accesses of up to four elements: of more the sums would not fit in registers.
template <class Body, class... Accesses>
void with_extended_instance(const Map& map, const Norm& norm, bool wide, const Body& body,
                            const Accesses&... accesses) {
  wide = wide || (needs_64_bits(map, accesses) || ...);
  const auto choose = [&]<class T>() {
    constexpr int kVector = 4;
    const bool vectors = map.layout == Layout::kChannelsLast && (aligned(map, sizeof(T), kVector, accesses) && ...);
    with_bool(is_piecewise(norm.activation), [&]<bool kPiecewise>() {
      if (wide)
        body.template operator()<T, int64_t, 1, kPiecewise>();
      else if (vectors)
        body.template operator()<T, int32_t, kVector, kPiecewise>();
      else
        body.template operator()<T, int32_t, 1, kPiecewise>();
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
      return body.template operator()<double, int64_t, 1, false>();
  }
}

// The map of y.
inline Map pooled_map(Map map, const Extension& x) {
  map.shape.h = x.pooled_h;
  map.shape.w = x.pooled_w;
  return map;
}

// An access that is by single elements where channels are apart.
inline Access apart(const void* data, const Strides& strides, const Extension& x) {
  return {x.channel_step == 1 ? data : nullptr, strides};
}

}  // namespace layerwise::cuda
