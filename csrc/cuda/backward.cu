// Backward: dgamma and dbeta from the forward pass's sums and from a dense gradient of y, then dz in one pass over z.
#include "extended.h"
#include "sums.h"

namespace layerwise::cuda {
namespace {

// dbeta = sum p*A0 + 2*q*B0, dgamma = sum p*A1 + 2*q*B1, dslope = sum p*C0 + 2*q*C1 over some of the cells.  The sums lie
// as m1 does.
template <class A, int kKinds>
__global__ void __launch_bounds__(kThreads)
    cell_sums(BackwardSums p, Partial partial, Cut cut, int lanes, int64_t chunks) {
  LAYERWISE_SHARED(A, shared, kKinds * kWarps * kWarp);
  const Shape& shape = p.moments.shape;
  const int64_t chunk = blockIdx.x % chunks, block = blockIdx.x / chunks;
  const Lane lane = lane_of(threadIdx.x, lanes);
  const int64_t c = chunk * lanes + lane.x, cells = shape.h * shape.w;
  const int64_t begin = cut.begin(block), end = cut.end(block);
  const int64_t plane = shape.n * cells * shape.c;
  const A* sums = static_cast<const A*>(p.sums);
  const A* slopes = sums + p.slope_sums * plane;
  A values[kKinds][1] = {};
  for (int64_t row = begin + threadIdx.x / kWarp * lane.rows + lane.row; row < end && c < shape.c;
       row += lane.rows * kWarps) {
    int64_t at = row * shape.c + c;  // in channels_last
    if (p.moments.layout == Layout::kContiguous) at = row / cells * cells * shape.c + c * cells + row % cells;
    const A value = p.p == nullptr ? A(0) : static_cast<const A*>(p.p)[at];
    values[kBeta][0] += value * sums[at];
    values[kGamma][0] += value * sums[plane + at];
    if constexpr (kKinds > kSlope) values[kSlope][0] += value * slopes[at];
    if (p.q != nullptr) {
      const A two_q = A(2) * static_cast<const A*>(p.q)[at];
      values[kBeta][0] += two_q * sums[2 * plane + at];
      values[kGamma][0] += two_q * sums[3 * plane + at];
      if constexpr (kKinds > kSlope) values[kSlope][0] += two_q * slopes[plane + at];
    }
  }
  write_block<A, 1, kKinds>(values, shared, partial, block, shape.c, chunk, lanes, lane);
}

// The dense part: sum of s*g and of s*g*xhat over some of the pixels.
template <class T, class I, int V>
__global__ void __launch_bounds__(kThreads, sizeof(I) == 4 ? kResident : 1)
    dense_sums(DenseMap p, Norm norm, Partial partial, Cut cut, int lanes, int64_t chunks) {
  using A = Compute<T>;
  LAYERWISE_SHARED(A, shared, 2 * kWarps * kWarp * V);
  const Shape& shape = p.map.shape;
  const I channels = shape.c, height = shape.h;
  const I chunk = blockIdx.x % static_cast<I>(chunks), block = blockIdx.x / static_cast<I>(chunks);
  const Lane lane = lane_of(threadIdx.x, lanes);
  const I c = (chunk * lanes + lane.x) * V;
  const I begin = cut.begin(block), end = cut.end(block);
  const I step = lane.rows * kWarps, first = begin + threadIdx.x / kWarp * lane.rows + lane.row;
  A sums[2][V] = {};
  const I count = c < channels ? share_of<I>(first, step, end) : I(0);
  if (count > 0) {
    const Coefficients<A, V> k(norm, c);
    const auto offset = [&](const Strides& strides) {
      return [&strides, c, height](const PixelWalk<I>& at) {
        const I n = height == 1 ? at.h : at.h / height;
        return offset_of<I>(strides, n, c, at.h - n * height, at.w);
      };
    };
    for_each_pixel<V>(
        PixelWalk<I>(first, step, I(0), I(0), static_cast<I>(shape.w)),  // rows of all samples, one below the other
        count,
        [&](const A(&values)[2][V], const PixelWalk<I>&) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A t = values[0][v] - k.mean[v];
            const A g = activated(norm.activation, k.u(v, t)).slope * values[1][v];
            sums[kBeta][v] += g;
            sums[kGamma][v] += g * t;
          }
        },
        Source{static_cast<const T*>(p.z), offset(p.z_strides)},
        Source{static_cast<const T*>(p.grad_y), offset(p.grad_y_strides)});
    A rstd[V];
    load_rstd(norm, c, rstd);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[kGamma][v] *= rstd[v];
  }
  write_block<A, V, 2>(sums, shared, partial, block, shape.c, chunk, lanes, lane);
}

