#include "passes.h"

#include <algorithm>
#include <bit>

#include "blocks.h"
#include "direct_plan.h"
#include "dispatch.h"
#include "dot_plan.h"
#include "memory.h"
#include "winograd_plan.h"

namespace layerwise::cpu {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16 * 1024;
constexpr int64_t kGrainProducts = 16 * kGrainElements;  // the same for multiplications

int64_t grain(const Map& map, int64_t tasks) {
  const int64_t elements = map.shape.n * map.shape.c * map.shape.h * map.shape.w;
  return std::max<int64_t>(1, kGrainElements * tasks / std::max<int64_t>(1, elements));
}

template <class Params>
void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t tasks,
         const ParallelFor& parallel_for) {
  parallel_for(tasks, grain(p.map, tasks), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Results of a kernel in the type A of the map: float, or double for float64.
class Partials {
 public:
  Partials(const Map& map, int64_t count)
      : is_double_(map.dtype == DType::kFloat64), bytes_(count * (is_double_ ? 8 : 4)) {}
  void* data() { return bytes_.data(); }
  double operator[](int64_t i) const {
    return is_double_ ? reinterpret_cast<const double*>(bytes_.data())[i]
                      : reinterpret_cast<const float*>(bytes_.data())[i];
  }

 private:
  bool is_double_;
  std::vector<char> bytes_;
};

}  // namespace

void BatchStatistics::add(StatisticsParams p, const ParallelFor& parallel_for) {
  const Blocks blocks = statistics_blocks(p);
  const int64_t size = blocks.count * channels_;
  Partials mean(p.map, size), mean_rest(p.map, size), m2(p.map, size);
  p.block_mean = mean.data();
  p.block_mean_rest = mean_rest.data();
  p.block_m2 = m2.data();
  run(kernels().statistics, p, blocks.tasks, parallel_for);
  elements_ += p.map.shape.n * p.map.shape.h * p.map.shape.w;
  for (int64_t b = 0; b < blocks.count; ++b) block_elements_.push_back(block_elements(p.map, blocks, b));
  for (int64_t i = 0; i < size; ++i) {
    block_mean_.push_back(mean[i] + mean_rest[i]);
    block_m2_.push_back(m2[i]);
  }
}

void BatchStatistics::add_block(int64_t elements, const float* mean, const float* mean_rest, const float* m2) {
  elements_ += elements;
  block_elements_.push_back(elements);
  for (int64_t c = 0; c < channels_; ++c) block_mean_.push_back(static_cast<double>(mean[c]) + mean_rest[c]);
  block_m2_.insert(block_m2_.end(), m2, m2 + channels_);
}

// Chan, Golub, LeVeque 1983, all blocks at once: M2 = sum of the blocks' M2 and of count * (mean of block - mean)^2.
void BatchStatistics::finish(double* mean, double* var) const {
  const int64_t blocks = block_elements_.size();
  std::fill_n(mean, channels_, 0.0);
  std::fill_n(var, channels_, 0.0);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < channels_; ++c) mean[c] += block_elements_[b] * block_mean_[b * channels_ + c];
  for (int64_t c = 0; c < channels_; ++c) mean[c] /= elements_;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t c = 0; c < channels_; ++c) {
      const double deviation = block_mean_[b * channels_ + c] - mean[c];
      var[c] += block_m2_[b * channels_ + c] + block_elements_[b] * deviation * deviation;
    }
  }
  for (int64_t c = 0; c < channels_; ++c) var[c] /= elements_;
}

void apply(const ApplyParams& p, const ParallelFor& parallel_for) {
  const Shape& s = p.map.shape;
  run(kernels().apply, p, p.map.layout == Layout::kChannelsLast ? s.n * p.bins_h : s.n * s.c, parallel_for);
}

void dense_sums(DenseSumsParams p, double* dbeta, double* dgamma, double* dslope, const ParallelFor& parallel_for) {
  const int64_t channels = p.map.shape.c;
  int64_t blocks, tasks;
  if (needs_extended(p.map, p.activation, p.extension) && p.map.layout == Layout::kChannelsLast) {
    blocks = tasks = p.map.shape.n * divide_up(p.extension.pooled_h, extended_rows(p.extension));
  } else {
    const Blocks cut = dense_blocks(p);
    blocks = cut.count;
    tasks = cut.tasks;
  }
  const int64_t size = blocks * channels;
  Partials block_dbeta(p.map, size), block_dgamma(p.map, size), block_dslope(p.map, dslope == nullptr ? 0 : size);
  p.block_dbeta = block_dbeta.data();
  p.block_dgamma = block_dgamma.data();
  p.block_dslope = dslope == nullptr ? nullptr : block_dslope.data();
  run(kernels().dense_sums, p, tasks, parallel_for);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      dbeta[c] += block_dbeta[b * channels + c];
      dgamma[c] += block_dgamma[b * channels + c];
      if (dslope != nullptr) dslope[c] += block_dslope[b * channels + c];
    }
  }
}

