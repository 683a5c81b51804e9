// Backward: dgamma and dbeta from the forward pass's sums and from a dense gradient of y, then dz in one pass over z.
#include "common.h"

namespace layerwise::cuda {
namespace {

constexpr int64_t kRowsOfBlock = 512;  // cells or pixels per channel that a block sums
constexpr int64_t kMostBlocks = 512;

int64_t blocks_for(int64_t rows) {
  const int64_t wanted = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  return wanted < kMostBlocks ? wanted : kMostBlocks;
}

int64_t pixels_of(const Map& map) { return map.shape.n * map.shape.h * map.shape.w; }
int64_t cells_of(const Map& map, int64_t bins_h, int64_t bins_w) { return map.shape.n * bins_h * bins_w; }

// Adds up the pairs of a block's threads and writes them to partial[block, C, (dgamma, dbeta)].
template <class A, int V>
LAYERWISE_DEVICE void write_block(A (&dgamma)[V], A (&dbeta)[V], A* shared, A* partial, int64_t channels, int64_t chunk,
                                  int lanes, const Lane& lane) {
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const A sums[] = {sum_over_rows(dgamma[v], lanes), sum_over_rows(dbeta[v], lanes)};
    if (lane.row == 0) {
      for (int k = 0; k < 2; ++k) shared[2 * ((warp * lanes + lane.x) * V + v) + k] = sums[k];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * lanes * V; i += kThreads) {
    const int64_t channel = chunk * lanes * V + i / 2;
    if (channel >= channels) continue;
    A total = A(0);
    for (int w = 0; w < kWarps; ++w) total += shared[2 * w * lanes * V + i];
    partial[2 * channel + i % 2] = total;
  }
}

// dbeta = sum p*A0 + 2*q*B0, dgamma = sum p*A1 + 2*q*B1 over some of the cells.  The sums lie as m1 does.
template <class A>
__global__ void __launch_bounds__(kThreads) cell_sums(BackwardSums p, int lanes, int64_t chunks, int64_t blocks) {
  LAYERWISE_SHARED(A, shared, 2 * kWarps * kWarp);
  const Shape& shape = p.map.shape;
  const int64_t chunk = blockIdx.x % chunks, block = blockIdx.x / chunks;
  const Lane lane = lane_of(threadIdx.x, lanes);
  const int64_t c = chunk * lanes + lane.x, cells = p.bins_h * p.bins_w, rows = shape.n * cells;
  const int64_t begin = block * rows / blocks, end = (block + 1) * rows / blocks;
  const Strides strides = moment_strides(p.map, p.bins_h, p.bins_w);
  const int64_t plane = rows * shape.c;
  const A* sums = static_cast<const A*>(p.sums);
  A dgamma[1] = {}, dbeta[1] = {};
  for (int64_t row = begin + threadIdx.x / kWarp * lane.rows + lane.row; row < end && c < shape.c;
       row += lane.rows * kWarps) {
    const int64_t n = row / cells, cell = row - n * cells;
    // Both layouts have their cells at equal distances.
    const int64_t at = n * strides.n + c * strides.c + cell * strides.w;
    const A value = p.p == nullptr ? A(0) : static_cast<const A*>(p.p)[at];
    dbeta[0] += value * sums[at];
    dgamma[0] += value * sums[plane + at];
    if (p.q != nullptr) {
      const A two_q = A(2) * static_cast<const A*>(p.q)[at];
      dbeta[0] += two_q * sums[2 * plane + at];
      dgamma[0] += two_q * sums[3 * plane + at];
    }
  }
  write_block<A, 1>(dgamma, dbeta, shared, static_cast<A*>(p.partial) + 2 * block * shape.c, shape.c, chunk, lanes,
                    lane);
}

// The dense part: sum of s*g and of s*g*xhat over some of the pixels.
template <class T, class I, int V>
__global__ void __launch_bounds__(kThreads)
    dense_sums(BackwardSums p, int64_t first_block, int lanes, int64_t chunks, int64_t blocks) {
  using A = Compute<T>;
  LAYERWISE_SHARED(A, shared, 2 * kWarps * kWarp * V);
  const Shape& shape = p.map.shape;
  const int64_t chunk = blockIdx.x % chunks, block = blockIdx.x / chunks;
  const Lane lane = lane_of(threadIdx.x, lanes);
  const int64_t c = (chunk * lanes + lane.x) * V, pixels = shape.n * shape.h * shape.w;
  const int64_t begin = block * pixels / blocks, end = (block + 1) * pixels / blocks;
  const int64_t step = lane.rows * kWarps, first = begin + threadIdx.x / kWarp * lane.rows + lane.row;
  A dgamma[V] = {}, dbeta[V] = {};
  if (c < shape.c && first < end) {
    const Coefficients<A, V> k(p.norm, c);
    const T *z = static_cast<const T*>(p.z), *grad_y = static_cast<const T*>(p.grad_y);
    PixelWalk walk(first, step, 0, 0, shape.w);  // rows of all samples, one below the other
    for (int64_t i = first; i < end; i += step, walk.next()) {
      const int64_t n = walk.h / shape.h, h = walk.h - n * shape.h;
      A value[V], gradient[V];
      load<V>(z + offset_of<I>(p.z_strides, n, c, h, walk.w), value);
      load<V>(grad_y + offset_of<I>(p.grad_y_strides, n, c, h, walk.w), gradient);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A t = value[v] - k.mean[v];
        const A g = activated(p.norm.activation, k.u(v, t)).slope * gradient[v];
        dbeta[v] += g;
        dgamma[v] += g * t;
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) dgamma[v] *= k.rstd[v];
  }
  write_block<A, V>(dgamma, dbeta, shared, static_cast<A*>(p.partial) + 2 * (first_block + block) * shape.c, shape.c,
                    chunk, lanes, lane);
}

// A warp per channel, in double and in a fixed order.
template <class A>
__global__ void __launch_bounds__(kThreads) combine_sums(BackwardSums p, int64_t blocks) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (c >= p.map.shape.c) return;
  const int lane = threadIdx.x % kWarp;
  double dgamma = 0, dbeta = 0;
  for (int64_t b = lane; b < blocks; b += kWarp) {
    const A* sums = static_cast<const A*>(p.partial) + 2 * (b * p.map.shape.c + c);
    dgamma += sums[0];
    dbeta += sums[1];
  }
  dgamma = sum_over_rows(dgamma, 1);
  dbeta = sum_over_rows(dbeta, 1);
  if (lane != 0) return;
  static_cast<A*>(p.dgamma)[c] = static_cast<A>(dgamma);
  static_cast<A*>(p.dbeta)[c] = static_cast<A>(dbeta);
}

// p or q of a segment, times gamma*rstd: the sum over the cells that cover it.
template <class A, int V>
LAYERWISE_INLINE void scaled_cells(const void* gradient, const Strides& strides, int64_t n, int64_t c,
                                   const Segment& rows, const Segment& columns, const A (&scale)[V], A (&sum)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = A(0);
  if (gradient == nullptr) return;
  for (int64_t i = rows.first_cell; i <= rows.last_cell; ++i) {
    for (int64_t j = columns.first_cell; j <= columns.last_cell; ++j) {
      const A* cell = static_cast<const A*>(gradient) + offset_of<int64_t>(strides, n, c, i, j);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += cell[v];
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] *= scale[v];
}

// dz = s * (scale*p + scale*2q * y + scale*grad_y) - (scale*dbeta/M + rstd*scale*dgamma/M * t).  A task is one piece of
// channels of one segment (cells.h) of one sample; where cells do not overlap only every second segment has elements.
template <class T, class I, int V>
__global__ void __launch_bounds__(kThreads) form_gradient(InputGradient p, int task_warps, int stride_h, int stride_w,
                                                          int lanes, int64_t chunks, int64_t tasks) {
  using A = Compute<T>;
  const Shape& shape = p.map.shape;
  const int warp = threadIdx.x / kWarp, part = warp % task_warps;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (kWarps / task_warps) + warp / task_warps;
  if (task >= tasks) return;
  const Lane lane = lane_of(threadIdx.x, lanes);
  const int64_t c = (task % chunks * lanes + lane.x) * V, place = task / chunks;
  const int64_t rows_h = (segment_count(p.bins_h) - 1) / stride_h + 1;
  const int64_t rows_w = (segment_count(p.bins_w) - 1) / stride_w + 1;
  const int64_t n = place / rows_w / rows_h;
  const Segment rows = segment(place / rows_w % rows_h * stride_h, shape.h, p.bins_h);
  const Segment columns = segment(place % rows_w * stride_w, shape.w, p.bins_w);
  if (c >= shape.c || rows.begin >= rows.end || columns.begin >= columns.end) return;

  const Coefficients<A, V> k(p.norm, c);
  A mean_dbeta[V], mean_dgamma[V], cell_p[V], two_q[V];
  const A inverse_count = p.count > 0 ? static_cast<A>(1 / p.count) : A(0);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mean_dbeta[v] = k.scale[v] * static_cast<const A*>(p.dbeta)[c + v] * inverse_count;
    mean_dgamma[v] = k.scale[v] * static_cast<const A*>(p.dgamma)[c + v] * inverse_count * k.rstd[v];
  }
  const Strides strides = moment_strides(p.map, p.bins_h, p.bins_w);
  scaled_cells(p.p, strides, n, c, rows, columns, k.scale, cell_p);
  scaled_cells(p.q, strides, n, c, rows, columns, k.scale, two_q);
  const T *z = static_cast<const T*>(p.z), *grad_y = static_cast<const T*>(p.grad_y);
  T* dz = static_cast<T*>(p.dz);
  for (PixelWalk walk(part * lane.rows + lane.row, task_warps * lane.rows, rows.begin, columns.begin, columns.end);
       walk.h < rows.end; walk.next()) {
    A value[V], gradient[V] = {};
    load<V>(z + offset_of<I>(p.z_strides, n, c, walk.h, walk.w), value);
    if (grad_y != nullptr) load<V>(grad_y + offset_of<I>(p.grad_y_strides, n, c, walk.h, walk.w), gradient);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A t = value[v] - k.mean[v];
      const Activated<A> a = activated(p.norm.activation, k.u(v, t));
      const A scaled_p = cell_p[v] + k.scale[v] * gradient[v];
      value[v] = affine_gradient(a, scaled_p, A(2) * two_q[v]) - (mean_dgamma[v] * t + mean_dbeta[v]);
    }
    store<V>(dz + offset_of<I>(p.dz_strides, n, c, walk.h, walk.w), value);
  }
}

}  // namespace

