// What the CPU kernels share: element addresses, per-channel coefficients, choice of a template instance.
#pragma once

#include "../device/activation.h"
#include "../params.h"
#include "vec.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

#if defined(__SANITIZE_ADDRESS__)
#define ALWAYS_INLINE  // one function of everything takes minutes to compile with its checks
#else
#define ALWAYS_INLINE __attribute__((always_inline))
#endif

template <class T>
const T* at(const void* base, const Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<const T*>(base) + n * s.n + c * s.c + h * s.h + w * s.w;
}
template <class T>
T* at(void* base, const Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<T*>(base) + n * s.n + c * s.c + h * s.h + w * s.w;
}

// The coefficients of a group of channels (channels_last) or of one channel, broadcast (contiguous).  With the centred
// t = z - mean, u = gamma*rstd * t + beta; a mean much larger than the deviation does not cancel.  Sums over xhat are
// taken over t and scaled by rstd at their end.
template <class A, int kVectors>
struct Coefficients {
  Vec<A> mean[kVectors], rstd[kVectors], scale[kVectors], beta[kVectors];

  template <class Group>
  ALWAYS_INLINE Coefficients(const Channels& p, int64_t c, const Group& group) {
    group.get(static_cast<const A*>(p.mean) + c, mean);
    group.get(static_cast<const A*>(p.rstd) + c, rstd);
    group.get(static_cast<const A*>(p.gamma) + c, scale);
    group.get(static_cast<const A*>(p.beta) + c, beta);
    for (int v = 0; v < kVectors; ++v) scale[v] *= rstd[v];
  }

  ALWAYS_INLINE Vec<A> u(int v, Vec<A> t) const { return scale[v] * t + beta[v]; }
};

template <class Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
  }
}

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

template <class Body>
void for_bool(bool condition, const Body& body) {
  condition ? body(Yes{}) : body(No{});
}

// Calls body<vectors>() for a block of 16, 32, 48 or 64 channels.
template <class Body>
LAYERWISE_INLINE void with_vectors(int64_t channels, const Body& body) {
  switch (channels / kLanes<float>) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    default:
      return body.template operator()<4>();
  }
}

// One group of channels of a pixel after another, `pitch` apart, may be more lines than a hardware prefetcher follows.
constexpr int64_t kPixelsAhead = 12;

template <class A, class Group, class T>
LAYERWISE_INLINE void prefetch_ahead(const Group&, const T* pixel, int64_t pitch) {
  const char* ahead = reinterpret_cast<const char*>(pixel + kPixelsAhead * pitch);
  constexpr int kBytes = Group::kVectors * kLanes<A> * static_cast<int>(sizeof(T));
  for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(ahead + b);
}

// Asks for memory ahead of its use, a few lines at a time between tiles: a tile touches one line of each pixel, which
// no hardware prefetcher foresees.
class Prefetcher {
 public:
  // `pixels` pieces of `bytes`, each `pitch` bytes after the one before.
  Prefetcher(const void* first, int64_t pixels, int64_t pitch, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(first)), pixels_(pixels), pitch_(pitch), bytes_(bytes) {
    per_step_ = (pixels + steps - 1) / steps;
  }

  void step() {
    for (int64_t i = 0; i < per_step_ && pixels_ > 0; ++i, --pixels_, next_ += pitch_)
      for (int64_t b = 0; b < bytes_; b += 64) __builtin_prefetch(next_ + b, 0, 2);
  }

 private:
  const char* next_;
  int64_t pixels_, pitch_, bytes_, per_step_;
};

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
