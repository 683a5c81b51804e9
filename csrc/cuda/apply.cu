// y = act(gamma*xhat + beta), and the sums over cells that loss and backward need, in one pass over z.
#include "extended.h"

namespace layerwise::cuda {
namespace {

// A pooling cell whose share of pixels per thread would be longer than this is given to a whole block.
constexpr int64_t kPixelsOfWarpThread = 32;

// The sums over a cell, in the order of memory: m1, A0, A1, then m2, B0, B1 (params.h).
template <class A, bool kSecond, int V>
struct CellSums {
  static constexpr int kCount = kSecond ? 6 : 3;
  A values[kCount][V] = {};

  LAYERWISE_MEMBER void add(int v, Activated<A> a, A t) {
    values[0][v] += a.y;
    values[1][v] += a.slope;
    values[2][v] += a.slope * t;
    if constexpr (kSecond) {
      const A slope_y = a.slope * a.y;
      values[3][v] += a.y * a.y;
      values[4][v] += slope_y;
      values[5][v] += slope_y * t;
    }
  }
};

// A task is one piece of channels of one cell of one sample, for task_warps warps.
template <class T, class I, int V, bool kMoments, bool kSecond>
__global__ void __launch_bounds__(kThreads, sizeof(I) == 4 ? 2 : 1)
    apply_cells(Apply p, int task_warps, int lanes, int64_t chunks, int64_t tasks) {
  using A = Compute<T>;
  LAYERWISE_SHARED(A, shared, kWarps * kWarp * V);
  const I channels = p.map.shape.c, height = p.map.shape.h, width = p.map.shape.w;
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
  const I h_begin = kMoments ? cell_begin(i, height, bins_h) : h_own;
  const I w_begin = kMoments ? cell_begin(j, width, bins_w) : w_own;

  CellSums<A, kSecond, V> sums;
  if (c < channels && h_begin < h_end && w_begin < w_end) {
    const Coefficients<A, V> k(p.norm, c);
    const I first = part * lane.rows + lane.row, step = task_warps * lane.rows;
    const I count = share_of<I>(first, step, (h_end - h_begin) * (w_end - w_begin));
    T* const y = p.y == nullptr ? nullptr : static_cast<T*>(p.y) + offset_of<I>(p.y_strides, n, c, 0, 0);
    const T* const z = static_cast<const T*>(p.z) + offset_of<I>(p.z_strides, n, c, 0, 0);
    for_each_pixel<V>(
        PixelWalk<I>(first, step, h_begin, w_begin, w_end), count,
        [&](A(&values)[1][V], const PixelWalk<I>& at) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A t = values[0][v] - k.mean[v];
            const Activated<A> a = activated(p.norm.activation, k.u(v, t));
            values[0][v] = a.y;
            if constexpr (kMoments) sums.add(v, a, t);
          }
          if (y != nullptr && at.h >= h_own && at.w >= w_own)
            store<V>(y + offset_of<I>(p.y_strides, 0, 0, at.h, at.w), values[0]);
        },
        Source{z, [&](const PixelWalk<I>& at) { return offset_of<I>(p.z_strides, 0, 0, at.h, at.w); }});
  }
  if constexpr (kMoments) {
    const int64_t plane = p.map.shape.n * channels * p.bins_h * p.bins_w;
    const int64_t place = offset_of<int64_t>(moment_strides(p.map, p.bins_h, p.bins_w), n, c, i, j);
    A rstd[V] = {};
    if (c < channels) load_rstd(p.norm, c, rstd);
    A* const targets[] = {static_cast<A*>(p.m1),
                          static_cast<A*>(p.sums),
                          static_cast<A*>(p.sums) + plane,
                          static_cast<A*>(p.m2),
                          static_cast<A*>(p.sums) + 2 * plane,
                          static_cast<A*>(p.sums) + 3 * plane};
#pragma unroll
    for (int s = 0; s < sums.kCount; ++s) {
      A total[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        total[v] = sum_over_rows(sums.values[s][v], lanes);
        if (task_warps > 1) {
          if (lane.row == 0) shared[(warp * lanes + lane.x) * V + v] = total[v];
        }
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
      if (s == 2 || s == 5) {
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] *= rstd[v];  // t * rstd = xhat
      }
      store_values(targets[s] + place, total);
    }
  }
}

}  // namespace

void apply(const Apply& p, Stream stream) {
  if (is_extended(p.norm.activation, p.norm.extension)) return extended_apply(p, stream);
  const Shape& s = p.map.shape;
  with_instance(
      p.map, cells_need_64_bits(p.map),
      [&]<class T, class I, int V>() {
        const ChannelSplit split = split_channels(s.c, V, p.map.layout);
        const int64_t tasks = s.n * p.bins_h * p.bins_w * split.chunks;
        const int64_t area = ((s.h + p.bins_h - 1) / p.bins_h) * ((s.w + p.bins_w - 1) / p.bins_w);
        const int task_warps = area * split.lanes > kPixelsOfWarpThread * kWarp ? kWarps : 1;
        const int64_t blocks = (tasks * task_warps + kWarps - 1) / kWarps;
        const auto run = [&]<bool kMoments, bool kSecond>() {
          launch(apply_cells<T, I, V, kMoments, kSecond>, blocks, kThreads, stream, p, task_warps, split.lanes,
                 split.chunks, tasks);
        };
        if (p.m1 == nullptr)
          run.template operator()<false, false>();
        else if (p.m2 == nullptr)
          run.template operator()<true, false>();
        else
          run.template operator()<true, true>();
      },
      Access{p.z, p.z_strides}, Access{p.y, p.y_strides});
}

}  // namespace layerwise::cuda
