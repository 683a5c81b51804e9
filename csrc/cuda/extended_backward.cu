// Backward in the extended form: the sums that a dense gradient of y adds, then dz and the gradient of the residual.
#include "elements.h"
#include "extended.h"

namespace layerwise::cuda {
namespace {

// Sum of s*g, of s*g*xhat and of g*dy/dslope over some of the elements of y.
template <class T, class I, int V, bool kPiecewise>
__global__ void __launch_bounds__(kThreads, 1)
    extended_pixels(DenseMap p, Norm norm, Partial partial, Cut cut, int lanes, int64_t chunks) {
  using A = Compute<T>;
  LAYERWISE_SHARED(A, shared, 3 * kWarps * kWarp * V);
  const Extension& x = norm.extension;
  const I channels = p.map.shape.c, height = x.pooled_h;
  const I chunk = blockIdx.x % static_cast<I>(chunks), block = blockIdx.x / static_cast<I>(chunks);
  const Lane lane = lane_of(threadIdx.x, lanes);
  const I c = (chunk * lanes + lane.x) * V;
  const I begin = cut.begin(block), end = cut.end(block);
  const I step = lane.rows * kWarps, first = begin + threadIdx.x / kWarp * lane.rows + lane.row;
  A sums[3][V] = {};
  const I count = c < channels ? share_of<I>(first, step, end) : I(0);
  PixelWalk<I> walk(first, step, I(0), I(0), static_cast<I>(x.pooled_w));  // rows of all samples
  for (I k = 0; k < count; ++k, walk.next()) {
    const I n = walk.h / height, h = walk.h - n * height;
    const Elements<T, I, V, kPiecewise> elements(p.map.shape, norm, p.z, p.z_strides, n, c);
    A g[V];
    load_apart<V>(static_cast<const T*>(p.grad_y) + offset_of<I>(p.grad_y_strides, n, c, h, walk.w), p.grad_y_strides.c,
                  g);
    Unit<A> e[V];
    I chosen[V];
    elements.pooled(h, walk.w, e, chosen);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[kBeta][v] += g[v] * e[v].slope;
      sums[kGamma][v] += g[v] * e[v].slope_t;
      sums[kSlope][v] += g[v] * e[v].learned;
    }
  }
  A rstd[V] = {};
  if (count > 0) load_rstd(norm, c, rstd);
#pragma unroll
  for (int v = 0; v < V; ++v) sums[kGamma][v] *= rstd[v];
  write_block<A, V, 3>(sums, shared, partial, block, p.map.shape.c, chunk, lanes, lane);
}

// The sum of p or q over the cells that cover a segment.
template <class A, int V, class I>
LAYERWISE_INLINE void covering_cells(const void* gradient, const Strides& strides, int64_t apart, I n, I c,
                                     const SegmentOf<I>& rows, const SegmentOf<I>& columns, A (&sum)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = A(0);
  if (gradient == nullptr) return;
  for (I i = rows.first_cell; i <= rows.last_cell; ++i) {
    for (I j = columns.first_cell; j <= columns.last_cell; ++j) {
      const int64_t place = n * strides.n + c * apart + i * strides.h + j * strides.w;
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += static_cast<const A*>(gradient)[place + v * apart];
    }
  }
}

// dz = gamma*rstd * du - (gamma*rstd*dbeta/M + gamma*rstd^2*dgamma/M * t), and du for the residual.  A task is one piece
// of channels of one segment (cells.h) of one sample, as in backward.cu.
template <class T, class I, int V, bool kPiecewise>
__global__ void __launch_bounds__(kThreads, 1)
    extended_segments(InputGradient p, double inverse, int task_warps, int lanes, int64_t chunks, int64_t tasks) {
  using A = Compute<T>;
  const Extension& x = p.norm.extension;
  const I channels = p.map.shape.c, height = x.pooled_h, width = x.pooled_w;
  const I bins_h = p.bins_h, bins_w = p.bins_w, pieces = chunks;
  const int warp = threadIdx.x / kWarp, part = warp % task_warps;
  const I task = static_cast<I>(blockIdx.x) * (kWarps / task_warps) + warp / task_warps;
  if (task >= tasks) return;
  const Lane lane = lane_of(threadIdx.x, lanes);
  const I c = (task % pieces * lanes + lane.x) * V, place = task / pieces;
  const I line = place / segment_count(bins_w), n = line / segment_count(bins_h);
  const SegmentOf<I> rows = segment<I>(line % segment_count(bins_h), height, bins_h);
  const SegmentOf<I> columns = segment<I>(place % segment_count(bins_w), width, bins_w);
  if (c >= channels || rows.begin >= rows.end || columns.begin >= columns.end) return;

  const Elements<T, I, V, kPiecewise> elements(p.map.shape, p.norm, p.z, p.z_strides, n, c);
  const A inverse_count = static_cast<A>(inverse);
  A rstd[V], mean_dbeta[V], mean_dgamma[V], cell_p[V], cell_q[V];
  load_rstd(p.norm, c, rstd);
  load_values(p.dbeta, c, mean_dbeta);
  load_values(p.dgamma, c, mean_dgamma);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mean_dbeta[v] *= elements.k.scale[v] * inverse_count;
    mean_dgamma[v] *= elements.k.scale[v] * inverse_count * rstd[v];
  }
  Map moments = p.map;
  moments.shape.c *= x.channel_step;
  const Strides strides = moment_strides(moments, p.bins_h, p.bins_w);
  covering_cells(p.p, strides, strides.c * x.channel_step, n, c, rows, columns, cell_p);
  covering_cells(p.q, strides, strides.c * x.channel_step, n, c, rows, columns, cell_q);

