// The passes in their extended form (params.h, Extension): any activation, a residual, and y pooled from windows.
//
// What is an element of y in the plain form is a window here: max pooling selects one element of z, average pooling and
// its slopes are means over the window, and without pooling a window is one element.  Pooled maps, and those whose
// channels are interleaved for space_to_depth, are channels_last.
#pragma once

#include "blocks.h"
#include "kernel_common.h"
#include "math.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

// An element of z, or of y pooled from it, of a vector of channels (channels_last) or of columns (contiguous).
template <class A>
struct Unit {
  Vec<A> y, slope, slope_t;  // of act: dy/du, and dy/du * t
  Vec<A> learned;  // dy/dslope of kPReLU

  ALWAYS_INLINE void add(const Unit& o) {
    y += o.y;
    slope += o.slope;
    slope_t += o.slope_t;
    learned += o.learned;
  }
  ALWAYS_INLINE void scale(Vec<A> factor) {
    y *= factor;
    slope *= factor;
    slope_t *= factor;
    learned *= factor;
  }
};

template <class T>
using Values = Vec<typename ComputeType<T>::type>;

// As it is stored.
template <class T>
LAYERWISE_INLINE Values<T> rounded(Values<T> v) {
  if constexpr (sizeof(T) == sizeof(v[0])) {
    return v;
  } else {
    return T::widen(T::narrow(v));
  }
}

// One vector of elements, `step` apart in memory.
template <class T, class Group>
LAYERWISE_INLINE Values<T> get_apart(const Group& group, const T* source, int64_t step) {
  using A = typename ComputeType<T>::type;
  Vec<A> v[1];
  if (step == 1) {
    group.get(source, v);
  } else {
    T buffer[kLanes<A>] = {};
    for (int i = 0; i < group.template size<A>(); ++i) buffer[i] = source[i * step];
    group.get(static_cast<const T*>(buffer), v);
  }
  return v[0];
}
template <class T, class Group>
LAYERWISE_INLINE void put_apart(const Group& group, T* target, int64_t step, Values<T> value) {
  using A = typename ComputeType<T>::type;
  const Vec<A> v[1] = {value};
  if (step == 1) return group.put(target, v);
  T buffer[kLanes<A>];
  group.put(buffer, v);
  for (int i = 0; i < group.template size<A>(); ++i) target[i * step] = buffer[i];
}

// Elements of z of one sample: of a vector of channels from c on, or of a vector of columns of channel c.
template <class T, class A, bool kReLU, bool kChannelsLast, class Group>
class Elements {
 public:
  Coefficients<A, 1> k;

  template <class Params>
  ALWAYS_INLINE Elements(const Params& p, int64_t n, int64_t c, const Group& group)
      : k(make_coefficients(p.channels, c, group)),
        group_(group),
        shape_(p.map.shape),
        activation_(p.activation),
        extension_(p.extension),
        z_strides_(p.z_strides),
        z_(at<T>(p.z, p.z_strides, n, c, 0, 0)),
        residual_(extension_.residual == nullptr ? nullptr
                                                 : at<T>(extension_.residual, extension_.residual_strides, n, c, 0, 0)),
        negative_slope_(broadcast(A(activation_.negative_slope))) {
    if (extension_.slopes != nullptr)
      negative_slope_ = of_channels(static_cast<const A*>(extension_.slopes) + c, group);
    noise_ = static_cast<uint32_t>(extension_.first_noise + n * extension_.noise.n + c * extension_.noise.c);
  }

  // The centred value of an element.
  ALWAYS_INLINE Vec<A> t(int64_t h, int64_t w) const {
    Vec<A> value[1];
    group_.get(z_ + h * z_strides_.h + w * z_strides_.w, value);
    return value[0] - k.mean[0];
  }

  ALWAYS_INLINE Unit<A> element(int64_t h, int64_t w, Vec<A> t) const {
    Vec<A> u = k.u(0, t);
    if (residual_ != nullptr) {
      Vec<A> value[1];
      group_.get(residual_ + h * extension_.residual_strides.h + w * extension_.residual_strides.w, value);
      u += value[0];
    }
    Activated<Vec<A>> a;
    if constexpr (kReLU) {
      a = activate<true>(u, negative_slope_);
    } else {
      Vec<A> negative_slope = negative_slope_;
      if (activation_.kind == ActivationKind::kRReLU) negative_slope = random_slope(h, w);
      a = activate<Math<A>>(activation_.kind, u, negative_slope);
    }
    Unit<A> e{a.y, a.slope, a.slope * t, {}};
    if (!kReLU && extension_.slopes != nullptr) e.learned = u <= 0 ? u : Vec<A>{};
    return e;
  }
  ALWAYS_INLINE Unit<A> element(int64_t h, int64_t w) const { return element(h, w, t(h, w)); }

