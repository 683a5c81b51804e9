// Gradient of the pre-activation: dz = gamma*rstd * (du - dbeta/M - xhat*dgamma/M).
#pragma once

#include "extended.h"
#include "kernel_common.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

// With the centred t = z - mean, dz = scale * du - (scale*dbeta/M + rstd*scale*dgamma/M * t).
template <class A, int kVectors>
struct GradientCoefficients {
  Coefficients<A, kVectors> forward;
  Vec<A> mean_dbeta[kVectors], mean_dgamma[kVectors];  // premultiplied as above

  template <class Group>
  ALWAYS_INLINE GradientCoefficients(const InputGradientParams& p, int64_t c, const Group& group)
      : forward(p.channels, c, group) {
    group.get(static_cast<const A*>(p.scaled_mean_dbeta) + c, mean_dbeta);
    group.get(static_cast<const A*>(p.scaled_mean_dgamma) + c, mean_dgamma);
    for (int v = 0; v < kVectors; ++v) mean_dgamma[v] *= forward.rstd[v];
  }

  struct Gradients {
    Vec<A> dz, du;
  };
  // Of an element with `added` to it before the activation, whose y has the gradient p + two_q * y.
  template <bool kReLU, bool kQ>
  ALWAYS_INLINE Gradients of(int v, Vec<A> z, Vec<A> added, Vec<A> negative_slope, Vec<A> p, Vec<A> two_q) const {
    const Vec<A> t = z - forward.mean[v];
    const Activated<Vec<A>> a = activate<kReLU>(forward.u(v, t) + added, negative_slope);
    const Vec<A> du = kQ ? affine_gradient(a, p, two_q) : a.slope * p;
    return {forward.scale[v] * du - (mean_dgamma[v] * t + mean_dbeta[v]), du};
  }
};

// p or q of a segment: the sum over the cells that cover it, of which `offset(i, j)` is the place.
template <class A, int kVectors, class Group, class Offset>
LAYERWISE_INLINE void sum_cells(const void* gradient, const Segment& rows, const Segment& columns, const Group& group,
                                const Offset& offset, Vec<A> (&sum)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) sum[v] = Vec<A>{};
  if (gradient == nullptr) return;
  for (int64_t i = rows.first_cell; i <= rows.last_cell; ++i) {
    for (int64_t j = columns.first_cell; j <= columns.last_cell; ++j) {
      Vec<A> cell[kVectors];
      group.get(static_cast<const A*>(gradient) + offset(i, j), cell);
      for (int v = 0; v < kVectors; ++v) sum[v] += cell[v];
    }
  }
}

