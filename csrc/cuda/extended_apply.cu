// y = pool(act(gamma*xhat + beta + residual)), and the sums over cells that loss and backward need.
#include "elements.h"
#include "extended.h"

namespace layerwise::cuda {
namespace {

// A task is one piece of channels of one cell of one sample, for task_warps warps, as in apply.cu.
template <class T, class I, int V, bool kPiecewise>
__global__ void __launch_bounds__(kThreads, 1)
    extended_cells(Apply p, int task_warps, int lanes, int64_t chunks, int64_t tasks) {
  using A = Compute<T>;
  LAYERWISE_SHARED(A, shared, kWarps * kWarp * V);
  const Extension& x = p.norm.extension;
  const I channels = p.map.shape.c, height = x.pooled_h, width = x.pooled_w;
  const I bins_h = p.bins_h, bins_w = p.bins_w, pieces = chunks;
  const int warp = threadIdx.x / kWarp, part = warp % task_warps;
  const I task = static_cast<I>(blockIdx.x) * (kWarps / task_warps) + warp / task_warps;
  if (task >= tasks) return;  // by whole warps, and by none where a block shares a task
  const Lane lane = lane_of(threadIdx.x, lanes);
  const I c = (task % pieces * lanes + lane.x) * V, cell = task / pieces;
  const I j = cell % bins_w, row = cell / bins_w, i = row % bins_h, n = row / bins_h;
  const I h_end = cell_end(i, height, bins_h), w_end = cell_end(j, width, bins_w);
  // Rows and columns before these belong to an earlier cell, too, which writes them.
  const I h_own = cell_own_begin(i, height, bins_h), w_own = cell_own_begin(j, width, bins_w);
  const I h_begin = p.m1 != nullptr ? cell_begin(i, height, bins_h) : h_own;
  const I w_begin = p.m1 != nullptr ? cell_begin(j, width, bins_w) : w_own;

  enum { kM1, kA0, kA1, kC0, kM2, kB0, kB1, kC1, kSums };
  A sums[kSums][V] = {};
  if (c < channels && h_begin < h_end && w_begin < w_end) {
    const Elements<T, I, V, kPiecewise> elements(p.map.shape, p.norm, p.z, p.z_strides, n, c);
    const I first = part * lane.rows + lane.row, step = task_warps * lane.rows;
    const I count = share_of<I>(first, step, (h_end - h_begin) * (w_end - w_begin));
    PixelWalk<I> walk(first, step, h_begin, w_begin, w_end);
    T* const y = p.y == nullptr ? nullptr : static_cast<T*>(p.y) + offset_of<I>(p.y_strides, n, c, 0, 0);
    const auto use = [&](const Unit<A>(&e)[V], const PixelWalk<I>& at) {
      A values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] = e[v].y;
        sums[kM1][v] += e[v].y;
        sums[kA0][v] += e[v].slope;
        sums[kA1][v] += e[v].slope_t;
        sums[kC0][v] += e[v].learned;
        sums[kM2][v] += e[v].y * e[v].y;
        sums[kB0][v] += e[v].y * e[v].slope;
        sums[kB1][v] += e[v].y * e[v].slope_t;
        sums[kC1][v] += e[v].y * e[v].learned;
      }
      if (y != nullptr && at.h >= h_own && at.w >= w_own)
        store_apart<V>(y + offset_of<I>(p.y_strides, 0, 0, at.h, at.w), p.y_strides.c, values);
    };
    Unit<A> e[V];
    if (x.pooling == Pooling::kNone) {
      for_each_pixel<V, elements.kLoads>(
          walk, count,
          [&](const A(&values)[2][V], const PixelWalk<I>& at) {
#pragma unroll
            for (int v = 0; v < V; ++v)
              e[v] = elements.element(v, elements.t(v, values[0][v]), values[1][v], at.h, at.w);
            use(e, at);
          },
          elements.z(), elements.residual());
    } else {
      I chosen[V];
      for (I k = 0; k < count; ++k, walk.next()) {
        elements.pooled(walk.h, walk.w, e, chosen);
        use(e, walk);
      }
    }
  }
  if (p.m1 == nullptr) return;

  Map moments = p.map;
  moments.shape.c *= x.channel_step;
  const int64_t plane = p.map.shape.n * moments.shape.c * p.bins_h * p.bins_w;
  const Strides strides = moment_strides(moments, p.bins_h, p.bins_w);
  const int64_t apart = strides.c * x.channel_step, place = n * strides.n + c * apart + i * strides.h + j * strides.w;
  A rstd[V] = {};
  if (c < channels) load_rstd(p.norm, c, rstd);
  A* next = static_cast<A*>(p.sums);
  const auto reserve = [&](bool wanted) {
    A* const target = wanted ? next : nullptr;
    if (wanted) next += plane;
    return target;
  };
  const bool second = p.m2 != nullptr, learned = x.slopes != nullptr;
  A* const a0 = reserve(true);
  A* const a1 = reserve(true);
  A* const b0 = reserve(second);
  A* const b1 = reserve(second);
  A* const c0 = reserve(learned);
  A* const c1 = reserve(learned && second);
  A* const targets[kSums] = {static_cast<A*>(p.m1), a0, a1, c0, static_cast<A*>(p.m2), b0, b1, c1};
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    if (targets[s] == nullptr) continue;
    A total[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      total[v] = sum_over_rows(sums[s][v], lanes);
      if (task_warps > 1 && lane.row == 0) shared[(warp * lanes + lane.x) * V + v] = total[v];
    }
    if (task_warps > 1) {
      __syncthreads();
#pragma unroll
      for (int v = 0; v < V; ++v) {
        total[v] = A(0);
        for (int w = 0; w < task_warps; ++w) total[v] += shared[(w * lanes + lane.x) * V + v];
      }
      __syncthreads();
    }
    if (part != 0 || lane.row != 0 || c >= channels) continue;
#pragma unroll
    for (int v = 0; v < V; ++v)
      targets[s][place + v * apart] = s == kA1 || s == kB1 ? total[v] * rstd[v] : total[v];  // t * rstd = xhat
  }
}

}  // namespace

void extended_apply(const Apply& p, Stream stream) {
  constexpr int64_t kPixelsOfWarpThread = 32;  // as in apply.cu
  const Extension& x = p.norm.extension;
  const Shape& s = p.map.shape;
  with_extended_instance(
      p.map, p.norm, cells_need_64_bits(p.map),
      [&]<class T, class I, int V, bool kPiecewise>() {
        const ChannelSplit split = split_channels(s.c, V, p.map.layout);
        const int64_t tasks = s.n * p.bins_h * p.bins_w * split.chunks;
        const int64_t area = ((x.pooled_h + p.bins_h - 1) / p.bins_h) * ((x.pooled_w + p.bins_w - 1) / p.bins_w);
        const int task_warps = area * split.lanes > kPixelsOfWarpThread * kWarp ? kWarps : 1;
        const int64_t blocks = (tasks * task_warps + kWarps - 1) / kWarps;
        launch(extended_cells<T, I, V, kPiecewise>, blocks, kThreads, stream, p, task_warps, split.lanes, split.chunks,
               tasks);
      },
      Access{p.z, p.z_strides}, Access{x.residual, x.residual_strides}, apart(p.y, p.y_strides, x));
}

}  // namespace layerwise::cuda
