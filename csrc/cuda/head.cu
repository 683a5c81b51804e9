// Average pooling from sums over cells, a linear classifier with few classes, and cross-entropy: logits, loss and the
// gradient of the logits, then the gradients of the sums and of the classifier.  Every sum has a fixed order.
#include "common.h"

namespace layerwise::cuda {
namespace {

constexpr int kClasses = 8;  // that a thread sums at once
constexpr int kSamples = 2;  // that a block classifies
constexpr int kRows = 8;     // samples that a thread forms the gradient of m1 for
static_assert(kClasses == kWarps && kSamples <= kWarps);

// The features of a sample in the order of the weight, (c, i, j).
struct Features {
  int64_t channels, cells, count;

  LAYERWISE_MEMBER explicit Features(const Head& p)
      : channels(p.moments.c), cells(p.moments.h * p.moments.w), count(channels * cells) {}
  // Where feature c * cells + cell lies among a sample's sums.
  LAYERWISE_MEMBER int64_t place(const Head& p, int64_t c, int64_t cell) const {
    return p.layout == Layout::kChannelsLast ? cell * channels + c : c * cells + cell;
  }
  // Channel and cell of what lies at a place.
  LAYERWISE_MEMBER void at(const Head& p, int64_t place, int64_t& c, int64_t& cell) const {
    const bool channels_last = p.layout == Layout::kChannelsLast;
    c = channels_last ? place % channels : place / cells;
    cell = channels_last ? place / channels : place % cells;
  }
};

template <class A>
LAYERWISE_INLINE A inverse_area(const Head& p, int64_t cell) {
  const int64_t i = cell / p.moments.w, j = cell % p.moments.w;
  return A(1) / static_cast<A>(cell_size(i, p.height, p.moments.h) * cell_size(j, p.width, p.moments.w));
}

template <class A>
LAYERWISE_DEVICE A max_over_lanes(A value) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, offset);
    value = value > other || value != value ? value : other;  // NaN stays
  }
  return value;
}

// Sum over the threads of a block; all of them get it.
template <class A>
LAYERWISE_DEVICE A sum_over_block(A value, A* shared) {
  value = sum_over_rows(value, 1);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  A total = A(0);
  for (int w = 0; w < kWarps; ++w) total += shared[w];
  __syncthreads();
  return total;
}

LAYERWISE_DEVICE double count_targets(const HeadForward& p, double* shared) {
  double count = 0;
  for (int64_t n = threadIdx.x; n < p.head.moments.n; n += kThreads) count += p.targets[n] != kIgnoredTarget;
  return sum_over_block(count, shared);
}

// Loss of a sample and the gradient of its logits, by one warp.
template <class A>
LAYERWISE_DEVICE void cross_entropy(const HeadForward& p, int64_t n, double count) {
  const int lane = threadIdx.x % kWarp;
  const int64_t classes = p.head.classes, target = p.targets[n];
  const A* logits = static_cast<const A*>(p.logits) + n * classes;
  A* gradient = static_cast<A*>(p.grad_logits) + n * classes;
  const bool ignored = target == kIgnoredTarget;
  LAYERWISE_REQUIRE(ignored || (target >= 0 && target < classes), "target is out of range");
  A largest = logits[0];
  for (int64_t k = lane; k < classes; k += kWarp) largest = largest > logits[k] ? largest : logits[k];
  largest = max_over_lanes(largest);
  A exponentials = A(0), shifted = A(0);
  for (int64_t k = lane; k < classes; k += kWarp) {
    exponentials += std::exp(logits[k] - largest);
    shifted += logits[k] - largest;
  }
  exponentials = sum_over_rows(exponentials, 1);
  shifted = sum_over_rows(shifted, 1);
  const A smoothing = static_cast<A>(p.label_smoothing), share = smoothing / static_cast<A>(classes);
  const A log_sum = std::log(exponentials), inverse_count = static_cast<A>(1 / count);
  for (int64_t k = lane; k < classes; k += kWarp) {
    const A wanted = share + (k == target ? A(1) - smoothing : A(0));
    const A difference = std::exp(logits[k] - largest - log_sum) - wanted;
    gradient[k] = ignored ? A(0) : difference * inverse_count;
  }
  if (lane != 0) return;
  const A of_target = ignored ? A(0) : logits[target] - largest;
  const A loss = log_sum - (A(1) - smoothing) * of_target - share * shifted;
  static_cast<A*>(p.sample_losses)[n] = ignored ? A(0) : loss;
}

