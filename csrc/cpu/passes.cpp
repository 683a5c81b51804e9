#include "passes.h"

#include <algorithm>
#include <bit>

#include "blocks.h"
#include "dispatch.h"

namespace layerwise::cpu {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16 * 1024;

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
  const Blocks blocks = make_blocks(p.map, p.z_strides, p.z_copy == nullptr ? p.z_strides : p.z_copy_strides);
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

void dense_sums(DenseSumsParams p, double* dbeta, double* dgamma, const ParallelFor& parallel_for) {
  const Blocks blocks = make_blocks(p.map, p.z_strides, p.grad_y_strides);
  const int64_t channels = p.map.shape.c;
  Partials block_dbeta(p.map, blocks.count * channels), block_dgamma(p.map, blocks.count * channels);
  p.block_dbeta = block_dbeta.data();
  p.block_dgamma = block_dgamma.data();
  run(kernels().dense_sums, p, blocks.tasks, parallel_for);
  for (int64_t b = 0; b < blocks.count; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      dbeta[c] += block_dbeta[b * channels + c];
      dgamma[c] += block_dgamma[b * channels + c];
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

bool has_weight_gradient(const Map& dz, const Shape& x_shape, const Strides& x_strides) {
  // Narrower maps leave too few sums in flight; measured, the library's convolution is then up to 1.1 times faster.
  constexpr int64_t kFewestInputs = 16, kFewestOutputs = 32;
  const bool dtype =
      dz.dtype == DType::kFloat32 || (dz.dtype == DType::kBFloat16 && kernels().weight_gradient_bfloat16);
  return kernels().weight_gradient != nullptr && dtype && dz.layout == Layout::kChannelsLast &&
         dz.shape.c % kWeightGradientLanes == 0 && dz.shape.c >= kFewestOutputs && x_shape.c >= kFewestInputs &&
         x_strides.c == 1;
}

void weight_gradient(WeightGradientParams p, float* dw, const Strides& dw_strides, const ParallelFor& parallel_for) {
  // Enough tasks for many cores, as long as the partial results stay small; from the shape alone, as always.
  constexpr int64_t kTasks = 16, kPartialBytes = 1 << 20;
  const Shape& shape = p.gradient.map.shape;
  const int64_t blocks = weight_gradient_blocks(shape);
  const int64_t kernel = p.kernel_h * p.kernel_w;
  const int64_t size = shape.c * kernel * p.x_shape.c;
  const int64_t affordable = kPartialBytes / (size * static_cast<int64_t>(sizeof(float)));
  const int64_t wanted = std::clamp<int64_t>(std::min((kTasks + blocks - 1) / blocks, affordable), 1, shape.n);
  p.chunks = std::bit_floor(static_cast<uint64_t>(wanted));  // a power of two shares out evenly

  std::vector<float> partial(p.chunks * size);
  p.dw = partial.data();
  parallel_for(p.chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(weight_gradient_scratch(p));
    kernels().weight_gradient(p, begin, end, scratch.data());
  });

  // The chunks are summed where they lie, then [block, kh, kw, c, k in block] becomes dw's own order.
  parallel_for(size, kGrainElements, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < p.chunks; ++chunk)
      for (int64_t i = begin; i < end; ++i) partial[i] += partial[chunk * size + i];
  });
  const int64_t inputs = p.x_shape.c;
  parallel_for(blocks * kernel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t / kernel * kWeightGradientBlock, tap = t % kernel;
      const int64_t block = std::min(kWeightGradientBlock, shape.c - first);
      const float* source = partial.data() + (first * kernel + tap * block) * inputs;
      float* target = dw + first * dw_strides.n + tap / p.kernel_w * dw_strides.h + tap % p.kernel_w * dw_strides.w;
      for (int64_t c = 0; c < inputs; ++c)
        for (int64_t k = 0; k < block; ++k) target[k * dw_strides.n + c * dw_strides.c] = source[c * block + k];
    }
  });
}

}  // namespace layerwise::cpu