void cell_sums(const CellSumsParams& p, const ParallelFor& parallel_for) {
  const Shape& s = p.map.shape;
  const int64_t elements = s.n * p.bins_h * p.bins_w;  // per channel
  const int64_t vector = 16;                           // a task's channels share cache lines
  parallel_for(s.c, std::max(vector, kGrainElements / elements),
               [&](int64_t begin, int64_t end) { kernels().cell_sums(p, begin, end); });
}

void input_gradient(const InputGradientParams& p, const ParallelFor& parallel_for) {
  const Shape& s = p.map.shape;
  const bool channels_last = p.map.layout == Layout::kChannelsLast;
  run(kernels().input_gradient, p, channels_last ? s.n * segment_count(p.bins_h) : s.n * s.c, parallel_for);
}

bool has_winograd(const Map& z, const Shape& x_shape, const Strides& x_strides, const Window& window) {
  // Of so few channels the transforms are most of the work, and the library multiplies pairs of bfloat16.
  constexpr int64_t kFewestChannels = 48;
  if (z.dtype == DType::kBFloat16 && kernels().pairs && x_shape.c + z.shape.c < kFewestChannels) return false;
  return kernels().winograd != nullptr && winograd_applies(z, x_shape, x_strides, window);
}

bool has_convolution(const Map& z, const Shape& x_shape, const Strides& x_strides, const Window& window) {
  return has_winograd(z, x_shape, x_strides, window) ||
         (kernels().direct_convolution != nullptr && direct_applies(z, x_shape, x_strides, window));
}

namespace {

// Statistics blocks of `groups` groups, where p's kernel writes them.
class GroupStatistics {
 public:
  GroupStatistics(ConvolutionParams& p, BatchStatistics* statistics, int64_t groups, int64_t group_blocks)
      : statistics_(statistics), channels_(p.map.shape.c), size_(groups * group_blocks * channels_) {
    if (statistics == nullptr) return;
    blocks_.resize(3 * size_);
    p.block_mean = blocks_.data();
    p.block_mean_rest = blocks_.data() + size_;
    p.block_m2 = blocks_.data() + 2 * size_;
  }

  // Of so many pixels, from the block `block` on.
  void add(int64_t block, int64_t pixels) {
    for (; statistics_ != nullptr && pixels > 0; ++block, pixels -= kBlockLength) {
      const float* mean = blocks_.data() + block * channels_;
      statistics_->add_block(std::min(pixels, kBlockLength), mean, mean + size_, mean + 2 * size_);
    }
  }

 private:
  BatchStatistics* statistics_;
  int64_t channels_, size_;
  std::vector<float> blocks_;
};

void winograd(ConvolutionParams p, BatchStatistics* statistics, const ParallelFor& parallel_for) {
  // Transformed weights for so many output channels at a time; what is transformed of the inputs is so again each time.
  constexpr int64_t kWeightBytes = 4 << 20;
  const int64_t channels = p.map.shape.c, inputs = p.x_shape.c;
  const WinogradPlan plan = winograd_plan(p.map, inputs);
  const int64_t block_bytes = winograd_weights(plan, inputs, kWinogradBlock) * sizeof(float);
  const int64_t step = std::max<int64_t>(1, kWeightBytes / block_bytes) * kWinogradBlock;
  Scratch weights(winograd_weights(plan, inputs, std::min(step, channels)) * sizeof(float));
  p.weights = weights.data();
  GroupStatistics blocks(p, statistics, plan.groups, plan.group_blocks);
  for (p.channel_begin = 0; p.channel_begin < channels; p.channel_begin = p.channel_end) {
    p.channel_end = std::min(p.channel_begin + step, channels);
    const int64_t taps = kWinogradTaps * kWinogradTaps * (p.channel_end - p.channel_begin);
    parallel_for(inputs, std::max<int64_t>(1, kGrainElements / taps),
                 [&](int64_t begin, int64_t end) { kernels().winograd_weights(p, begin, end); });
    parallel_for(plan.groups, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(winograd_scratch(plan, inputs));
      kernels().winograd(p, begin, end, scratch.data());
    });
  }
  for (int64_t group = 0; group < plan.groups; ++group) {
    const int64_t end = std::min((group + 1) * plan.group_rows, plan.rows);
    const PixelRun run = winograd_pixels(plan, p.map.shape, group * plan.group_rows, end);
    blocks.add(group * plan.group_blocks, run.last - run.first);
  }
}