  struct Window {
    int64_t h, w, h_end, w_end;
  };
  // Of element (h, w) of y; the last windows may be cut off by the edge.
  ALWAYS_INLINE Window window(int64_t h, int64_t w) const {
    const int64_t first_h = h * extension_.window_h, first_w = w * extension_.window_w;
    const int64_t h_end = first_h + extension_.window_h, w_end = first_w + extension_.window_w;
    return {first_h, first_w, h_end < shape_.h ? h_end : shape_.h, w_end < shape_.w ? w_end : shape_.w};
  }

  // An element of y.  Which one max pooling selects, counted in its window, goes to `chosen` as a number.
  ALWAYS_INLINE Unit<A> pooled(int64_t h, int64_t w, Vec<A>* chosen = nullptr) const {
    if (!kChannelsLast || extension_.pooling == Pooling::kNone) return element(h, w);
    const Window in = window(h, w);
    return extension_.pooling == Pooling::kMax ? largest(in, chosen) : average(in);
  }

 private:
  // As max_pool2d: the first of equal values as they are stored, and the last NaN.
  ALWAYS_INLINE Unit<A> largest(const Window& in, Vec<A>* chosen) const {
    Unit<A> best = element(in.h, in.w);
    Vec<A> key = rounded<T>(best.y), index{}, place{};
    for (int64_t h = in.h; h < in.h_end; ++h) {
      for (int64_t w = in.w; w < in.w_end; ++w, place += 1) {
        if (h == in.h && w == in.w) continue;
        const Unit<A> e = element(h, w);
        const Vec<A> y = rounded<T>(e.y);
        const auto larger = (y > key) | (y != y);
        key = larger ? y : key;
        best.y = larger ? e.y : best.y;
        best.slope = larger ? e.slope : best.slope;
        best.slope_t = larger ? e.slope_t : best.slope_t;
        if (!kReLU) best.learned = larger ? e.learned : best.learned;
        index = larger ? place : index;
      }
    }
    if (chosen != nullptr) *chosen = index;
    return best;
  }

  ALWAYS_INLINE Unit<A> average(const Window& in) const {
    Unit<A> sum{};
    for (int64_t h = in.h; h < in.h_end; ++h)
      for (int64_t w = in.w; w < in.w_end; ++w) sum.add(element(h, w));
    sum.scale(broadcast(A(1) / A((in.h_end - in.h) * (in.w_end - in.w))));
    return sum;
  }

  ALWAYS_INLINE Vec<A> random_slope(int64_t h, int64_t w) const {
    using Bits = Vector<uint32_t, kLanes<A>>;
    const uint32_t first = noise_ + static_cast<uint32_t>(h * extension_.noise.h + w * extension_.noise.w);
    const uint32_t step = static_cast<uint32_t>(kChannelsLast ? extension_.noise.c : extension_.noise.w);
    Bits index;
    for (int i = 0; i < kLanes<A>; ++i) index[i] = first + i * step;
    const Vec<A> uniform = __builtin_convertvector(random_bits(index, *extension_.seed), Vec<A>) * A(kRandomUnit);
    return negative_slope_ + uniform * A(activation_.upper_slope - activation_.negative_slope);
  }

  static ALWAYS_INLINE Coefficients<A, 1> make_coefficients(const Channels& channels, int64_t c, const Group& group) {
    if constexpr (kChannelsLast) return Coefficients<A, 1>(channels, c, group);
    return Coefficients<A, 1>(channels, c, Broadcast<A>{});
  }
  static ALWAYS_INLINE Vec<A> of_channels(const A* source, const Group& group) {
    Vec<A> v[1];
    if constexpr (kChannelsLast)
      group.get(source, v);
    else
      Broadcast<A>{}.get(source, v);
    return v[0];
  }

  Group group_;
  const Shape& shape_;
  const Activation& activation_;
  const Extension& extension_;
  const Strides& z_strides_;
  const T* z_;
  const T* residual_;
  Vec<A> negative_slope_;
  uint32_t noise_;
};