  T* const dz = static_cast<T*>(p.dz) + offset_of<I>(p.dz_strides, n, c, 0, 0);
  T* const dresidual =
      p.dresidual == nullptr ? nullptr : static_cast<T*>(p.dresidual) + offset_of<I>(p.dresidual_strides, n, c, 0, 0);
  const T* const grad_y =
      p.grad_y == nullptr ? nullptr : static_cast<const T*>(p.grad_y) + offset_of<I>(p.grad_y_strides, n, c, 0, 0);
  const auto write = [&](I h, I w, const A(&z)[V], const A(&du)[V]) {
    A values[V];
#pragma unroll
    for (int v = 0; v < V; ++v)
      values[v] = elements.k.scale[v] * du[v] - (mean_dgamma[v] * elements.t(v, z[v]) + mean_dbeta[v]);
    store<V>(dz + offset_of<I>(p.dz_strides, 0, 0, h, w), values);
    if (dresidual != nullptr) store<V>(dresidual + offset_of<I>(p.dresidual_strides, 0, 0, h, w), du);
  };
  // p of the cells and the gradient of y.
  const auto gradient = [&](const PixelWalk<I>& at, A(&g)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) g[v] = cell_p[v];
    if (grad_y == nullptr) return;
    A dense[V];
    load_apart<V>(grad_y + offset_of<I>(p.grad_y_strides, 0, 0, at.h, at.w), p.grad_y_strides.c, dense);
#pragma unroll
    for (int v = 0; v < V; ++v) g[v] += dense[v];
  };

  const I first = part * lane.rows + lane.row, step = task_warps * lane.rows;
  const I count = share_of<I>(first, step, (rows.end - rows.begin) * (columns.end - columns.begin));
  PixelWalk<I> walk(first, step, rows.begin, columns.begin, columns.end);
  if (x.pooling == Pooling::kNone) {
    for_each_pixel<V, elements.kLoads>(
        walk, count,
        [&](const A(&values)[2][V], const PixelWalk<I>& at) {
          A du[V];
          gradient(at, du);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const Unit<A> e = elements.element(v, elements.t(v, values[0][v]), values[1][v], at.h, at.w);
            du[v] = e.slope * (du[v] + A(2) * cell_q[v] * e.y);
          }
          write(at.h, at.w, values[0], du);
        },
        elements.z(), elements.residual());
    return;
  }
  const bool max = x.pooling == Pooling::kMax;
  for (I k = 0; k < count; ++k, walk.next()) {
    const auto in = elements.window(walk.h, walk.w);
    A g[V];
    I chosen[V] = {};
    gradient(walk, g);
    if (max || p.q != nullptr) {
      Unit<A> e[V];
      elements.pooled(walk.h, walk.w, e, chosen);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        g[v] += A(2) * cell_q[v] * e[v].y;
        if (max) g[v] *= e[v].slope;
      }
    }
    if (!max) {
      const A share = A(1) / static_cast<A>(in.rows * in.columns);
#pragma unroll
      for (int v = 0; v < V; ++v) g[v] *= share;
    }
    elements.for_each_element(in, [&](I at, I h, I w, const A(&z)[V], const A(&residual)[V]) {
      A du[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (max)
          du[v] = chosen[v] == at ? g[v] : A(0);
        else
          du[v] = elements.element(v, elements.t(v, z[v]), residual[v], h, w).slope * g[v];
      }
      write(h, w, z, du);
    });
  }
}

}  // namespace