void direct_convolution(ConvolutionParams p, BatchStatistics* statistics, const ParallelFor& parallel_for) {
  const Shape& shape = p.map.shape;
  const DirectPlan plan = direct_plan(p.map, p.x_shape, p.window);
  Scratch weights(direct_weights(plan, p.window, shape.c) * element_size(p.map.dtype));
  p.weights = weights.data();
  GroupStatistics blocks(p, statistics, plan.groups, plan.group_blocks);
  const int64_t row = 2 * plan.pairs * shape.c;
  parallel_for(p.window.kernel_h, divide_up(kGrainElements, row),
               [&](int64_t begin, int64_t end) { kernels().direct_weights(p, begin, end); });
  const int64_t products = plan.group_rows * shape.w * p.window.kernel_h * row;
  parallel_for(plan.groups, divide_up(kGrainProducts, products), [&](int64_t begin, int64_t end) {
    Scratch scratch(direct_scratch(plan, p.window));
    kernels().direct_convolution(p, begin, end, scratch.data());
  });
  for (int64_t group = 0; group < plan.groups; ++group) {
    const DirectRows rows = direct_rows(plan, shape, group);
    blocks.add(group * plan.group_blocks, (rows.end - rows.begin) * shape.w);
  }
}

}  // namespace

void convolution(const ConvolutionParams& p, BatchStatistics* statistics, const ParallelFor& parallel_for) {
  if (has_winograd(p.map, p.x_shape, p.x_strides, p.window)) return winograd(p, statistics, parallel_for);
  direct_convolution(p, statistics, parallel_for);
}

bool has_dot_convolution(const DotParams& p) {
  if (kernels().dot_convolution == nullptr || (p.map.dtype == DType::kBFloat16 && !kernels().pairs)) return false;
  return dot_applies(p);
}

void dot_convolution(DotParams p, const ParallelFor& parallel_for) {
  const DotPlan plan = dot_plan(p);
  std::vector<float> zeros(p.x_shape.c);
  std::vector<DotTap> taps(plan.groups * plan.taps);
  std::vector<int64_t> counts(plan.groups);
  for (int64_t i = 0; i < plan.groups; ++i) counts[i] = dot_taps(p, plan, i, zeros.data(), &taps[i * plan.taps]);
  p.taps = taps.data();
  p.tap_counts = counts.data();
  const int64_t products = plan.pixels * plan.taps * p.x_shape.c * kDotOutputs;
  parallel_for(p.map.shape.c / kDotOutputs, std::max<int64_t>(1, kGrainProducts / products),
               [&](int64_t begin, int64_t end) {
                 Scratch scratch(dot_scratch(p));
                 kernels().dot_convolution(p, begin, end, scratch.data());
               });
}

bool prefers_product(DType dtype, int64_t in_channels, int64_t out_channels) {
  constexpr int64_t kFewestChannels = 32;  // the library has no fast product of narrow matrices
  return dtype == DType::kBFloat16 && kernels().pairs && std::min(in_channels, out_channels) >= kFewestChannels;
}

bool has_weight_gradient(const Map& dz, const Shape& x_shape, const Strides& x_strides, const Window& window) {
  if (has_winograd(dz, x_shape, x_strides, window)) return true;
  if (kernels().weight_gradient == nullptr || dz.layout != Layout::kChannelsLast || x_strides.c != 1 ||
      dz.shape.c % kWeightGradientLanes != 0)
    return false;
  // Narrower maps leave too few sums in flight; measured, the library's convolution is then up to 1.1 times faster.
  constexpr int64_t kFewestInputs = 16, kFewestOutputs = 32;
  const bool wide = x_shape.c >= kFewestInputs && dz.shape.c >= kFewestOutputs;
  if (dz.dtype == DType::kFloat32) return wide;
  // Each column of the kernel has the inputs rewritten, which narrow outputs and wide kernels do not repay.
  constexpr int64_t kFewestProducts = 192, kWidestKernel = 5;
  return dz.dtype == DType::kBFloat16 && kernels().pairs &&
         (wide || (x_shape.c * dz.shape.c >= kFewestProducts && window.kernel_h <= kWidestKernel &&
                   window.kernel_w <= kWidestKernel));
}