// -- Apply ------------------------------------------------------------------------------------------------------------

// The sums over a cell (params.h).
template <class A>
struct ExtendedSums {
  Vec<A> m1{}, m2{}, a0{}, a1{}, b0{}, b1{}, c0{}, c1{};

  ALWAYS_INLINE void add(const Unit<A>& e, bool second) {
    m1 += e.y;
    a0 += e.slope;
    a1 += e.slope_t;
    c0 += e.learned;
    if (!second) return;
    m2 += e.y * e.y;
    b0 += e.slope * e.y;
    b1 += e.slope_t * e.y;
    c1 += e.learned * e.y;
  }

  template <class Put>
  ALWAYS_INLINE void write(const ApplyParams& p, int64_t offset, Vec<A> rstd, const Put& put) {
    const int64_t plane = p.map.shape.n * p.map.shape.c * p.extension.channel_step * p.bins_h * p.bins_w;
    A* target = static_cast<A*>(p.sums) + offset;
    const auto next = [&](Vec<A> sum) ALWAYS_INLINE {
      put(target, sum);
      target += plane;
    };
    put(static_cast<A*>(p.m1) + offset, m1);
    next(a0);
    next(a1 * rstd);  // t * rstd = xhat
    if (p.m2 != nullptr) {
      put(static_cast<A*>(p.m2) + offset, m2);
      next(b0);
      next(b1 * rstd);
    }
    if (p.extension.slopes == nullptr) return;
    next(c0);
    if (p.m2 != nullptr) next(c1);
  }
};

template <class T, class A, bool kReLU>
void extended_apply_channels_last(const ApplyParams& p, int64_t begin, int64_t end) {
  const Extension& x = p.extension;
  const int64_t channels = p.map.shape.c, step = x.channel_step;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / p.bins_h, i = task % p.bins_h;
    const int64_t h_begin = cell_begin(i, x.pooled_h, p.bins_h), h_end = cell_end(i, x.pooled_h, p.bins_h);
    const int64_t h_own = cell_own_begin(i, x.pooled_h, p.bins_h);  // earlier rows are written by the task before
    for (int64_t j = 0; j < p.bins_w; ++j) {
      const int64_t w_begin = cell_begin(j, x.pooled_w, p.bins_w), w_end = cell_end(j, x.pooled_w, p.bins_w);
      for_each_vector<A>(channels, [&](int64_t c, auto group) ALWAYS_INLINE {
        const Elements<T, A, kReLU, true, decltype(group)> elements(p, n, c, group);
        ExtendedSums<A> sums;
        for (int64_t h = p.m1 != nullptr ? h_begin : h_own; h < h_end; ++h) {
          for (int64_t w = w_begin; w < w_end; ++w) {
            const Unit<A> e = elements.pooled(h, w);
            if (h >= h_own && p.y != nullptr) put_apart(group, at<T>(p.y, p.y_strides, n, c, h, w), step, e.y);
            if (p.m1 != nullptr) sums.add(e, p.m2 != nullptr);
          }
        }
        if (p.m1 == nullptr) return;
        const int64_t cell = (n * p.bins_h + i) * p.bins_w + j;
        sums.write(p, (cell * channels + c) * step, elements.k.rstd[0],
                   [&](A* target, Vec<A> sum) ALWAYS_INLINE { put_apart(group, target, step, sum); });
      });
    }
  }
}

template <class T, class A, bool kReLU>
void extended_apply_contiguous(const ApplyParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / shape.c, c = task % shape.c;
    for (int64_t i = 0; i < p.bins_h; ++i) {
      for (int64_t j = 0; j < p.bins_w; ++j) {
        const int64_t w_begin = cell_begin(j, shape.w, p.bins_w), w_end = cell_end(j, shape.w, p.bins_w);
        ExtendedSums<A> sums;
        Vec<A> rstd{};
        for_each_vector<A>(w_end - w_begin, [&](int64_t w, auto group) ALWAYS_INLINE {
          const Elements<T, A, kReLU, false, decltype(group)> elements(p, n, c, group);
          rstd = elements.k.rstd[0];
          for (int64_t h = cell_begin(i, shape.h, p.bins_h); h < cell_end(i, shape.h, p.bins_h); ++h) {
            const Unit<A> e = elements.element(h, w_begin + w);
            if (p.y != nullptr) put_apart(group, at<T>(p.y, p.y_strides, n, c, h, w_begin + w), 1, e.y);
            if (p.m1 != nullptr)
              sums.add({group.keep(e.y), group.keep(e.slope), group.keep(e.slope_t), group.keep(e.learned)},
                       p.m2 != nullptr);
          }
        });
        if (p.m1 != nullptr)
          sums.write(p, (task * p.bins_h + i) * p.bins_w + j, rstd,
                     [](A* target, Vec<A> sum) ALWAYS_INLINE { *target = horizontal_sum<A>(sum); });
      }
    }
  }
}