// A warp per channel, in double and in a fixed order.
template <class A>
__global__ void __launch_bounds__(kThreads) combine_sums(BackwardSums p, int64_t channels, Partial partial) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (c >= channels) return;
  const int lane = threadIdx.x % kWarp;
  const A* sums = static_cast<const A*>(partial.data) + c * partial.blocks * partial.kinds;
  A* const targets[] = {static_cast<A*>(p.dgamma), static_cast<A*>(p.dbeta), static_cast<A*>(p.dslope)};
  for (int k = 0; k < partial.kinds; ++k) {
    double total = 0;
    for (int64_t b = lane; b < partial.blocks; b += kWarp) total += sums[b * partial.kinds + k];
    total = sum_over_rows(total, 1);
    if (lane == 0) (k == 0 ? targets[0] : k == 1 ? targets[1] : targets[2])[c] = static_cast<A>(total);
  }
}

// p or q of a segment, times gamma*rstd: the sum over the cells that cover it.
template <class A, int V, class I>
LAYERWISE_INLINE void scaled_cells(const void* gradient, const Strides& strides, I n, I c, const SegmentOf<I>& rows,
                                   const SegmentOf<I>& columns, const A (&scale)[V], A (&sum)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = A(0);
  for (I i = rows.first_cell; i <= rows.last_cell; ++i) {
    for (I j = columns.first_cell; j <= columns.last_cell; ++j) {
      A cell[V];
      load_values(gradient, offset_of<int64_t>(strides, n, c, i, j), cell);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += cell[v];
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] *= scale[v];
}

// dz = s * (scale*p + scale*2q * y + scale*grad_y) - (scale*dbeta/M + rstd*scale*dgamma/M * t).  A task is one piece of
// channels of one segment (cells.h) of one sample; where cells do not overlap only every second segment has elements.
// The closed form of a loss of m1 alone has neither q (kSecond) nor grad_y (kDense), and registers to spare.
template <class T, class I, int V, bool kSecond, bool kDense>
__global__ void __launch_bounds__(kThreads, sizeof(I) == 4 && !(kSecond && kDense) ? 2 : 1)
    form_gradient(InputGradient p, double inverse, int task_warps, int stride_h, int stride_w, int lanes,
                  int64_t chunks, int64_t tasks) {
  using A = Compute<T>;
  const I channels = p.map.shape.c, height = p.map.shape.h, width = p.map.shape.w;
  const I bins_h = p.bins_h, bins_w = p.bins_w, pieces = chunks;
  const int warp = threadIdx.x / kWarp, part = warp % task_warps;
  const I task = static_cast<I>(blockIdx.x) * (kWarps / task_warps) + warp / task_warps;
  if (task >= tasks) return;
  const Lane lane = lane_of(threadIdx.x, lanes);
  const I c = (task % pieces * lanes + lane.x) * V, place = task / pieces;
  const I rows_h = (segment_count(bins_h) - 1) / stride_h + 1, rows_w = (segment_count(bins_w) - 1) / stride_w + 1;
  const I line = place / rows_w, n = line / rows_h;
  const SegmentOf<I> rows = segment<I>(line % rows_h * stride_h, height, bins_h);
  const SegmentOf<I> columns = segment<I>(place % rows_w * stride_w, width, bins_w);
  if (c >= channels || rows.begin >= rows.end || columns.begin >= columns.end) return;

  const Coefficients<A, V> k(p.norm, c);
  const A inverse_count = static_cast<A>(inverse);
  A rstd[V], mean_dbeta[V], mean_dgamma[V], cell_p[V] = {}, two_q[V] = {};
  load_rstd(p.norm, c, rstd);
  load_values(p.dbeta, c, mean_dbeta);
  load_values(p.dgamma, c, mean_dgamma);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mean_dbeta[v] *= k.scale[v] * inverse_count;
    mean_dgamma[v] *= k.scale[v] * inverse_count * rstd[v];
  }
  const Strides strides = moment_strides(p.map, p.bins_h, p.bins_w);
  if (p.p != nullptr) scaled_cells(p.p, strides, n, c, rows, columns, k.scale, cell_p);
  if constexpr (kSecond) scaled_cells(p.q, strides, n, c, rows, columns, k.scale, two_q);
  const I first = part * lane.rows + lane.row, step = task_warps * lane.rows;
  const I count = share_of<I>(first, step, (rows.end - rows.begin) * (columns.end - columns.begin));
  const PixelWalk<I> walk(first, step, rows.begin, columns.begin, columns.end);
  const auto start = [&](const Strides& s) { return offset_of<I>(s, n, c, 0, 0); };
  const auto offset = [](const Strides& s) {
    return [&s](const PixelWalk<I>& at) { return offset_of<I>(s, 0, 0, at.h, at.w); };
  };
  const T* const z = static_cast<const T*>(p.z) + start(p.z_strides);
  T* const dz = static_cast<T*>(p.dz) + start(p.dz_strides);
  const auto form = [&](A(&values)[kDense ? 2 : 1][V], const PixelWalk<I>& at) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A t = values[0][v] - k.mean[v];
      const Activated<A> a = activated(p.norm.activation, k.u(v, t));
      A scaled_p = cell_p[v];
      if constexpr (kDense) scaled_p += k.scale[v] * values[1][v];
      const A dy = kSecond ? affine_gradient(a, scaled_p, A(2) * two_q[v]) : a.slope * scaled_p;
      values[0][v] = dy - (mean_dgamma[v] * t + mean_dbeta[v]);
    }
    store<V>(dz + offset(p.dz_strides)(at), values[0]);
  };
  const Source of_z{z, offset(p.z_strides)};
  if constexpr (kDense) {
    const T* const grad_y = static_cast<const T*>(p.grad_y) + start(p.grad_y_strides);
    for_each_pixel<V>(walk, count, form, of_z, Source{grad_y, offset(p.grad_y_strides)});
  } else {
    for_each_pixel<V>(walk, count, form, of_z);
  }
}

}  // namespace

