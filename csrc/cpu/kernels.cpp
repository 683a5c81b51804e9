// CPU kernels.  Compiled once for each instruction set, LAYERWISE_ISA being its name: see CMakeLists.txt, dispatch.cpp.
//
// channels_last kernels run vectors over the channels, contiguous ones over the width.  Inside a pooling cell all
// per-channel values and all running sums stay in registers.

#include "kernels.h"

#include "blocks.h"
#include "direct_convolution.h"
#include "dot_convolution.h"
#include "extended.h"
#include "input_gradient.h"
#include "kernel_common.h"
#include "statistics.h"
#include "weight_gradient.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

// -- Statistics -------------------------------------------------------------------------------------------------

template <class T, class A>
void statistics_channels_last(const StatisticsParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const Blocks blocks = statistics_blocks(p);
  const int64_t pitch = p.z_strides.w;
  // Backwards: the end of the map was written last and is the most likely to be in a cache.
  for (int64_t t = end - 1; t >= begin; --t) {
    const Block block = block_at(blocks, t);
    const T* z = at<T>(p.z, p.z_strides, block.n, 0, block.h, block.w);
    if (p.z_copy != nullptr) {
      T* copy = at<T>(p.z_copy, p.z_copy_strides, block.n, 0, block.h, block.w);
      for (int64_t i = 0; i < block.length; ++i)
        __builtin_memcpy(copy + i * p.z_copy_strides.w, z + i * pitch, shape.c * sizeof(T));
    }
    block_statistics<T>(z, pitch, block.length, 0, shape.c, static_cast<A*>(p.block_mean) + t * shape.c,
                        static_cast<A*>(p.block_mean_rest) + t * shape.c, static_cast<A*>(p.block_m2) + t * shape.c);
  }
}

// Mean and M2 of a plane, grown piece by piece in double (Chan, Golub, LeVeque 1983).
struct PlaneStatistics {
  double count = 0, mean = 0, m2 = 0;

  void add(double piece_count, double piece_mean, double piece_m2) {
    const double total = count + piece_count, delta = piece_mean - mean;
    mean += delta * piece_count / total;
    m2 += piece_m2 + delta * delta * count * piece_count / total;
    count = total;
  }
};

template <class T, class A>
void add_piece(const T* z, int64_t length, PlaneStatistics& plane) {
  const A inverse_count = A(1) / A(length);
  Vec<A> sum{}, value[1];
  for_each_vector<A>(length, [&](int64_t w, auto group) ALWAYS_INLINE {
    group.get(z + w, value);
    sum += value[0];
  });
  Deviations<A> d{broadcast(horizontal_sum<A>(sum) * inverse_count)};
  for_each_vector<A>(length, [&](int64_t w, auto group) ALWAYS_INLINE {
    group.get(z + w, value);
    d.add(group.keep(value[0] - d.center));
  });
  const double first = horizontal_sum<A>(d.first);
  plane.add(length, d.center[0] + first / length, horizontal_sum<A>(d.second) - first * first / length);
}

template <class T, class A>
void statistics_contiguous(const StatisticsParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const bool flat = rows_follow_each_other(shape, p.z_strides) &&
                    (p.z_copy == nullptr || rows_follow_each_other(shape, p.z_copy_strides));
  const int64_t rows = flat ? 1 : shape.h;
  const int64_t length = flat ? shape.h * shape.w : shape.w;
  for (int64_t t = end - 1; t >= begin; --t) {
    const int64_t n = t / shape.c, c = t % shape.c;
    PlaneStatistics plane;
    for (int64_t h = 0; h < rows; ++h) {
      const T* z = at<T>(p.z, p.z_strides, n, c, h, 0);
      if (p.z_copy != nullptr) __builtin_memcpy(at<T>(p.z_copy, p.z_copy_strides, n, c, h, 0), z, length * sizeof(T));
      for (int64_t w = 0; w < length; w += kPieceLength)
        add_piece<T, A>(z + w, length - w < kPieceLength ? length - w : kPieceLength, plane);
    }
    const A mean = static_cast<A>(plane.mean);
    static_cast<A*>(p.block_mean)[t] = mean;
    static_cast<A*>(p.block_mean_rest)[t] = static_cast<A>(plane.mean - mean);
    static_cast<A*>(p.block_m2)[t] = static_cast<A>(plane.m2);
  }
}

