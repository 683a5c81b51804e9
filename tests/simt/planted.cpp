// Kernels with planted bugs, and a correct one: `planted NAME` says "correct", or what is wrong.  See test_simt.py.
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt.h"

namespace {

constexpr int kThreads = 96;

enum Bug {
  kNone,
  kMissingBarrier,
  kDifferentBarriers,
  kMaskNamesExited,
  kMaskNamesAbsent,
  kNotInMask,
  kSharedEdge,
  kGlobalEdge
};

// Each block reverses kThreads values of its own in shared memory and adds the value of the neighbouring lane.
void reverse(const float* source, float* target, Bug bug) {
  LAYERWISE_SHARED(float, shared, kThreads);
  const int thread = threadIdx.x, base = blockIdx.x * kThreads;
  shared[thread + (bug == kSharedEdge)] = source[base + thread];
  if (bug == kDifferentBarriers && thread % 2 == 0) {
    __syncthreads();
  } else if (bug != kMissingBarrier) {
    __syncthreads();
  }
  const float reversed = shared[kThreads - 1 - thread];
  float neighbour = 0;
  if (bug == kMaskNamesExited && thread % 32 == 7) return;
  if (bug == kMaskNamesAbsent && thread % 32 == 7) {
    __syncthreads();
  } else {
    const unsigned mask = bug == kNotInMask ? 0xffffu : 0xffffffffu;
    neighbour = __shfl_xor_sync(mask, reversed, 1);
  }
  target[base + thread + (bug == kGlobalEdge)] = reversed + neighbour;
}

}  // namespace

int main(int count, char** names) {
  const std::map<std::string, Bug> bugs{{"none", kNone},
                                        {"missing barrier", kMissingBarrier},
                                        {"different barriers", kDifferentBarriers},
                                        {"mask names a lane that exited", kMaskNamesExited},
                                        {"mask names a lane that is elsewhere", kMaskNamesAbsent},
                                        {"lane is not in the mask", kNotInMask},
                                        {"edge of shared memory", kSharedEdge},
                                        {"edge of global memory", kGlobalEdge}};
  const Bug bug = bugs.at(count > 1 ? names[1] : "none");
  constexpr int kBlocks = 3, kSize = kBlocks * kThreads;
  std::vector<float> source(kSize), target(kSize);
  for (int i = 0; i < kSize; ++i) source[i] = static_cast<float>(i);
  try {
    layerwise::cuda::launch(reverse, kBlocks, kThreads, nullptr, source.data(), target.data(), bug);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return 1;
  }
  for (int i = 0; i < kSize; ++i) {
    const int first = i / kThreads * kThreads, mirrored = first + kThreads - 1 - i % kThreads;
    const int other = first + kThreads - 1 - (i % kThreads ^ 1);
    if (target[i] != source[mirrored] + source[other]) {
      std::printf("wrong result %g at %d\n", target[i], i);
      return 1;
    }
  }
  std::puts("correct");
}