namespace {

Cut cut_cells(const BackwardSums& p) {
  constexpr int64_t kCellsOfBlock = 64;
  return cut_sums(p.p == nullptr && p.q == nullptr ? 0 : p.moments.shape.n * p.moments.shape.h * p.moments.shape.w,
                  kCellsOfBlock);
}
bool is_extended(const BackwardSums& p, int64_t i) {
  return layerwise::is_extended(p.norm.activation, p.dense[i].extension);
}
Cut cut_dense(const BackwardSums& p, int64_t i) {
  return is_extended(p, i) ? extended_cut(p.dense[i]) : cut_pixels(p.dense[i].map.shape);
}
int64_t blocks_of_channel(const BackwardSums& p) {
  int64_t blocks = cut_cells(p).blocks * p.norm.extension.channel_step;
  for (int64_t i = 0; i < p.dense_maps; ++i) blocks += cut_dense(p, i).blocks;
  return blocks;
}
int kinds_of(const BackwardSums& p) { return p.dslope == nullptr ? 2 : 3; }

}  // namespace

int64_t backward_sums_partials(const BackwardSums& p) {
  return p.moments.shape.c / p.norm.extension.channel_step * blocks_of_channel(p) * kinds_of(p);
}

void backward_sums(const BackwardSums& p, Stream stream) {
  const int64_t step = p.norm.extension.channel_step, channels = p.moments.shape.c / step;
  Partial partial{p.partial, 0, cut_cells(p).blocks, blocks_of_channel(p), step, kinds_of(p)};
  if (const Cut cells = cut_cells(p); cells.blocks > 0) {
    const ChannelSplit split = split_channels(p.moments.shape.c, 1, p.moments.layout);
    with_bool(p.moments.dtype == DType::kFloat64, [&]<bool kDouble>() {
      using A = std::conditional_t<kDouble, double, float>;
      const int64_t grid = cells.blocks * split.chunks;
      with_bool(p.dslope != nullptr, [&]<bool kLearned>() {
        launch(cell_sums < A, kLearned ? 3 : 2 >, grid, kThreads, stream, p, partial, cells, split.lanes, split.chunks);
      });
    });
    partial.first = cells.blocks * step;
  }
  partial.step = 1;
  for (int64_t i = 0; i < p.dense_maps; ++i) {
    const Cut pixels = cut_dense(p, i);
    if (is_extended(p, i)) {
      extended_sums(p.dense[i], p.norm, partial, pixels, stream);
    } else {
      DenseMap dense = p.dense[i];
      if (is_one_row(dense.map.shape, dense.z_strides) && is_one_row(dense.map.shape, dense.grad_y_strides))
        dense.map.shape = one_row(dense.map.shape);
      with_instance(
          dense.map, false,
          [&]<class T, class I, int V>() {
            const ChannelSplit split = split_channels(channels, V, dense.map.layout);
            launch(dense_sums<T, I, V>, pixels.blocks * split.chunks, kThreads, stream, dense, p.norm, partial, pixels,
                   split.lanes, split.chunks);
          },
          Access{dense.z, dense.z_strides}, Access{dense.grad_y, dense.grad_y_strides});
    }
    partial.first += pixels.blocks;
  }
  const int64_t grid = (channels + kWarps - 1) / kWarps;
  if (p.moments.dtype == DType::kFloat64)
    launch(combine_sums<double>, grid, kThreads, stream, p, channels, partial);
  else
    launch(combine_sums<float>, grid, kThreads, stream, p, channels, partial);
}