// A block per kSamples samples, kClasses classes at a time.
template <class A>
__global__ void __launch_bounds__(kThreads) classify(HeadForward p) {
  LAYERWISE_SHARED(A, shared, kWarps * kSamples * kClasses);
  LAYERWISE_SHARED(double, counts, kWarps);
  const Head& head = p.head;
  const Features features(head);
  const int warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSamples, batch = head.moments.n;
  const A *m1 = static_cast<const A*>(head.m1), *weight = static_cast<const A*>(head.weight);
  const A* bias = static_cast<const A*>(p.bias);
  A* logits = static_cast<A*>(p.logits);
  for (int64_t k_begin = 0; k_begin < head.classes; k_begin += kClasses) {
    A sums[kSamples][kClasses] = {};
    for (int64_t f = threadIdx.x; f < features.count; f += kThreads) {
      const int64_t c = f / features.cells, cell = f - c * features.cells;
      const int64_t place = features.place(head, c, cell);
      const A scale = inverse_area<A>(head, cell);
      A mean[kSamples];
#pragma unroll
      for (int s = 0; s < kSamples; ++s)
        mean[s] = first + s < batch ? m1[(first + s) * features.count + place] * scale : A(0);
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        const A w = k_begin + k < head.classes ? weight[(k_begin + k) * features.count + f] : A(0);
#pragma unroll
        for (int s = 0; s < kSamples; ++s) sums[s][k] += mean[s] * w;
      }
    }
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        const A sum = sum_over_rows(sums[s][k], 1);
        if (threadIdx.x % kWarp == 0) shared[(warp * kSamples + s) * kClasses + k] = sum;
      }
    }
    __syncthreads();
    const int64_t n = first + threadIdx.x / kClasses, k = k_begin + threadIdx.x % kClasses;
    if (threadIdx.x < kSamples * kClasses && n < batch && k < head.classes) {
      A total = bias == nullptr ? A(0) : bias[k];
      for (int w = 0; w < kWarps; ++w) total += shared[w * kSamples * kClasses + threadIdx.x];
      logits[n * head.classes + k] = total;
    }
    __syncthreads();
  }
  const double count = count_targets(p, counts);
  if (warp < kSamples && first + warp < batch) cross_entropy<A>(p, first + warp, count);
}

// One block.
template <class A>
__global__ void __launch_bounds__(kThreads) mean_loss(HeadForward p) {
  LAYERWISE_SHARED(double, shared, kWarps);
  const double count = count_targets(p, shared);
  double sum = 0;
  for (int64_t n = threadIdx.x; n < p.head.moments.n; n += kThreads) sum += static_cast<const A*>(p.sample_losses)[n];
  sum = sum_over_block(sum, shared);
  if (threadIdx.x == 0) *static_cast<A*>(p.loss) = static_cast<A>(sum / count);
}

// dL/dm1 of a piece of the features, as they lie in memory, and kRows samples.
template <class A>
LAYERWISE_DEVICE void moment_gradient(const HeadBackward& p, const Features& features, int64_t block, A scale) {
  const int64_t pieces = (features.count + kThreads - 1) / kThreads;
  const int64_t place = block % pieces * kThreads + threadIdx.x, first = block / pieces * kRows;
  if (place >= features.count) return;
  int64_t c, cell;
  features.at(p.head, place, c, cell);
  const int64_t classes = p.head.classes, batch = p.head.moments.n;
  const A* weight = static_cast<const A*>(p.head.weight) + c * features.cells + cell;
  const A* gradient = static_cast<const A*>(p.grad_logits);
  A sums[kRows] = {};
  for (int64_t k = 0; k < classes; ++k) {
    const A w = weight[k * features.count];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r < batch) sums[r] += gradient[(first + r) * classes + k] * w;
    }
  }
  scale *= inverse_area<A>(p.head, cell);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r < batch) static_cast<A*>(p.grad_m1)[(first + r) * features.count + place] = sums[r] * scale;
  }
}