// -- Backward: sums -------------------------------------------------------------------------------------------------

template <class A>
struct DenseSums {
  Vec<A> dbeta{}, dgamma{}, dslope{};

  ALWAYS_INLINE void add(const Unit<A>& e, Vec<A> g) {
    dbeta += e.slope * g;
    dgamma += e.slope_t * g;
    dslope += e.learned * g;
  }
  template <class Put>
  ALWAYS_INLINE void write(const DenseSumsParams& p, int64_t offset, Vec<A> rstd, const Put& put) {
    put(static_cast<A*>(p.block_dbeta) + offset, dbeta);
    put(static_cast<A*>(p.block_dgamma) + offset, dgamma * rstd);
    if (p.block_dslope != nullptr) put(static_cast<A*>(p.block_dslope) + offset, dslope);
  }
};

// A task is a block of rows of y.
template <class T, class A, bool kReLU>
void extended_sums_channels_last(const DenseSumsParams& p, int64_t begin, int64_t end) {
  const Extension& x = p.extension;
  const int64_t channels = p.map.shape.c, rows = extended_rows(x), blocks = divide_up(x.pooled_h, rows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks, h_begin = task % blocks * rows;
    const int64_t h_end = h_begin + rows < x.pooled_h ? h_begin + rows : x.pooled_h;
    for_each_vector<A>(channels, [&](int64_t c, auto group) ALWAYS_INLINE {
      const Elements<T, A, kReLU, true, decltype(group)> elements(p, n, c, group);
      DenseSums<A> sums;
      for (int64_t h = h_begin; h < h_end; ++h)
        for (int64_t w = 0; w < x.pooled_w; ++w)
          sums.add(elements.pooled(h, w),
                   get_apart(group, at<T>(p.grad_y, p.grad_y_strides, n, c, h, w), x.channel_step));
      sums.write(p, task * channels + c, elements.k.rstd[0],
                 [&](A* target, Vec<A> sum) ALWAYS_INLINE { put_apart(group, target, 1, sum); });
    });
  }
}

// A task is a plane.
template <class T, class A, bool kReLU>
void extended_sums_contiguous(const DenseSumsParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / shape.c, c = task % shape.c;
    DenseSums<A> sums;
    Vec<A> rstd{};
    for_each_vector<A>(shape.w, [&](int64_t w, auto group) ALWAYS_INLINE {
      const Elements<T, A, kReLU, false, decltype(group)> elements(p, n, c, group);
      rstd = elements.k.rstd[0];
      for (int64_t h = 0; h < shape.h; ++h)  // in the lanes beyond the tail the gradient is 0
        sums.add(elements.element(h, w), get_apart(group, at<T>(p.grad_y, p.grad_y_strides, n, c, h, w), 1));
    });
    sums.write(p, task, rstd, [](A* target, Vec<A> sum) ALWAYS_INLINE { *target = horizontal_sum<A>(sum); });
  }
}

// -- Backward: dz ---------------------------------------------------------------------------------------------------

// p or q of a segment: the sum over the cells that cover it.
template <class A, class Group, class Offset>
LAYERWISE_INLINE Vec<A> covering_cells(const void* gradient, const Segment& rows, const Segment& columns,
                                       const Group& group, int64_t step, const Offset& offset) {
  Vec<A> sum{};
  if (gradient == nullptr) return sum;
  for (int64_t i = rows.first_cell; i <= rows.last_cell; ++i)
    for (int64_t j = columns.first_cell; j <= columns.last_cell; ++j)
      sum += get_apart(group, static_cast<const A*>(gradient) + offset(i, j), step);
  return sum;
}