namespace {

// A block of the weight's gradient, [kernel_h, kernel_w, c_end - c_begin, k_end - k_begin], and where it lies among all.
struct WeightBlock {
  int64_t index, k_begin, k_end, c_begin, c_end, offset;
};

WeightBlock weight_block(const WeightGradientParams& p, int64_t index) {
  const int64_t inputs = p.x_shape.c, outputs = p.gradient.map.shape.c;
  const int64_t step = weight_gradient_inputs(p), input_blocks = divide_up(inputs, step);
  WeightBlock b{};
  b.index = index / input_blocks;
  b.k_begin = b.index * kWeightGradientBlock;
  b.k_end = std::min(b.k_begin + kWeightGradientBlock, outputs);
  b.c_begin = index % input_blocks * step;
  b.c_end = std::min(b.c_begin + step, inputs);
  b.offset = p.window.kernel_h * p.window.kernel_w * (b.k_begin * inputs + b.c_begin * (b.k_end - b.k_begin));
  return b;
}

WeightGradientParams narrow_inputs(WeightGradientParams p, const WeightBlock& b) {
  p.x = static_cast<const char*>(p.x) + b.c_begin * element_size(p.gradient.map.dtype);
  p.x_shape.c = b.c_end - b.c_begin;
  return p;
}

}  // namespace

void weight_gradient(WeightGradientParams p, float* dw, const Strides& dw_strides, const ParallelFor& parallel_for) {
  // Enough tasks for many cores, as long as the partial results stay small; from the shape alone, as always.
  constexpr int64_t kTasks = 16, kPartialBytes = 1 << 20;
  const Shape& shape = p.gradient.map.shape;
  p.winograd = has_winograd(p.gradient.map, p.x_shape, p.x_strides, p.window);
  const int64_t blocks = weight_gradient_blocks(shape) * divide_up(p.x_shape.c, weight_gradient_inputs(p));
  const int64_t taps = p.window.kernel_h * p.window.kernel_w;
  const int64_t size = shape.c * taps * p.x_shape.c;
  const int64_t affordable = kPartialBytes / (size * static_cast<int64_t>(sizeof(float)));
  const int64_t wanted = std::clamp<int64_t>(std::min(divide_up(kTasks, blocks), affordable), 1, shape.n);
  p.chunks = std::bit_floor(static_cast<uint64_t>(wanted));  // a power of two shares out evenly

  const auto compute = [&](int64_t chunk, const WeightBlock& b, float* target, Scratch& scratch) {
    kernels().weight_gradient(narrow_inputs(p, b), chunk, b.index, target, scratch.data());
  };
  // One tap of a block, in dw's own order.
  const auto write = [&](const WeightBlock& b, int64_t tap, const float* block) {
    const int64_t inputs = b.c_end - b.c_begin, outputs = b.k_end - b.k_begin;
    const float* source = block + tap * inputs * outputs;
    float* target = dw + b.k_begin * dw_strides.n + b.c_begin * dw_strides.c + tap / p.window.kernel_w * dw_strides.h +
                    tap % p.window.kernel_w * dw_strides.w;
    // A few inputs at a time, so that what is read with a stride stays in the L1 cache and what is written is in lines.
    for (int64_t first = 0; first < inputs; first += kWinogradLanes) {
      const int64_t last = std::min(first + kWinogradLanes, inputs);
      for (int64_t k = 0; k < outputs; ++k)
        for (int64_t c = first; c < last; ++c) target[k * dw_strides.n + c * dw_strides.c] = source[c * outputs + k];
    }
  };

  if (p.chunks == 1) {
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(weight_gradient_scratch(p));
      Scratch result(weight_gradient_inputs(p) * std::min(kWeightGradientBlock, shape.c) * taps * sizeof(float));
      float* target = static_cast<float*>(result.data());
      for (int64_t i = begin; i < end; ++i) {
        const WeightBlock b = weight_block(p, i);
        compute(0, b, target, scratch);
        for (int64_t tap = 0; tap < taps; ++tap) write(b, tap, target);
      }
    });
    return;
  }

  Scratch partial(p.chunks * size * sizeof(float));
  float* sums = static_cast<float*>(partial.data());
  parallel_for(p.chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(weight_gradient_scratch(p));
    for (int64_t t = begin; t < end; ++t) {
      const WeightBlock b = weight_block(p, t % blocks);
      compute(t / blocks, b, sums + t / blocks * size + b.offset, scratch);
    }
  });
  parallel_for(size, kGrainElements, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < p.chunks; ++chunk)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[chunk * size + i];
  });
  parallel_for(blocks * taps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const WeightBlock b = weight_block(p, t / taps);
      write(b, t % taps, sums + b.offset);
    }
  });
}

}  // namespace layerwise::cpu
