// Batch statistics: every block finds mean and M2 (the sum of squared deviations) of some pixels, then one warp per
// channel combines the blocks in a fixed order (Chan, Golub, LeVeque 1983).  No sum of squares about zero is formed here,
// so a mean much larger than the deviation does not cancel; what comes from a convolution that summed on its own are
// sums over single tiles.
#include "common.h"

namespace layerwise::cuda {
namespace {

constexpr int64_t kPixelsOfBlock = 512;
constexpr int kResident = 3;  // blocks that a multiprocessor holds at once
constexpr int64_t kWaves = 2;  // of those, per piece of channels, where there is enough to do

Cut cut(const Map& map) {
  const Shape& s = map.shape;
  return cut_rows(s.n * s.h * s.w, kPixelsOfBlock, kWaves * kResident * multiprocessors());
}

// A thread sums deviations from its own first pixel, an outlier at worst for itself.  The block then sums over its threads
// about its first pixel, in double: so neither needs a division per step.  partial: [C, blocks]
template <class T, class I, int V>
__global__ void __launch_bounds__(kThreads, sizeof(I) == 4 ? kResident : 2)  // wide offsets take registers
    block_statistics(Statistics p, Cut cut, int lanes, int64_t chunks) {
  using A = Compute<T>;
  constexpr int kValues = kWarp * V;  // channels of a block, at most
  LAYERWISE_SHARED(double, shared, 2 * kWarps * kValues);
  const I channels = p.map.shape.c, height = p.map.shape.h, width = p.map.shape.w;
  const I chunk = blockIdx.x % static_cast<I>(chunks), block = blockIdx.x / static_cast<I>(chunks);
  const int warp = threadIdx.x / kWarp;
  const Lane lane = lane_of(threadIdx.x, lanes);
  const I c = (chunk * lanes + lane.x) * V, begin = cut.begin(block), end = cut.end(block);
  const I step = lane.rows * kWarps, first = begin + warp * lane.rows + lane.row;
  const T* z = static_cast<const T*>(p.z);
  // Rows of all samples, one below the other.
  const auto offset = [&](const PixelWalk<I>& at) {
    const I n = height == 1 ? at.h : at.h / height;
    return offset_of<I>(p.z_strides, n, 0, at.h - n * height, at.w);
  };
  const T* first_pixel = z + offset(PixelWalk<I>(begin, 1, 0, 0, width));

  A shift[V] = {}, sum[V] = {}, square[V] = {}, reference[V] = {};
  const I count = c < channels ? share_of<I>(first, step, end) : I(0);
  if (count > 0) {
    const T* of_channels = z + c * static_cast<I>(p.z_strides.c);
    const PixelWalk<I> walk(first, step, 0, 0, width);
    load<V>(of_channels + offset(walk), shift);
    for_each_pixel<V>(
        walk, count,
        [&](const A(&values)[1][V], const PixelWalk<I>&) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A d = values[0][v] - shift[v];
            sum[v] += d;
            square[v] += d * d;
          }
        },
        Source{of_channels, offset});
    load<V>(first_pixel + c * static_cast<I>(p.z_strides.c), reference);
  }
  const A inverse_count = count > 0 ? A(1) / static_cast<A>(count) : A(0);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const double mean = sum[v] * inverse_count;  // but for the shift
    const double d = static_cast<double>(shift[v]) - static_cast<double>(reference[v]) + mean;
    const double deviations = sum_over_rows(count * d, lanes);
    const double squares = sum_over_rows(square[v] - sum[v] * mean + count * d * d, lanes);
    if (lane.row != 0) continue;
    shared[warp * kValues + lane.x * V + v] = deviations;
    shared[(kWarps + warp) * kValues + lane.x * V + v] = squares;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < lanes * V; i += kThreads) {
    const I channel = chunk * lanes * V + i;
    if (channel >= channels) continue;
    double deviations = 0, squares = 0;
    for (int w = 0; w < kWarps; ++w) {
      deviations += shared[w * kValues + i];
      squares += shared[(kWarps + w) * kValues + i];
    }
    const double mean = deviations / static_cast<double>(end - begin);
    const double shift_of_block = widen(first_pixel[channel * static_cast<I>(p.z_strides.c)]);
    p.partial[static_cast<int64_t>(channel) * cut.blocks + block] = {shift_of_block + mean,
                                                                     squares - deviations * mean};
  }
}

