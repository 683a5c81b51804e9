// Gradient of the pre-activation: dz = gamma*rstd * (du - dbeta/M - xhat*dgamma/M).
#pragma once

#include "kernel_common.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

template <class A>
struct GradientCoefficients {
  Coefficients<A> forward;
  Vec<A> scale, mean_dbeta, mean_dgamma;

  template <class Access>
  ALWAYS_INLINE GradientCoefficients(const InputGradientParams& p, int64_t c, const Access& access)
      : forward(p.channels, c, access),
        scale(access.get(static_cast<const A*>(p.scale) + c)),
        mean_dbeta(access.get(static_cast<const A*>(p.scaled_mean_dbeta) + c)),
        mean_dgamma(access.get(static_cast<const A*>(p.scaled_mean_dgamma) + c)) {}

  template <bool kReLU>
  ALWAYS_INLINE Vec<A> dz(Vec<A> z, Vec<A> negative_slope, Vec<A> p, Vec<A> two_q) const {
    const Vec<A> xhat = forward.xhat(z);
    const Activated<Vec<A>> a = activate<kReLU>(forward.u(xhat), negative_slope);
    return input_gradient(affine_gradient(a, p, two_q), xhat, scale, mean_dbeta, mean_dgamma);
  }
};

// p or 2*q of a segment: the sum over the cells that cover it, of which `offset(i, j)` is the place.
template <class A, class Access, class Offset>
LAYERWISE_INLINE Vec<A> covering_cells(const void* gradient, const Segment& rows, const Segment& columns,
                                    const Access& access, const Offset& offset) {
  Vec<A> sum{};
  if (gradient == nullptr) return sum;
  for (int64_t i = rows.first_cell; i <= rows.last_cell; ++i)
    for (int64_t j = columns.first_cell; j <= columns.last_cell; ++j)
      sum += access.get(static_cast<const A*>(gradient) + offset(i, j));
  return sum;
}

// dz of the rows of one segment and the channels [c_begin, c_end), written to `target`, whose first element is that of
// channel c_begin of the pixel (rows.begin, 0).
template <class T, class A, bool kReLU, bool kQ, bool kDense>
void input_gradient_rows(const InputGradientParams& p, int64_t n, const Segment& rows, int64_t c_begin, int64_t c_end,
                         T* target, int64_t target_row, int64_t target_pixel) {
  const Shape& shape = p.map.shape;
  const Vec<A> negative_slope = broadcast(A(p.activation.negative_slope));
  for (int64_t s = 0; s < segment_count(p.bins_w); ++s) {
    const Segment columns = segment(s, shape.w, p.bins_w);
    for_each_vector<A>(c_end - c_begin, [&](int64_t i, auto access) ALWAYS_INLINE {
      const int64_t c = c_begin + i;
      const GradientCoefficients<A> k(p, c, access);
      const auto offset = [&](int64_t i, int64_t j) { return ((n * p.bins_h + i) * p.bins_w + j) * shape.c + c; };
      const Vec<A> cell_p = covering_cells<A>(p.p, rows, columns, access, offset);
      const Vec<A> two_q = kQ ? 2 * covering_cells<A>(p.q, rows, columns, access, offset) : Vec<A>{};
      for (int64_t h = rows.begin; h < rows.end; ++h) {
        const T* z = at<T>(p.z, p.z_strides, n, c, h, columns.begin);
        T* dz = target + (h - rows.begin) * target_row + columns.begin * target_pixel + i;
        const T* g = kDense ? at<T>(p.grad_y, p.grad_y_strides, n, c, h, columns.begin) : nullptr;
        for (int64_t w = columns.begin; w < columns.end; ++w) {
          const Vec<A> dense_p = kDense ? cell_p + access.get(g) : cell_p;
          access.put(dz, k.template dz<kReLU>(access.get(z), negative_slope, dense_p, two_q));
          z += p.z_strides.w;
          dz += target_pixel;
          if constexpr (kDense) g += p.grad_y_strides.w;
        }
      }
    });
  }
}

template <class T, class A, bool kReLU, bool kQ, bool kDense>
void input_gradient_channels_last(const InputGradientParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const int64_t row_segments = segment_count(p.bins_h);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / row_segments;
    const Segment rows = segment(t % row_segments, shape.h, p.bins_h);
    input_gradient_rows<T, A, kReLU, kQ, kDense>(p, n, rows, 0, shape.c, at<T>(p.dz, p.dz_strides, n, 0, rows.begin, 0),
                                                 p.dz_strides.h, p.dz_strides.w);
  }
}

template <class T, class A, bool kReLU, bool kQ, bool kDense>
void input_gradient_contiguous(const InputGradientParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const Vec<A> negative_slope = broadcast(A(p.activation.negative_slope));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / shape.c, c = t % shape.c;
    const GradientCoefficients<A> k(p, c, Broadcast<A>{});
    const auto offset = [&](int64_t i, int64_t j) { return (t * p.bins_h + i) * p.bins_w + j; };
    for (int64_t r = 0; r < segment_count(p.bins_h); ++r) {
      const Segment rows = segment(r, shape.h, p.bins_h);
      for (int64_t s = 0; s < segment_count(p.bins_w); ++s) {
        const Segment columns = segment(s, shape.w, p.bins_w);
        const Vec<A> cell_p = covering_cells<A>(p.p, rows, columns, Broadcast<A>{}, offset);
        const Vec<A> two_q = kQ ? 2 * covering_cells<A>(p.q, rows, columns, Broadcast<A>{}, offset) : Vec<A>{};
        for (int64_t h = rows.begin; h < rows.end; ++h) {
          const T* z = at<T>(p.z, p.z_strides, n, c, h, columns.begin);
          T* dz = at<T>(p.dz, p.dz_strides, n, c, h, columns.begin);
          const T* g = kDense ? at<T>(p.grad_y, p.grad_y_strides, n, c, h, columns.begin) : nullptr;
          for_each_vector<A>(columns.end - columns.begin, [&](int64_t w, auto access) ALWAYS_INLINE {
            const Vec<A> dense_p = kDense ? cell_p + access.get(g + w) : cell_p;
            access.put(dz + w, k.template dz<kReLU>(access.get(z + w), negative_slope, dense_p, two_q));
          });
        }
      }
    }
  }
}

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