int64_t backward_sums_partials(const Map& map, int64_t bins_h, int64_t bins_w) {
  return 2 * map.shape.c * (blocks_for(pixels_of(map)) + blocks_for(cells_of(map, bins_h, bins_w)));
}

void backward_sums(const BackwardSums& p, Stream stream) {
  const int64_t channels = p.map.shape.c;
  int64_t blocks = 0;
  if (p.p != nullptr || p.q != nullptr) {
    blocks = blocks_for(cells_of(p.map, p.bins_h, p.bins_w));
    const ChannelSplit split = split_channels(channels, 1, p.map.layout);
    with_bool(p.map.dtype == DType::kFloat64, [&]<bool kDouble>() {
      using A = std::conditional_t<kDouble, double, float>;
      launch(cell_sums<A>, blocks * split.chunks, kThreads, stream, p, split.lanes, split.chunks, blocks);
    });
  }
  if (p.grad_y != nullptr) {
    const int64_t dense = blocks_for(pixels_of(p.map));
    with_instance(
        p.map,
        [&]<class T, class I, int V>() {
          const ChannelSplit split = split_channels(channels, V, p.map.layout);
          launch(dense_sums<T, I, V>, dense * split.chunks, kThreads, stream, p, blocks, split.lanes, split.chunks,
                 dense);
        },
        Access{p.z, p.z_strides}, Access{p.grad_y, p.grad_y_strides});
    blocks += dense;
  }
  const int64_t grid = (channels + kWarps - 1) / kWarps;
  if (p.map.dtype == DType::kFloat64)
    launch(combine_sums<double>, grid, kThreads, stream, p, blocks);
  else
    launch(combine_sums<float>, grid, kThreads, stream, p, blocks);
}