Cut extended_cut(const DenseMap& p) {
  return cut_pixels({p.map.shape.n, p.map.shape.c, p.extension.pooled_h, p.extension.pooled_w});
}

void extended_sums(const DenseMap& p, const Norm& of_cells, const Partial& partial, const Cut& cut, Stream stream) {
  Norm norm = of_cells;
  norm.extension = p.extension;
  const Extension& x = norm.extension;
  with_extended_instance(
      p.map, norm, needs_64_bits(p.map, {p.grad_y, p.grad_y_strides}),
      [&]<class T, class I, int V, bool kPiecewise>() {
        const ChannelSplit split = split_channels(p.map.shape.c, V, p.map.layout);
        launch(extended_pixels<T, I, V, kPiecewise>, cut.blocks * split.chunks, kThreads, stream, p, norm, partial, cut,
               split.lanes, split.chunks);
      },
      Access{p.z, p.z_strides}, Access{x.residual, x.residual_strides}, apart(p.grad_y, p.grad_y_strides, x));
}

namespace {

void gradient_of_windows(const InputGradient& p, Stream stream) {
  constexpr int64_t kPixelsOfWarpThread = 32;  // as in apply.cu
  const Extension& x = p.norm.extension;
  const Shape& s = p.map.shape;
  const double inverse = p.count > 0 ? 1 / p.count : 0;
  const int64_t segments = s.n * segment_count(p.bins_h) * segment_count(p.bins_w);
  with_extended_instance(
      p.map, p.norm, cells_need_64_bits(p.map) || segments * s.c > kMostOf32Bits,
      [&]<class T, class I, int V, bool kPiecewise>() {
        const ChannelSplit split = split_channels(s.c, V, p.map.layout);
        const int64_t tasks = segments * split.chunks;
        const int64_t area = (x.pooled_h / p.bins_h) * (x.pooled_w / p.bins_w);
        const int task_warps = area * split.lanes > kPixelsOfWarpThread * kWarp ? kWarps : 1;
        const int64_t blocks = (tasks * task_warps + kWarps - 1) / kWarps;
        launch(extended_segments<T, I, V, kPiecewise>, blocks, kThreads, stream, p, inverse, task_warps, split.lanes,
               split.chunks, tasks);
      },
      Access{p.z, p.z_strides}, Access{p.dz, p.dz_strides}, Access{p.dresidual, p.dresidual_strides},
      Access{x.residual, x.residual_strides}, apart(p.grad_y, p.grad_y_strides, x));
}

// The elements from (h, w) on that no window covers: du is 0.
void gradient_of_rest(InputGradient p, int64_t h, int64_t w, int64_t height, Stream stream) {
  Extension& x = p.norm.extension;
  p.map.shape.h = height;
  p.map.shape.w -= w;
  if (p.map.shape.h == 0 || p.map.shape.w == 0) return;
  const int64_t bytes = p.map.dtype == DType::kFloat64 ? 8 : p.map.dtype == DType::kFloat32 ? 4 : 2;
  const auto move = [&](auto& data, const Strides& strides) {
    using Bytes = std::conditional_t<std::is_same_v<decltype(data), void*&>, char*, const char*>;
    if (data != nullptr) data = static_cast<Bytes>(data) + (h * strides.h + w * strides.w) * bytes;
  };
  move(p.z, p.z_strides);
  move(p.dz, p.dz_strides);
  move(p.dresidual, p.dresidual_strides);
  p.p = p.q = p.grad_y = x.residual = nullptr;
  p.norm.activation = {ActivationKind::kReLU, 0, 0};
  x.pooling = Pooling::kNone;
  x.slopes = nullptr;
  x.window_h = x.window_w = p.bins_w = 1;
  x.pooled_h = p.bins_h = p.map.shape.h;
  x.pooled_w = p.map.shape.w;
  gradient_of_windows(p, stream);
}

}  // namespace

void extended_gradient(const InputGradient& p, Stream stream) {
  gradient_of_windows(p, stream);
  const Extension& x = p.norm.extension;
  const Shape& s = p.map.shape;
  const int64_t rows = x.pooled_h * x.window_h, columns = x.pooled_w * x.window_w;
  if (columns < s.w) gradient_of_rest(p, 0, columns, rows < s.h ? rows : s.h, stream);
  if (rows < s.h) gradient_of_rest(p, rows, 0, s.h - rows, stream);
}

}  // namespace layerwise::cuda