// -- Apply ------------------------------------------------------------------------------------------------------

// The sums over one cell (params.h), of a group of channels; with ReLU s*y = y, so B0 is m1.
template <class A, bool kReLU, bool kSecond, int kVectors>
struct CellSums {
  Vec<A> m1[kVectors] = {}, m2[kVectors] = {}, a0[kVectors] = {}, a1[kVectors] = {}, b0[kVectors] = {},
         b1[kVectors] = {};

  ALWAYS_INLINE void add(int v, Activated<Vec<A>> a, Vec<A> t) {
    m1[v] += a.y;
    a0[v] += a.slope;
    a1[v] += a.slope * t;
    if constexpr (!kSecond) return;
    m2[v] += a.y * a.y;
    if constexpr (kReLU) {
      b1[v] += a.y * t;
    } else {
      const Vec<A> slope_y = a.slope * a.y;
      b0[v] += slope_y;
      b1[v] += slope_y * t;
    }
  }

  // Calls put(target, vectors) for each sum at `offset` of its array.
  template <class Put>
  ALWAYS_INLINE void write(const ApplyParams& p, int64_t offset, const Vec<A> (&rstd)[kVectors], const Put& put) {
    const int64_t plane = p.map.shape.n * p.map.shape.c * p.bins_h * p.bins_w;
    A* sums = static_cast<A*>(p.sums) + offset;
    for (int v = 0; v < kVectors; ++v) {  // t * rstd = xhat
      a1[v] *= rstd[v];
      b1[v] *= rstd[v];
      if constexpr (kReLU) b0[v] = m1[v];
    }
    put(static_cast<A*>(p.m1) + offset, m1);
    put(sums, a0);
    put(sums + plane, a1);
    if constexpr (!kSecond) return;
    put(static_cast<A*>(p.m2) + offset, m2);
    put(sums + 2 * plane, b0);
    put(sums + 3 * plane, b1);
  }
};

template <class T, class A, bool kReLU, bool kMoments, bool kSecond, bool kResidual>
void apply_channels_last(const ApplyParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const Extension& x = p.extension;
  const Vec<A> negative_slope = broadcast(A(p.activation.negative_slope));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / p.bins_h, i = task % p.bins_h;
    const int64_t h_begin = cell_begin(i, shape.h, p.bins_h), h_end = cell_end(i, shape.h, p.bins_h);
    const int64_t h_own = cell_own_begin(i, shape.h, p.bins_h);  // earlier rows are written by the task before
    for (int64_t j = 0; j < p.bins_w; ++j) {
      const int64_t w_begin = cell_begin(j, shape.w, p.bins_w), w_end = cell_end(j, shape.w, p.bins_w);
      for_each_group<T, A>(shape.c, [&](int64_t c, auto group) ALWAYS_INLINE {
        constexpr int kVectors = group.kVectors;
        const Coefficients<A, kVectors> k(p.channels, c, group);
        CellSums<A, kReLU, kSecond, kVectors> sums;
        const auto row = [&](int64_t h, auto write) ALWAYS_INLINE {
          const T* z = at<T>(p.z, p.z_strides, n, c, h, w_begin);
          T* y = write.value ? at<T>(p.y, p.y_strides, n, c, h, w_begin) : nullptr;
          const T* residual = kResidual ? at<T>(x.residual, x.residual_strides, n, c, h, w_begin) : nullptr;
          for (int64_t w = w_begin; w < w_end; ++w, z += p.z_strides.w) {
            Vec<A> value[kVectors], added[kVectors];
            group.get(z, value);
            prefetch_ahead<A>(group, z, p.z_strides.w);
            if constexpr (kResidual) {
              group.get(residual, added);
              prefetch_ahead<A>(group, residual, x.residual_strides.w);
              residual += x.residual_strides.w;
            }
            for (int v = 0; v < kVectors; ++v) {
              const Vec<A> t = value[v] - k.mean[v];
              Vec<A> u = k.u(v, t);
              if constexpr (kResidual) u += added[v];
              const Activated<Vec<A>> a = activate<kReLU>(u, negative_slope);
              value[v] = a.y;
              if constexpr (kMoments) sums.add(v, a, t);
            }
            if constexpr (write.value) {
              group.put(y, value);
              y += p.y_strides.w;
            }
          }
        };
        int64_t h = h_begin;
        if constexpr (kMoments) {
          for (; h < (p.y == nullptr ? h_end : h_own); ++h) row(h, No{});
        } else {
          h = h_own;
        }
        for (; h < h_end; ++h) row(h, Yes{});
        if constexpr (kMoments) {
          sums.write(p, ((n * p.bins_h + i) * p.bins_w + j) * shape.c + c, k.rstd,
                     [&](A* target, const auto& vectors) ALWAYS_INLINE { group.put(target, vectors); });
        }
      });
    }
  }
}