void input_gradient(const InputGradient& p, Stream stream) {
  if (layerwise::is_extended(p.norm.activation, p.norm.extension)) return extended_gradient(p, stream);
  constexpr int64_t kPixelsOfWarpThread = 32;  // as in apply.cu
  const Shape& s = p.map.shape;
  const double inverse = p.count > 0 ? 1 / p.count : 0;
  const int stride_h = s.h % p.bins_h == 0 ? 2 : 1, stride_w = s.w % p.bins_w == 0 ? 2 : 1;
  const int64_t most_tasks = s.n * segment_count(p.bins_h) * segment_count(p.bins_w) * s.c;
  with_instance(
      p.map, cells_need_64_bits(p.map) || most_tasks > kMostOf32Bits,
      [&]<class T, class I, int V>() {
        const ChannelSplit split = split_channels(s.c, V, p.map.layout);
        const int64_t segments =
            ((segment_count(p.bins_h) - 1) / stride_h + 1) * ((segment_count(p.bins_w) - 1) / stride_w + 1);
        const int64_t tasks = s.n * segments * split.chunks;
        const int64_t area = (s.h / p.bins_h) * (s.w / p.bins_w);
        const int task_warps = area * split.lanes > kPixelsOfWarpThread * kWarp ? kWarps : 1;
        const int64_t blocks = (tasks * task_warps + kWarps - 1) / kWarps;
        with_bool(p.q != nullptr, [&]<bool kSecond>() {
          with_bool(p.grad_y != nullptr, [&]<bool kDense>() {
            launch(form_gradient<T, I, V, kSecond, kDense>, blocks, kThreads, stream, p, inverse, task_warps, stride_h,
                   stride_w, split.lanes, split.chunks, tasks);
          });
        });
      },
      Access{p.z, p.z_strides}, Access{p.dz, p.dz_strides}, Access{p.grad_y, p.grad_y_strides});
}

}  // namespace layerwise::cuda