// dz = gamma*rstd * du - (mean_dgamma * t + mean_dbeta) for the elements of a vector of channels or columns.
template <class T, class A, class Target, bool kReLU, bool kChannelsLast, class Group>
struct GradientWriter {
  const InputGradientParams& p;
  const Group& group;
  Elements<T, A, kReLU, kChannelsLast, Group> elements;
  Vec<A> mean_dbeta, mean_dgamma;
  Target* dz;  // of the pixel (0, 0), or null
  int64_t dz_row, dz_pixel;
  T* dresidual;

  ALWAYS_INLINE GradientWriter(const InputGradientParams& params, int64_t n, int64_t c, const Group& group_,
                               Target* dz_, int64_t row, int64_t pixel)
      : p(params), group(group_), elements(params, n, c, group_), dz(dz_), dz_row(row), dz_pixel(pixel) {
    const auto of_channels = [&](const void* source) ALWAYS_INLINE {
      Vec<A> v[1];
      if constexpr (kChannelsLast)
        group.get(static_cast<const A*>(source) + c, v);
      else
        Broadcast<A>{}.get(static_cast<const A*>(source) + c, v);
      return v[0];
    };
    mean_dbeta = of_channels(p.scaled_mean_dbeta);
    mean_dgamma = of_channels(p.scaled_mean_dgamma) * elements.k.rstd[0];
    dresidual = p.dresidual == nullptr ? nullptr : at<T>(p.dresidual, p.dresidual_strides, n, c, 0, 0);
  }

  ALWAYS_INLINE void write(int64_t h, int64_t w, Vec<A> t, Vec<A> du) const {
    put_apart(group, dz + h * dz_row + w * dz_pixel, 1, elements.k.scale[0] * du - (mean_dgamma * t + mean_dbeta));
    if (dresidual != nullptr)
      put_apart(group, dresidual + h * p.dresidual_strides.h + w * p.dresidual_strides.w, 1, du);
  }

  // The window of element (h, w) of y, its rows in [h_begin, h_end); dy = g + two_q * y.  All of it is read before any of
  // it is written: dz may be z.
  ALWAYS_INLINE void write_window(int64_t h, int64_t w, int64_t h_begin, int64_t h_end, Vec<A> g, Vec<A> two_q) const {
    const Extension& x = p.extension;
    if (!kChannelsLast || x.pooling == Pooling::kNone) {
      const Vec<A> t = elements.t(h, w);
      const Unit<A> e = elements.element(h, w, t);
      return write(h, w, t, e.slope * (g + two_q * e.y));
    }
    const auto in = elements.window(h, w);
    const bool max = x.pooling == Pooling::kMax;
    Vec<A> chosen{}, place{}, du{};
    if (max) {
      const Unit<A> e = elements.pooled(h, w, &chosen);
      du = e.slope * (g + two_q * e.y);
    } else {
      if (p.q != nullptr) g += two_q * elements.pooled(h, w).y;
      g /= broadcast(A((in.h_end - in.h) * (in.w_end - in.w)));
    }
    for (int64_t i = in.h; i < in.h_end; ++i) {
      for (int64_t j = in.w; j < in.w_end; ++j, place += 1) {
        if (i < h_begin || i >= h_end) continue;
        const Vec<A> t = elements.t(i, j);
        write(i, j, t, max ? (chosen == place ? du : Vec<A>{}) : elements.element(i, j, t).slope * g);
      }
    }
  }
};

