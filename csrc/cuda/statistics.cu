// Batch statistics: every block finds mean and M2 (the sum of squared deviations) of some pixels, then one warp per
// channel combines the blocks in a fixed order (Chan, Golub, LeVeque 1983).  No sum of squares about zero is ever formed,
// so a mean much larger than the deviation does not cancel.
#include "common.h"

namespace layerwise::cuda {
namespace {

constexpr int64_t kPixelsOfThread = 64;  // about so many terms are summed in A before they are combined as moments
constexpr int64_t kMostBlocks = 1024;  // of pixels, per piece of channels

// The share needs the precision of A only: its error is relative to the difference of the means.
template <class A>
LAYERWISE_DEVICE void add(Moments& m, const Moments& o) {
  const double total = m.count + o.count;
  if (total == 0) return;
  const double delta = o.mean - m.mean, share = static_cast<A>(o.count) / static_cast<A>(total);
  m.mean += delta * share;
  m.m2 += o.m2 + delta * delta * m.count * share;
  m.count = total;
}
LAYERWISE_DEVICE Moments shuffled(const Moments& m, int offset) {
  return {__shfl_xor_sync(kAllLanes, m.count, offset), __shfl_xor_sync(kAllLanes, m.mean, offset),
          __shfl_xor_sync(kAllLanes, m.m2, offset)};
}

struct Cut {
  int64_t pixels;  // of the map, per channel
  int64_t blocks;  // that share them
};
Cut cut(const Map& map) {
  const Shape& s = map.shape;
  const int64_t pixels = s.n * s.h * s.w;
  // A block has at least 8 threads across pixels.
  const int64_t wanted = (pixels + 8 * kPixelsOfThread - 1) / (8 * kPixelsOfThread);
  return {pixels, wanted < kMostBlocks ? wanted : kMostBlocks};
}

// partial: [blocks, C]
template <class T, class I, int V>
__global__ void __launch_bounds__(kThreads, 3) block_statistics(Statistics p, Cut cut, int lanes, int64_t chunks) {
  using A = Compute<T>;
  LAYERWISE_SHARED(Moments, shared, kWarps * kWarp);
  const Shape& shape = p.map.shape;
  const int64_t chunk = blockIdx.x % chunks, block = blockIdx.x / chunks;
  const int warp = threadIdx.x / kWarp;
  const Lane lane = lane_of(threadIdx.x, lanes);
  const int64_t c = (chunk * lanes + lane.x) * V;
  const int64_t begin = block * cut.pixels / cut.blocks, end = (block + 1) * cut.pixels / cut.blocks;
  const int64_t step = lane.rows * kWarps, first = begin + warp * lane.rows + lane.row;

  A shift[V] = {}, sum[V] = {}, square[V] = {}, value[V];
  int64_t count = 0;
  if (c < shape.c && first < end) {
    const T* z = static_cast<const T*>(p.z);
    // Rows of all samples, one below the other.
    PixelWalk walk(first, step, 0, 0, shape.w);
    const auto address = [&] {
      const int64_t n = walk.h / shape.h;
      return z + offset_of<I>(p.z_strides, n, c, walk.h - n * shape.h, walk.w);
    };
    load<V>(address(), shift);
    count = (end - first + step - 1) / step;
    for (int64_t i = 0; i < count; ++i, walk.next()) {
      load<V>(address(), value);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A d = value[v] - shift[v];
        sum[v] += d;
        square[v] += d * d;
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Moments m{static_cast<double>(count), 0, 0};
    if (count > 0) {
      const double mean = sum[v] / static_cast<A>(count);
      m.mean = shift[v] + mean;
      m.m2 = square[v] - sum[v] * mean;
    }
    for (int offset = lanes; offset < kWarp; offset *= 2) add<A>(m, shuffled(m, offset));
    if (lane.row == 0) shared[warp * lanes + lane.x] = m;
    __syncthreads();
    if (warp == 0 && lane.row == 0 && c < shape.c) {
      for (int w = 1; w < kWarps; ++w) add<A>(m, shared[w * lanes + lane.x]);
      p.partial[block * shape.c + c + v] = m;
    }
    __syncthreads();
  }
}

// A warp per channel.
template <class A>
__global__ void __launch_bounds__(kThreads) combine_statistics(Statistics p, int64_t blocks) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (c >= p.map.shape.c) return;
  const int lane = threadIdx.x % kWarp;
  Moments total{0, 0, 0};
  for (int64_t b = lane; b < blocks; b += kWarp) add<double>(total, p.partial[b * p.map.shape.c + c]);
  for (int offset = 1; offset < kWarp; offset *= 2) add<double>(total, shuffled(total, offset));
  if (lane != 0) return;
  static_cast<A*>(p.mean)[c] = static_cast<A>(total.mean);
  static_cast<A*>(p.var)[c] = static_cast<A>(total.m2 / total.count);
}

template <class A>
__global__ void __launch_bounds__(kThreads) update_statistics(RunningStatistics p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= p.channels) return;
  A &running_mean = static_cast<A*>(p.running_mean)[c], &running_var = static_cast<A*>(p.running_var)[c];
  const double shift = p.shift == nullptr ? 0 : static_cast<const A*>(p.shift)[c];
  const double mean = static_cast<const A*>(p.mean)[c] + shift;
  const double var = static_cast<const A*>(p.var)[c] * (p.count / (p.count - 1));
  running_mean = static_cast<A>((1 - p.momentum) * running_mean + p.momentum * mean);
  running_var = static_cast<A>((1 - p.momentum) * running_var + p.momentum * var);
}

}  // namespace

int64_t statistics_partials(const Map& map) { return cut(map).blocks * map.shape.c; }

void statistics(const Statistics& p, Stream stream) {
  const Cut pixels = cut(p.map);
  with_instance(
      p.map,
      [&]<class T, class I, int V>() {
        const ChannelSplit split = split_channels(p.map.shape.c, V, p.map.layout);
        launch(block_statistics<T, I, V>, pixels.blocks * split.chunks, kThreads, stream, p, pixels, split.lanes,
               split.chunks);
      },
      Access{p.z, p.z_strides});
  const int64_t blocks = (p.map.shape.c + kWarps - 1) / kWarps;
  if (p.map.dtype == DType::kFloat64)
    launch(combine_statistics<double>, blocks, kThreads, stream, p, pixels.blocks);
  else
    launch(combine_statistics<float>, blocks, kThreads, stream, p, pixels.blocks);
}

void update_running_statistics(const RunningStatistics& p, Stream stream) {
  const int64_t blocks = (p.channels + kThreads - 1) / kThreads;
  if (p.dtype == DType::kFloat64)
    launch(update_statistics<double>, blocks, kThreads, stream, p);
  else
    launch(update_statistics<float>, blocks, kThreads, stream, p);
}

}  // namespace layerwise::cuda
