// Convolution of bfloat16 maps with few terms to a sum; the sums stay in registers.
//
// Under one row of the kernel lie kernel_w * C_in values side by side.  The processor multiplies pairs of them with pairs
// of weights, for sixteen output channels at a time, and adds both products to float32 sums.  The rows of x below a few
// rows of z are copied with their padding, so that the loops need no edges.
#pragma once

#include "direct_plan.h"
#include "statistics.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

#if defined(__AVX512BF16__)

static_assert(kDirectLanes == kLanes<float> && kDirectBlock == 4 * kLanes<float>);

// Most pixels whose sums are in registers at a time.
constexpr int direct_pixels(int vectors) { return 24 / vectors; }

// Some pixels of a row of z and one block of output channels.
struct DirectRun {
  const BFloat16* x;  // below the first pixel, in the copied rows
  int64_t x_row, x_pixel;  // elements from one copied row, and from one pixel of z, to the next
  const BFloat16* weights;  // [kernel_h, pairs, block, 2]
  int64_t kernel_h, run;
  BFloat16* z;
  int64_t z_pixel;
};

template <int kVectors, int kPixels>
void convolve_pixels(const DirectRun& p) {
  constexpr int kBlock = kVectors * kLanes<float>;
  __m512 sums[kPixels][kVectors] = {};
  const BFloat16 *x = p.x, *w = p.weights;
  const auto add = [&](auto pair_of) ALWAYS_INLINE {
    __m512bh weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + v * 32);
#pragma GCC unroll 24
    for (int i = 0; i < kPixels; ++i) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(pair_of(i));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], weights[v], pair);
    }
    w += 2 * kBlock;
  };
  for (int64_t row = 0; row < p.kernel_h; ++row, x += p.x_row) {
    int64_t e = 0;
    for (; e + 1 < p.run; e += 2) add([&](int i) ALWAYS_INLINE { return load_bits<int32_t>(x + i * p.x_pixel + e); });
    if (e < p.run) add([&](int i) ALWAYS_INLINE { return static_cast<int32_t>(x[i * p.x_pixel + e].bits); });
  }
#pragma GCC unroll 24
  for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(p.z + i * p.z_pixel + v * kLanes<float>, (Vec<float>)sums[i][v]);
}

template <int kVectors, int kPixels = direct_pixels(kVectors)>
void convolve_pixels_of(int64_t pixels, const DirectRun& p) {
  if constexpr (kPixels > 1) {
    if (pixels < kPixels) return convolve_pixels_of<kVectors, kPixels - 1>(pixels, p);
  }
  convolve_pixels<kVectors, kPixels>(p);
}

// The rows of x that rows [begin, end) of z read, with zeros for the padding.
LAYERWISE_INLINE void copy_rows(const ConvolutionParams& p, const DirectPlan& plan, const DirectRows& rows,
                                BFloat16* target) {
  const int64_t first = rows.begin * p.window.stride_h - p.window.padding_h;
  const int64_t last = (rows.end - 1) * p.window.stride_h - p.window.padding_h + p.window.kernel_h;
  const int64_t left = p.window.padding_w < plan.pixels ? p.window.padding_w : plan.pixels;
  const int64_t inside = plan.pixels - left < p.x_shape.w ? plan.pixels - left : p.x_shape.w;
  const int64_t right = plan.pixels - left - inside, pixel = p.x_shape.c * sizeof(BFloat16);
  for (int64_t h = first; h < last; ++h, target += plan.pitch) {
    if (h < 0 || h >= p.x_shape.h) {
      __builtin_memset(target, 0, plan.pixels * pixel);
      continue;
    }
    const BFloat16* x = at<BFloat16>(p.x, p.x_strides, rows.n, 0, h, 0);
    BFloat16* copy = target + left * p.x_shape.c;
    __builtin_memset(target, 0, left * pixel);
    if (p.x_strides.w == p.x_shape.c) {
      __builtin_memcpy(copy, x, inside * pixel);
    } else {
      for (int64_t w = 0; w < inside; ++w) __builtin_memcpy(copy + w * p.x_shape.c, x + w * p.x_strides.w, pixel);
    }
    __builtin_memset(copy + inside * p.x_shape.c, 0, right * pixel);
  }
}

template <int kVectors>
void convolve_rows(const ConvolutionParams& p, const DirectPlan& plan, const DirectRows& rows, int64_t k,
                   const BFloat16* x, const BFloat16* weights) {
  const int64_t width = p.map.shape.w, pieces = divide_up(width, direct_pixels(kVectors));
  DirectRun run{nullptr, plan.pitch,   p.window.stride_w * p.x_shape.c, weights, p.window.kernel_h, plan.run,
                nullptr, p.z_strides.w};
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    BFloat16* z = at<BFloat16>(p.z, p.z_strides, rows.n, k, h, 0);
    const BFloat16* row = x + (h - rows.begin) * p.window.stride_h * plan.pitch;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t first = i * width / pieces;
      run.x = row + first * run.x_pixel;
      run.z = z + first * run.z_pixel;
      convolve_pixels_of<kVectors>((i + 1) * width / pieces - first, run);
    }
  }
}

// Task: a row of the kernel.  Order of the weights: [blocks of output channels][kernel_h][pairs][block][2]
void direct_weights(const ConvolutionParams& p, int64_t begin, int64_t end) {
  const DirectPlan plan = direct_plan(p.map, p.x_shape, p.window);
  const int64_t channels = p.map.shape.c;
  BFloat16* block_target = static_cast<BFloat16*>(p.weights);
  for (int64_t k = 0; k < channels; k += kDirectBlock) {
    const int64_t block = channels - k < kDirectBlock ? channels - k : kDirectBlock;
    for (int64_t h = begin; h < end; ++h) {
      BFloat16* target = block_target + h * plan.pairs * block * 2;
      for (int64_t e = 0; e < 2 * plan.pairs; ++e) {
        const BFloat16* w =
            e < plan.run ? at<BFloat16>(p.w, p.w_strides, k, e % p.x_shape.c, h, e / p.x_shape.c) : nullptr;
        BFloat16* pair = target + e / 2 * block * 2 + e % 2;
        for (int64_t i = 0; i < block; ++i) pair[2 * i] = w == nullptr ? BFloat16{} : w[i * p.w_strides.n];
      }
    }
    block_target += p.window.kernel_h * plan.pairs * block * 2;
  }
}

void direct_convolution(const ConvolutionParams& p, int64_t begin, int64_t end, void* scratch) {
  const DirectPlan plan = direct_plan(p.map, p.x_shape, p.window);
  const Shape& shape = p.map.shape;
  BFloat16* x = static_cast<BFloat16*>(scratch);
  for (int64_t group = begin; group < end; ++group) {
    const DirectRows rows = direct_rows(plan, shape, group);
    copy_rows(p, plan, rows, x);
    const BFloat16* weights = static_cast<const BFloat16*>(p.weights);
    for (int64_t k = 0; k < shape.c; k += kDirectBlock) {
      const int64_t block = shape.c - k < kDirectBlock ? shape.c - k : kDirectBlock;
      with_vectors(block, [&]<int kVectors>() { convolve_rows<kVectors>(p, plan, rows, k, x, weights); });
      weights += p.window.kernel_h * plan.pairs * block * 2;
    }
    if (p.block_mean == nullptr) continue;
    run_statistics(p, at<BFloat16>(p.z, p.z_strides, rows.n, 0, rows.begin, 0), (rows.end - rows.begin) * shape.w,
                   group * plan.group_blocks, 0, shape.c);
  }
}

#endif

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