void input_gradient(const InputGradient& p, Stream stream) {
  constexpr int64_t kPixelsOfWarpThread = 32;  // as in apply.cu
  const Shape& s = p.map.shape;
  const int stride_h = s.h % p.bins_h == 0 ? 2 : 1, stride_w = s.w % p.bins_w == 0 ? 2 : 1;
  with_instance(
      p.map,
      [&]<class T, class I, int V>() {
        const ChannelSplit split = split_channels(s.c, V, p.map.layout);
        const int64_t segments =
            ((segment_count(p.bins_h) - 1) / stride_h + 1) * ((segment_count(p.bins_w) - 1) / stride_w + 1);
        const int64_t tasks = s.n * segments * split.chunks;
        const int64_t area = (s.h / p.bins_h) * (s.w / p.bins_w);
        const int task_warps = area * split.lanes > kPixelsOfWarpThread * kWarp ? kWarps : 1;
        const int64_t blocks = (tasks * task_warps + kWarps - 1) / kWarps;
        launch(form_gradient<T, I, V>, blocks, kThreads, stream, p, task_warps, stride_h, stride_w, split.lanes,
               split.chunks, tasks);
      },
      Access{p.z, p.z_strides}, Access{p.dz, p.dz_strides}, Access{p.grad_y, p.grad_y_strides});
}

}  // namespace layerwise::cuda