// dz of rows [h_begin, h_end) of sample n and of channels [c_begin, c_end), written to `target`, whose first element is
// that of channel c_begin of the pixel (h_begin, 0).
template <class T, class A, class Target, bool kReLU>
void extended_gradient_rows(const InputGradientParams& p, int64_t n, int64_t h_begin, int64_t h_end, int64_t c_begin,
                            int64_t c_end, Target* target, int64_t target_row, int64_t target_pixel) {
  const Shape& shape = p.map.shape;
  const Extension& x = p.extension;
  const int64_t step = x.channel_step, windows_end = x.pooled_h * x.window_h, columns_end = x.pooled_w * x.window_w;
  target -= h_begin * target_row;
  for_each_vector<A>(c_end - c_begin, [&](int64_t channel, auto group) ALWAYS_INLINE {
    const int64_t c = c_begin + channel;
    const GradientWriter<T, A, Target, kReLU, true, decltype(group)> writer(p, n, c, group, target + channel,
                                                                            target_row, target_pixel);
    const auto offset = [&](int64_t i, int64_t j)
                            ALWAYS_INLINE { return (((n * p.bins_h + i) * p.bins_w + j) * shape.c + c) * step; };
    for (int64_t r = 0; r < segment_count(p.bins_h); ++r) {
      Segment rows = segment(r, x.pooled_h, p.bins_h);
      const int64_t first = h_begin / x.window_h, last = divide_up(h_end, x.window_h);
      if (rows.begin < first) rows.begin = first;
      if (rows.end > last) rows.end = last;
      if (rows.begin >= rows.end) continue;
      for (int64_t s = 0; s < segment_count(p.bins_w); ++s) {
        const Segment columns = segment(s, x.pooled_w, p.bins_w);
        if (columns.begin >= columns.end) continue;
        const Vec<A> cell_p = covering_cells<A>(p.p, rows, columns, group, step, offset);
        const Vec<A> cell_q = covering_cells<A>(p.q, rows, columns, group, step, offset);
        for (int64_t h = rows.begin; h < rows.end; ++h) {
          for (int64_t w = columns.begin; w < columns.end; ++w) {
            Vec<A> g = cell_p;
            if (p.grad_y != nullptr) g += get_apart(group, at<T>(p.grad_y, p.grad_y_strides, n, c, h, w), step);
            writer.write_window(h, w, h_begin, h_end, g, cell_q + cell_q);
          }
        }
      }
    }
    // What no window covers.
    for (int64_t h = h_begin; h < h_end; ++h)
      for (int64_t w = h < windows_end ? columns_end : 0; w < shape.w; ++w)
        writer.write(h, w, writer.elements.t(h, w), Vec<A>{});
  });
}

// A task is a row segment of the cells, the last one with the rows that no window covers.
template <class T, class A, bool kReLU>
void extended_gradient_channels_last(const InputGradientParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const Extension& x = p.extension;
  const int64_t row_segments = segment_count(p.bins_h);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / row_segments, s = t % row_segments;
    const Segment rows = segment(s, x.pooled_h, p.bins_h);
    const int64_t h_begin = rows.begin * x.window_h, windows_end = rows.end * x.window_h;
    const int64_t h_end = s + 1 == row_segments || windows_end > shape.h ? shape.h : windows_end;
    if (h_begin >= h_end) continue;
    extended_gradient_rows<T, A, T, kReLU>(p, n, h_begin, h_end, 0, shape.c,
                                           at<T>(p.dz, p.dz_strides, n, 0, h_begin, 0), p.dz_strides.h, p.dz_strides.w);
  }
}

template <class T, class A, bool kReLU>
void extended_gradient_contiguous(const InputGradientParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / shape.c, c = task % shape.c;
    const Broadcast<A> one;
    const auto cells = [&](const void* gradient, const Segment& rows, const Segment& columns) {
      Vec<A> sum{}, cell[1];
      if (gradient == nullptr) return sum;
      for (int64_t i = rows.first_cell; i <= rows.last_cell; ++i) {
        for (int64_t j = columns.first_cell; j <= columns.last_cell; ++j) {
          one.get(static_cast<const A*>(gradient) + (task * p.bins_h + i) * p.bins_w + j, cell);
          sum += cell[0];
        }
      }
      return sum;
    };
    for (int64_t s = 0; s < segment_count(p.bins_w); ++s) {
      const Segment columns = segment(s, shape.w, p.bins_w);
      for_each_vector<A>(columns.end - columns.begin, [&](int64_t column, auto group) ALWAYS_INLINE {
        const int64_t w = columns.begin + column;
        const GradientWriter<T, A, T, kReLU, false, decltype(group)> writer(
            p, n, c, group, at<T>(p.dz, p.dz_strides, n, c, 0, 0), p.dz_strides.h, p.dz_strides.w);
        for (int64_t r = 0; r < segment_count(p.bins_h); ++r) {
          const Segment rows = segment(r, shape.h, p.bins_h);
          const Vec<A> cell_p = cells(p.p, rows, columns), cell_q = cells(p.q, rows, columns);
          for (int64_t h = rows.begin; h < rows.end; ++h) {
            Vec<A> g = cell_p;
            if (p.grad_y != nullptr) g += get_apart(group, at<T>(p.grad_y, p.grad_y_strides, n, c, h, w), 1);
            writer.write_window(h, w, h, h + 1, g, cell_q + cell_q);
          }
        }
      });
    }
  }
}

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