template <class T, class A, bool kReLU, bool kMoments, bool kSecond>
void apply_contiguous(const ApplyParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const Vec<A> negative_slope = broadcast(A(p.activation.negative_slope));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / shape.c, c = task % shape.c;
    const Coefficients<A, 1> k(p.channels, c, Broadcast<A>{});
    for (int64_t i = 0; i < p.bins_h; ++i) {
      for (int64_t j = 0; j < p.bins_w; ++j) {
        const int64_t w_begin = cell_begin(j, shape.w, p.bins_w), w_end = cell_end(j, shape.w, p.bins_w);
        CellSums<A, kReLU, kSecond, 1> sums;
        for (int64_t h = cell_begin(i, shape.h, p.bins_h); h < cell_end(i, shape.h, p.bins_h); ++h) {
          const T* z = at<T>(p.z, p.z_strides, n, c, h, w_begin);
          T* y = p.y == nullptr ? nullptr : at<T>(p.y, p.y_strides, n, c, h, w_begin);
          for_each_vector<A>(w_end - w_begin, [&](int64_t w, auto group) ALWAYS_INLINE {
            Vec<A> value[1];
            group.get(z + w, value);
            const Vec<A> t = value[0] - k.mean[0];
            const Activated<Vec<A>> a = activate<kReLU>(k.u(0, t), negative_slope);
            value[0] = a.y;
            if (y != nullptr) group.put(y + w, value);
            if constexpr (kMoments) sums.add(0, {group.keep(a.y), group.keep(a.slope)}, group.keep(t));
          });
        }
        if constexpr (kMoments) {
          sums.write(p, (task * p.bins_h + i) * p.bins_w + j, k.rstd,
                     [](A* target, const auto& vectors) ALWAYS_INLINE { *target = horizontal_sum<A>(vectors[0]); });
        }
      }
    }
  }
}

// -- Backward: sums -----------------------------------------------------------------------------------------------

template <class T, class A, bool kReLU, bool kResidual>
void dense_sums_channels_last(const DenseSumsParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const Extension& x = p.extension;
  const Blocks blocks = dense_blocks(p);
  const Vec<A> negative_slope = broadcast(A(p.activation.negative_slope));
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_at(blocks, task);
    for_each_group<T, A>(shape.c, [&](int64_t c, auto group) ALWAYS_INLINE {
      constexpr int kVectors = group.kVectors;
      const Coefficients<A, kVectors> k(p.channels, c, group);
      const T* z = at<T>(p.z, p.z_strides, block.n, c, block.h, block.w);
      const T* g = at<T>(p.grad_y, p.grad_y_strides, block.n, c, block.h, block.w);
      const T* residual = kResidual ? at<T>(x.residual, x.residual_strides, block.n, c, block.h, block.w) : nullptr;
      Vec<A> value[kVectors], gradient[kVectors], added[kVectors], dbeta[kVectors] = {}, dgamma[kVectors] = {};
      for (int64_t i = 0; i < block.length; ++i, z += p.z_strides.w, g += p.grad_y_strides.w) {
        group.get(z, value);
        group.get(g, gradient);
        prefetch_ahead<A>(group, z, p.z_strides.w);
        prefetch_ahead<A>(group, g, p.grad_y_strides.w);
        if constexpr (kResidual) {
          group.get(residual, added);
          prefetch_ahead<A>(group, residual, x.residual_strides.w);
          residual += x.residual_strides.w;
        }
        for (int v = 0; v < kVectors; ++v) {
          const Vec<A> t = value[v] - k.mean[v];
          Vec<A> u = k.u(v, t);
          if constexpr (kResidual) u += added[v];
          const Vec<A> du = activate<kReLU>(u, negative_slope).slope * gradient[v];
          dbeta[v] += du;
          dgamma[v] += du * t;
        }
      }
      for (int v = 0; v < kVectors; ++v) dgamma[v] *= k.rstd[v];
      group.put(static_cast<A*>(p.block_dbeta) + task * shape.c + c, dbeta);
      group.put(static_cast<A*>(p.block_dgamma) + task * shape.c + c, dgamma);
    });
  }
}