// dL/dweight of kWarp features, as they lie in memory, and kClasses classes; a warp sums every kWarps-th sample.
template <class A>
LAYERWISE_DEVICE void weight_gradient(const HeadBackward& p, const Features& features, int64_t block, A scale,
                                      A* shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t pieces = (features.count + kWarp - 1) / kWarp;
  const int64_t place = block % pieces * kWarp + lane, k_begin = block / pieces * kClasses;
  const int64_t classes = p.head.classes, batch = p.head.moments.n;
  A sums[kClasses] = {};
  if (place < features.count) {
    for (int64_t n = warp; n < batch; n += kWarps) {
      const A sum = static_cast<const A*>(p.head.m1)[n * features.count + place];
      const A* gradient = static_cast<const A*>(p.grad_logits) + n * classes + k_begin;
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        if (k_begin + k < classes) sums[k] += gradient[k] * sum;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kClasses; ++k) shared[(warp * kClasses + k) * kWarp + lane] = sums[k];
  __syncthreads();
  const int64_t k = k_begin + warp;  // a warp per class now
  if (place >= features.count || k >= classes) return;
  A total = A(0);
  for (int w = 0; w < kWarps; ++w) total += shared[(w * kClasses + warp) * kWarp + lane];
  int64_t c, cell;
  features.at(p.head, place, c, cell);
  static_cast<A*>(p.grad_weight)[k * features.count + c * features.cells + cell] =
      total * scale * inverse_area<A>(p.head, cell);
}

// A warp per class.
template <class A>
LAYERWISE_DEVICE void bias_gradient(const HeadBackward& p, A scale) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t k = threadIdx.x / kWarp; k < p.head.classes; k += kWarps) {
    A sum = A(0);
    for (int64_t n = lane; n < p.head.moments.n; n += kWarp)
      sum += static_cast<const A*>(p.grad_logits)[n * p.head.classes + k];
    sum = sum_over_rows(sum, 1);
    if (lane == 0) static_cast<A*>(p.grad_bias)[k] = sum * scale;
  }
}

// All gradients in one launch: some blocks for m1, then some for the weight, then one for the bias.
template <class A>
__global__ void __launch_bounds__(kThreads) head_gradients(HeadBackward p, int64_t m1_blocks, int64_t weight_blocks) {
  LAYERWISE_SHARED(A, shared, kWarps * kClasses * kWarp);
  const Features features(p.head);
  const A scale = p.scale == nullptr ? A(1) : *static_cast<const A*>(p.scale);
  const int64_t block = blockIdx.x;
  if (block < m1_blocks)
    moment_gradient<A>(p, features, block, scale);
  else if (block < m1_blocks + weight_blocks)
    weight_gradient<A>(p, features, block - m1_blocks, scale, shared);
  else
    bias_gradient<A>(p, scale);
}

int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

template <class Body>
void with_type(DType dtype, const Body& body) {
  dtype == DType::kFloat64 ? body.template operator()<double>() : body.template operator()<float>();
}

}  // namespace

void head_forward(const HeadForward& p, Stream stream) {
  with_type(p.head.dtype, [&]<class A>() {
    launch(classify<A>, pieces(p.head.moments.n, kSamples), kThreads, stream, p);
    launch(mean_loss<A>, 1, kThreads, stream, p);
  });
}

void head_backward(const HeadBackward& p, Stream stream) {
  const int64_t features = p.head.moments.c * p.head.moments.h * p.head.moments.w;
  const int64_t m1_blocks = p.grad_m1 == nullptr ? 0 : pieces(features, kThreads) * pieces(p.head.moments.n, kRows);
  const int64_t weight_blocks =
      p.grad_weight == nullptr ? 0 : pieces(features, kWarp) * pieces(p.head.classes, kClasses);
  const int64_t blocks = m1_blocks + weight_blocks + (p.grad_bias == nullptr ? 0 : 1);
  if (blocks == 0) return;
  with_type(p.head.dtype,
            [&]<class A>() { launch(head_gradients<A>, blocks, kThreads, stream, p, m1_blocks, weight_blocks); });
}

}  // namespace layerwise::cuda