// dz of the rows of one segment and the channels [c_begin, c_end), written to `target`, whose first element is that of
// channel c_begin of the pixel (rows.begin, 0).
template <class T, class A, class Target, bool kReLU, bool kQ, bool kDense, bool kResidual>
void input_gradient_rows(const InputGradientParams& p, int64_t n, const Segment& rows, int64_t c_begin, int64_t c_end,
                         Target* target, int64_t target_row, int64_t target_pixel) {
  const Shape& shape = p.map.shape;
  const Extension& x = p.extension;
  const Vec<A> negative_slope = broadcast(A(p.activation.negative_slope));
  for (int64_t s = 0; s < segment_count(p.bins_w); ++s) {
    const Segment columns = segment(s, shape.w, p.bins_w);
    if (columns.begin >= columns.end) continue;
    for_each_group<T, A>(c_end - c_begin, [&](int64_t channel, auto group) ALWAYS_INLINE {
      constexpr int kVectors = group.kVectors;
      const int64_t c = c_begin + channel;
      const GradientCoefficients<A, kVectors> k(p, c, group);
      const auto offset = [&](int64_t i, int64_t j) { return ((n * p.bins_h + i) * p.bins_w + j) * shape.c + c; };
      Vec<A> cell_p[kVectors], two_q[kVectors];
      sum_cells<A>(p.p, rows, columns, group, offset, cell_p);
      sum_cells<A>(kQ ? p.q : nullptr, rows, columns, group, offset, two_q);
      for (int v = 0; v < kVectors; ++v) two_q[v] += two_q[v];
      for (int64_t h = rows.begin; h < rows.end; ++h) {
        const T* z = at<T>(p.z, p.z_strides, n, c, h, columns.begin);
        Target* dz = target + (h - rows.begin) * target_row + columns.begin * target_pixel + channel;
        const T* g = kDense ? at<T>(p.grad_y, p.grad_y_strides, n, c, h, columns.begin) : nullptr;
        const T* residual = kResidual ? at<T>(x.residual, x.residual_strides, n, c, h, columns.begin) : nullptr;
        T* dresidual = kResidual && p.dresidual != nullptr
                           ? at<T>(p.dresidual, p.dresidual_strides, n, c, h, columns.begin)
                           : nullptr;
        for (int64_t w = columns.begin; w < columns.end; ++w) {
          Vec<A> value[kVectors], gradient[kVectors], added[kVectors] = {}, du[kVectors];
          group.get(z, value);
          prefetch_ahead<A>(group, z, p.z_strides.w);
          if constexpr (kDense) {
            group.get(g, gradient);
            prefetch_ahead<A>(group, g, p.grad_y_strides.w);
          }
          if constexpr (kResidual) {
            group.get(residual, added);
            prefetch_ahead<A>(group, residual, x.residual_strides.w);
          }
          for (int v = 0; v < kVectors; ++v) {
            const Vec<A> sum = kDense ? cell_p[v] + gradient[v] : cell_p[v];
            const auto d = k.template of<kReLU, kQ>(v, value[v], added[v], negative_slope, sum, two_q[v]);
            value[v] = d.dz;
            du[v] = d.du;
          }
          group.put(dz, value);
          if constexpr (kResidual) {
            if (dresidual != nullptr) {
              group.put(dresidual, du);
              dresidual += p.dresidual_strides.w;
            }
            residual += x.residual_strides.w;
          }
          z += p.z_strides.w;
          dz += target_pixel;
          if constexpr (kDense) g += p.grad_y_strides.w;
        }
      }
    });
  }
}

template <class T, class A, bool kReLU, bool kQ, bool kDense, bool kResidual>
void input_gradient_channels_last(const InputGradientParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const int64_t row_segments = segment_count(p.bins_h);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / row_segments;
    const Segment rows = segment(t % row_segments, shape.h, p.bins_h);
    input_gradient_rows<T, A, T, kReLU, kQ, kDense, kResidual>(
        p, n, rows, 0, shape.c, at<T>(p.dz, p.dz_strides, n, 0, rows.begin, 0), p.dz_strides.h, p.dz_strides.w);
  }
}

template <class T, class A, bool kReLU, bool kQ, bool kDense>
void input_gradient_contiguous(const InputGradientParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const Vec<A> negative_slope = broadcast(A(p.activation.negative_slope));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / shape.c, c = task % shape.c;
    const Broadcast<A> one;
    const GradientCoefficients<A, 1> k(p, c, one);
    const auto offset = [&](int64_t i, int64_t j) { return (task * p.bins_h + i) * p.bins_w + j; };
    for (int64_t r = 0; r < segment_count(p.bins_h); ++r) {
      const Segment rows = segment(r, shape.h, p.bins_h);
      for (int64_t s = 0; s < segment_count(p.bins_w); ++s) {
        const Segment columns = segment(s, shape.w, p.bins_w);
        Vec<A> cell_p[1], two_q[1];
        sum_cells<A>(p.p, rows, columns, one, offset, cell_p);
        sum_cells<A>(kQ ? p.q : nullptr, rows, columns, one, offset, two_q);
        two_q[0] += two_q[0];
        for (int64_t h = rows.begin; h < rows.end; ++h) {
          const T* z = at<T>(p.z, p.z_strides, n, c, h, columns.begin);
          T* dz = at<T>(p.dz, p.dz_strides, n, c, h, columns.begin);
          const T* g = kDense ? at<T>(p.grad_y, p.grad_y_strides, n, c, h, columns.begin) : nullptr;
          for_each_vector<A>(columns.end - columns.begin, [&](int64_t w, auto group) ALWAYS_INLINE {
            Vec<A> value[1], gradient[1];
            group.get(z + w, value);
            if constexpr (kDense) group.get(g + w, gradient);
            const Vec<A> sum = kDense ? cell_p[0] + gradient[0] : cell_p[0];
            value[0] = k.template of<kReLU, kQ>(0, value[0], Vec<A>{}, negative_slope, sum, two_q[0]).dz;
            group.put(dz + w, value);
          });
        }
      }
    }
  }
}