template <class T, class A, bool kReLU>
void dense_sums_contiguous(const DenseSumsParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const Vec<A> negative_slope = broadcast(A(p.activation.negative_slope));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / shape.c, c = task % shape.c;
    const Coefficients<A, 1> k(p.channels, c, Broadcast<A>{});
    Vec<A> dbeta{}, dgamma{};
    for (int64_t h = 0; h < shape.h; ++h) {
      const T* z = at<T>(p.z, p.z_strides, n, c, h, 0);
      const T* g = at<T>(p.grad_y, p.grad_y_strides, n, c, h, 0);
      for_each_vector<A>(shape.w, [&](int64_t w, auto group) ALWAYS_INLINE {
        Vec<A> value[1], gradient[1];
        group.get(z + w, value);
        group.get(g + w, gradient);
        const Vec<A> t = value[0] - k.mean[0];  // in the lanes beyond the tail the gradient is 0
        const Vec<A> du = activate<kReLU>(k.u(0, t), negative_slope).slope * gradient[0];
        dbeta += du;
        dgamma += du * t;
      });
    }
    static_cast<A*>(p.block_dbeta)[task] = horizontal_sum<A>(dbeta);
    static_cast<A*>(p.block_dgamma)[task] = horizontal_sum<A>(dgamma) * k.rstd[0][0];
  }
}

// Strided over the moments as [N, C, cells]: sample pitch, cell pitch and channel pitch differ between the layouts.
template <class A>
void cell_sums(const CellSumsParams& p, int64_t begin, int64_t end) {
  const Shape& shape = p.map.shape;
  const int64_t cells = p.bins_h * p.bins_w;
  const int64_t plane = shape.n * shape.c * cells;
  const A* a0 = static_cast<const A*>(p.sums);
  // Both sums times a gradient, and of a learned slope the third.
  const auto add = [&](const void* gradient, double factor, const A* zeroth, const A* first, const A* slopes) {
    if (gradient == nullptr) return;
    const A* g = static_cast<const A*>(gradient);
    if (p.map.layout == Layout::kContiguous) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t n = 0; n < shape.n; ++n) {
          const int64_t row = (n * shape.c + c) * cells;
          for (int64_t k = row; k < row + cells; ++k) {
            p.dbeta[c] += factor * g[k] * zeroth[k];
            p.dgamma[c] += factor * g[k] * first[k];
            if (p.dslope != nullptr) p.dslope[c] += factor * g[k] * slopes[k];
          }
        }
      }
    } else {
      for (int64_t row = 0; row < shape.n * cells; ++row) {
        for (int64_t c = begin; c < end; ++c) {
          const int64_t k = row * shape.c + c;
          p.dbeta[c] += factor * g[k] * zeroth[k];
          p.dgamma[c] += factor * g[k] * first[k];
        }
        for (int64_t c = begin; p.dslope != nullptr && c < end; ++c) {
          const int64_t k = row * shape.c + c;
          p.dslope[c] += factor * g[k] * slopes[k];
        }
      }
    }
  };
  const A* c0 = a0 + p.slope_sums * plane;
  add(p.p, 1, a0, a0 + plane, c0);
  add(p.q, 2, a0 + 2 * plane, a0 + 3 * plane, c0 + plane);
}

// -- Dispatch on dtype, layout and form -----------------------------------------------------------------------------

void statistics(const StatisticsParams& p, int64_t begin, int64_t end) {
  for_dtype(p.map.dtype, [&](auto element) {
    using T = decltype(element);
    using A = typename ComputeType<T>::type;
    if (p.map.layout == Layout::kChannelsLast)
      statistics_channels_last<T, A>(p, begin, end);
    else
      statistics_contiguous<T, A>(p, begin, end);
  });
}