// A warp per channel; sums about the mean of the first block, so that there is no division per block.
template <class A>
__global__ void __launch_bounds__(kThreads) combine_statistics(Statistics p, Cut cut) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (c >= p.map.shape.c) return;
  const int lane = threadIdx.x % kWarp;
  const Moments* partial = p.partial + c * cut.blocks;
  const double reference = partial[0].mean, pixels = static_cast<double>(cut.rows);
  double deviations = 0, squares = 0;
  for (int64_t b = lane; b < cut.blocks; b += kWarp) {
    const double count = static_cast<double>(cut.end(b) - cut.begin(b)), d = partial[b].mean - reference;
    deviations += count * d;
    squares += partial[b].m2 + count * d * d;
  }
  deviations = sum_over_rows(deviations, 1);
  squares = sum_over_rows(squares, 1);
  if (lane != 0) return;
  const double var = (squares - deviations * (deviations / pixels)) / pixels;
  static_cast<A*>(p.mean)[c] = static_cast<A>(reference + deviations / pixels);
  static_cast<A*>(p.var)[c] = static_cast<A>(var < 0 ? 0 : var);
}

constexpr int kTileChannels = 8;  // neighbouring ones, 32 bytes, that a block combines

// In double the squares do not cancel; each is the sum of one tile, whose float32 is more precise than the elements of z.
__global__ void __launch_bounds__(kThreads) combine_tiles(TileSums p) {
  LAYERWISE_SHARED(double, shared, 2 * kWarps * kTileChannels);
  const Lane lane = lane_of(threadIdx.x, kTileChannels);
  const int warp = threadIdx.x / kWarp;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kTileChannels + lane.x;
  double sum = 0, square = 0;
  if (c < p.channels) {
#pragma unroll 8
    for (int64_t t = warp * lane.rows + lane.row; t < p.tiles; t += kWarps * lane.rows) {
      sum += p.sums[t * p.row_stride + c];
      square += p.squares[t * p.row_stride + c];
    }
  }
  sum = sum_over_rows(sum, kTileChannels);
  square = sum_over_rows(square, kTileChannels);
  if (lane.row == 0) {
    shared[warp * kTileChannels + lane.x] = sum;
    shared[(kWarps + warp) * kTileChannels + lane.x] = square;
  }
  __syncthreads();
  if (warp != 0 || lane.row != 0 || c >= p.channels) return;
  for (int w = 1; w < kWarps; ++w) {
    sum += shared[w * kTileChannels + lane.x];
    square += shared[(kWarps + w) * kTileChannels + lane.x];
  }
  const double rows = static_cast<double>(p.rows), mean = sum / rows, var = square / rows - mean * mean;
  p.mean[c] = static_cast<float>(mean);
  p.var[c] = static_cast<float>(var < 0 ? 0 : var);
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

int64_t statistics_partials(const Map& map) { return map.shape.c * cut(map).blocks; }

void statistics(const Statistics& given, Stream stream) {
  Statistics p = given;
  const Cut pixels = cut(p.map);
  if (is_one_row(p.map.shape, p.z_strides)) p.map.shape = one_row(p.map.shape);
  with_instance(
      p.map, false,
      [&]<class T, class I, int V>() {
        const ChannelSplit split = split_channels(p.map.shape.c, V, p.map.layout);
        launch(block_statistics<T, I, V>, pixels.blocks * split.chunks, kThreads, stream, p, pixels, split.lanes,
               split.chunks);
      },
      Access{p.z, p.z_strides});
  const int64_t blocks = (p.map.shape.c + kWarps - 1) / kWarps;
  if (p.map.dtype == DType::kFloat64)
    launch(combine_statistics<double>, blocks, kThreads, stream, p, pixels);
  else
    launch(combine_statistics<float>, blocks, kThreads, stream, p, pixels);
}

void combine_tile_sums(const TileSums& p, Stream stream) {
  launch(combine_tiles, (p.channels + kTileChannels - 1) / kTileChannels, kThreads, stream, p);
}

void update_running_statistics(const RunningStatistics& p, Stream stream) {
  const int64_t blocks = (p.channels + kThreads - 1) / kThreads;
  if (p.dtype == DType::kFloat64)
    launch(update_statistics<double>, blocks, kThreads, stream, p);
  else
    launch(update_statistics<float>, blocks, kThreads, stream, p);
}

}  // namespace layerwise::cuda