// -- dz where it is needed, instead of in memory -----------------------------------------------------------------------

template <class T, class A, class Target, bool kReLU, bool kQ, bool kDense, bool kResidual>
void input_gradient_range(const InputGradientParams& p, int64_t n, int64_t h_begin, int64_t h_end, int64_t c_begin,
                          int64_t c_end, Target* target, int64_t target_row, int64_t target_pixel) {
  for (int64_t s = 0; s < segment_count(p.bins_h); ++s) {
    Segment rows = segment(s, p.map.shape.h, p.bins_h);
    if (rows.begin < h_begin) rows.begin = h_begin;
    if (rows.end > h_end) rows.end = h_end;
    if (rows.begin >= rows.end) continue;
    input_gradient_rows<T, A, Target, kReLU, kQ, kDense, kResidual>(
        p, n, rows, c_begin, c_end, target + (rows.begin - h_begin) * target_row, target_row, target_pixel);
  }
}

// dz of rows [h_begin, h_end) of sample n and of channels [c_begin, c_end), written to `target`, whose first element is
// that of channel c_begin of the pixel (h_begin, 0).
template <class Target>
using FormRows = void (*)(const InputGradientParams&, int64_t n, int64_t h_begin, int64_t h_end, int64_t c_begin,
                          int64_t c_end, Target* target, int64_t target_row, int64_t target_pixel);

template <class T, class Target>
FormRows<Target> choose_form(const InputGradientParams& p) {
  FormRows<Target> form = nullptr;
  for_bool(p.activation.kind == ActivationKind::kReLU, [&](auto relu) {
    if (needs_extended(p.map, p.activation, p.extension)) {
      form = extended_gradient_rows<T, float, Target, relu.value>;
      return;
    }
    for_bool(p.q != nullptr, [&](auto q) {
      for_bool(p.grad_y != nullptr, [&](auto dense) {
        for_bool(p.extension.residual != nullptr, [&](auto residual) {
          form = input_gradient_range<T, float, Target, relu.value, q.value, dense.value, residual.value>;
        });
      });
    });
  });
  return form;
}

// The same where p.z is dz already.
template <class T, class Target>
void copy_gradient_rows(const InputGradientParams& p, int64_t n, int64_t h_begin, int64_t h_end, int64_t c_begin,
                        int64_t c_end, Target* target, int64_t target_row, int64_t target_pixel) {
  for (int64_t h = h_begin; h < h_end; ++h) {
    for (int64_t w = 0; w < p.map.shape.w; ++w) {
      const T* dz = at<T>(p.z, p.z_strides, n, c_begin, h, w);
      Target* pixel = target + (h - h_begin) * target_row + w * target_pixel;
      for_each_vector<float>(c_end - c_begin, [&](int64_t c, auto group) ALWAYS_INLINE {
        Vec<float> value[1];
        group.get(dz + c, value);
        group.put(pixel + c, value);
      });
    }
  }
}

template <class T, class Target>
FormRows<Target> choose_form(const WeightGradientParams& p) {
  return p.is_formed ? copy_gradient_rows<T, Target> : choose_form<T, Target>(p.gradient);
}

// dz of rows [h_begin, h_end) of sample n and one block of channels, [rows, W, block].
template <class Target>
void form_dz(const InputGradientParams& g, FormRows<Target> form, int64_t n, int64_t h_begin, int64_t h_end,
             int64_t c_begin, int64_t block, Target* dz) {
  form(g, n, h_begin, h_end, c_begin, c_begin + block, dz, g.map.shape.w * block, block);
}

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