void apply(const ApplyParams& p, int64_t begin, int64_t end) {
  for_dtype(p.map.dtype, [&](auto element) {
    using T = decltype(element);
    using A = typename ComputeType<T>::type;
    for_bool(p.activation.kind == ActivationKind::kReLU, [&](auto relu) {
      if (needs_extended(p.map, p.activation, p.extension)) {
        if (p.map.layout == Layout::kChannelsLast)
          extended_apply_channels_last<T, A, relu.value>(p, begin, end);
        else
          extended_apply_contiguous<T, A, relu.value>(p, begin, end);
        return;
      }
      for_bool(p.m1 != nullptr, [&](auto moments) {
        for_bool(p.m2 != nullptr, [&](auto second) {
          constexpr bool kSecond = moments.value && second.value;
          if (p.map.layout == Layout::kContiguous)
            return apply_contiguous<T, A, relu.value, moments.value, kSecond>(p, begin, end);
          for_bool(p.extension.residual != nullptr, [&](auto residual) {
            apply_channels_last<T, A, relu.value, moments.value, kSecond, residual.value>(p, begin, end);
          });
        });
      });
    });
  });
}

void dense_sums(const DenseSumsParams& p, int64_t begin, int64_t end) {
  for_dtype(p.map.dtype, [&](auto element) {
    using T = decltype(element);
    using A = typename ComputeType<T>::type;
    const bool extended = needs_extended(p.map, p.activation, p.extension);
    for_bool(p.activation.kind == ActivationKind::kReLU, [&](auto relu) {
      if (p.map.layout == Layout::kContiguous)
        return extended ? extended_sums_contiguous<T, A, relu.value>(p, begin, end)
                        : dense_sums_contiguous<T, A, relu.value>(p, begin, end);
      if (extended) return extended_sums_channels_last<T, A, relu.value>(p, begin, end);
      for_bool(p.extension.residual != nullptr,
               [&](auto residual) { dense_sums_channels_last<T, A, relu.value, residual.value>(p, begin, end); });
    });
  });
}

void cell_sums(const CellSumsParams& p, int64_t begin, int64_t end) {
  if (p.map.dtype == DType::kFloat64)
    cell_sums<double>(p, begin, end);
  else
    cell_sums<float>(p, begin, end);
}

void input_gradient(const InputGradientParams& p, int64_t begin, int64_t end) {
  for_dtype(p.map.dtype, [&](auto element) {
    using T = decltype(element);
    using A = typename ComputeType<T>::type;
    for_bool(p.activation.kind == ActivationKind::kReLU, [&](auto relu) {
      if (needs_extended(p.map, p.activation, p.extension)) {
        if (p.map.layout == Layout::kChannelsLast)
          extended_gradient_channels_last<T, A, relu.value>(p, begin, end);
        else
          extended_gradient_contiguous<T, A, relu.value>(p, begin, end);
        return;
      }
      for_bool(p.q != nullptr, [&](auto q) {
        for_bool(p.grad_y != nullptr, [&](auto dense) {
          if (p.map.layout == Layout::kContiguous)
            return input_gradient_contiguous<T, A, relu.value, q.value, dense.value>(p, begin, end);
          for_bool(p.extension.residual != nullptr, [&](auto residual) {
            input_gradient_channels_last<T, A, relu.value, q.value, dense.value, residual.value>(p, begin, end);
          });
        });
      });
    });
  });
}

}  // namespace

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
constexpr auto kDirectWeights = direct_weights;
constexpr auto kDirectConvolution = direct_convolution;
#else
constexpr bool kPairs = false;
constexpr decltype(Kernels::direct_weights) kDirectWeights = nullptr;
constexpr decltype(Kernels::direct_convolution) kDirectConvolution = nullptr;
#endif

#if defined(__AVX512F__)
extern const Kernels kernels = {statistics,         apply,    dense_sums,      cell_sums,       input_gradient,
                                winograd_weights,   winograd, weight_gradient, dot_convolution, kDirectWeights,
                                kDirectConvolution, kPairs};
#else
extern const Kernels kernels = {statistics, apply,   dense_sums, cell_sums,      input_gradient,     nullptr,
                                nullptr,    nullptr, nullptr,    kDirectWeights, kDirectConvolution, kPairs};
#endif

}  // namespace layerwise::cpu::LAYERWISE_ISA
