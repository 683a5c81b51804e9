// Batch norm folded into the weights of the convolution before it, for inference.
#include "common.h"

namespace layerwise::cuda {
namespace {

// A block per output channel.
template <class From, class To>
__global__ void __launch_bounds__(kThreads) fold_channel(Fold p) {
  using A = Compute<To>;
  const int64_t c = blockIdx.x, first = c * p.weights_per_channel;
  const Coefficients<A, 1> k(p.norm, c);
  for (int64_t i = threadIdx.x; i < p.weights_per_channel; i += kThreads)
    narrow(k.scale[0] * widen(static_cast<const From*>(p.weight)[first + i]),
           static_cast<To*>(p.folded_weight)[first + i]);
  if (threadIdx.x != 0) return;
  const A conv_bias = p.conv_bias == nullptr ? A(0) : static_cast<const A*>(p.conv_bias)[c];
  narrow(k.u(0, conv_bias - k.mean[0]), static_cast<To*>(p.folded_bias)[c]);
}

}  // namespace

void fold(const Fold& p, Stream stream) {
  const auto run = [&]<class From, class To>() { launch(fold_channel<From, To>, p.channels, kThreads, stream, p); };
  const bool widest = p.from == DType::kFloat32;
  switch (p.to) {
    case DType::kFloat32:
      return run.template operator()<float, float>();
    case DType::kBFloat16:
      return widest ? run.template operator()<float, BFloat16>() : run.template operator()<BFloat16, BFloat16>();
    case DType::kFloat16:
      return widest ? run.template operator()<float, Float16>() : run.template operator()<Float16, Float16>();
    case DType::kFloat64:
      return run.template operator()<double, double>();
  }
}

}  // namespace layerwise::cuda
