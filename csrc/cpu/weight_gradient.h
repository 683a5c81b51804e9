// Weight gradient with dz formed on the way: a direct convolution whose accumulators stay in registers.
//
// A task owns one part of the samples and one block of output channels.  It forms dz for a few rows at a time in the
// L1 cache and adds their outer products with the input to tiles of dw: kTileInputs input channels by a vector block
// of output channels, over all pixels of the rows, for each kernel tap.
#pragma once

#include "blocks.h"
#include "input_gradient.h"
#include "winograd.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

#if defined(__AVX512F__)

using Float = Vec<float>;

static_assert(kWeightGradientBlock == 4 * kLanes<float>);

// Most input channels of a tile: with `vectors` output vectors the accumulators fill at most 24 of the 32 registers.
constexpr int tile_inputs(int vectors) { return vectors == 1 ? 16 : 24 / vectors; }

// The output pixels of a row whose tap reads inside the input: w*stride + offset in [0, size).
struct Range {
  int64_t begin, end;
};
Range valid_range(int64_t outputs, int64_t inputs, int64_t stride, int64_t offset) {
  const int64_t begin = offset >= 0 ? 0 : (-offset + stride - 1) / stride;
  const int64_t end = inputs - offset <= 0 ? 0 : (inputs - offset + stride - 1) / stride;
  return {begin, end < outputs ? end : outputs};
}

// One tap and one tile over some rows.
struct TileRows {
  const float* dz;         // [rows, pixels, vectors]
  int64_t dz_row;          // floats
  const float* x;          // first input channel of the tile, at the tap's input pixel of the first valid output
  int64_t x_row, x_pixel;  // floats from one output row or pixel to the next
  int64_t rows, pixels;
};

template <int kVectors, int kInputs>
void add_tile(const TileRows& t, float* dw) {
  constexpr int kBlock = kVectors * kLanes<float>;
  Float sums[kInputs][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = load(dw + i * kBlock + v * kLanes<float>);
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* dz = t.dz + r * t.dz_row;
    const float* x = t.x + r * t.x_row;
    for (int64_t w = 0; w < t.pixels; ++w, dz += kBlock, x += t.x_pixel) {
      Float d[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) d[v] = load(dz + v * kLanes<float>);
#pragma GCC unroll 16
      for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] += x[i] * d[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(dw + i * kBlock + v * kLanes<float>, sums[i][v]);
}

template <int kVectors, int kInputs = tile_inputs(kVectors)>
void add_tile_of(int64_t inputs, const TileRows& t, float* dw) {
  if constexpr (kInputs > 1) {
    if (inputs < kInputs) return add_tile_of<kVectors, kInputs - 1>(inputs, t, dw);
  }
  add_tile<kVectors, kInputs>(t, dw);
}

// All taps and all input channels of rows [h_begin, h_end) of sample n.
template <int kVectors>
void add_rows(const WeightGradientParams& p, int64_t n, int64_t h_begin, int64_t h_end, int64_t c_begin,
              const float* dz, float* dw) {
  constexpr int kBlock = kVectors * kLanes<float>;
  const Shape& out = p.gradient.map.shape;
  const Shape& in = p.x_shape;
  const int64_t tiles = (in.c + tile_inputs(kVectors) - 1) / tile_inputs(kVectors);
  const int64_t steps = p.window.kernel_h * p.window.kernel_w * tiles;
  const int64_t bytes = sizeof(float);
  // What the next rows will need; past the end of the map nothing is read, and asking does no harm.
  const int64_t x_known =
      (h_end - 1) * p.window.stride_h + (p.window.kernel_h - 1) * p.window.dilation_h - p.window.padding_h + 1;
  Prefetcher z(at<float>(p.gradient.z, p.gradient.z_strides, n, c_begin, h_end, 0), (h_end - h_begin) * out.w,
               p.gradient.z_strides.w * bytes, kBlock * bytes, steps);
  Prefetcher x_ahead(at<float>(p.x, p.x_strides, n, 0, x_known, 0), (h_end - h_begin) * p.window.stride_h * in.w,
                     p.x_strides.w * bytes, in.c * bytes, steps);
  for (int64_t kh = 0; kh < p.window.kernel_h; ++kh) {
    const int64_t offset_h = kh * p.window.dilation_h - p.window.padding_h;
    const Range valid = valid_range(out.h, in.h, p.window.stride_h, offset_h);
    const int64_t first = valid.begin > h_begin ? valid.begin : h_begin;
    const int64_t last = valid.end < h_end ? valid.end : h_end;
    if (first >= last) continue;
    for (int64_t kw = 0; kw < p.window.kernel_w; ++kw) {
      const int64_t offset_w = kw * p.window.dilation_w - p.window.padding_w;
      const Range columns = valid_range(out.w, in.w, p.window.stride_w, offset_w);
      if (columns.begin >= columns.end) continue;
      const float* x = at<float>(p.x, p.x_strides, n, 0, first * p.window.stride_h + offset_h,
                                 columns.begin * p.window.stride_w + offset_w);
      TileRows t{dz + ((first - h_begin) * out.w + columns.begin) * kBlock,
                 out.w * kBlock,
                 x,
                 p.window.stride_h * p.x_strides.h,
                 p.window.stride_w * p.x_strides.w,
                 last - first,
                 columns.end - columns.begin};
      float* tap = dw + (kh * p.window.kernel_w + kw) * in.c * kBlock;
      // Tiles of nearly equal size: a narrow last one would wait for its few sums instead of multiplying.
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t c = i * in.c / tiles;
        t.x = x + c;
        add_tile_of<kVectors>((i + 1) * in.c / tiles - c, t, tap + c * kBlock);
        z.step();
        x_ahead.step();
      }
    }
  }
}

template <int kVectors>
void float32_task(const WeightGradientParams& p, int64_t chunk, int64_t c_begin, float* dw, void* scratch) {
  constexpr int kBlock = kVectors * kLanes<float>;
  const InputGradientParams& g = p.gradient;
  const Shape& shape = g.map.shape;
  const FormRows<float> form = choose_form<float, float>(p);
  const int64_t rows = weight_gradient_rows(g.map);
  float* dz = static_cast<float*>(scratch);
  for (int64_t n = chunk * shape.n / p.chunks; n < (chunk + 1) * shape.n / p.chunks; ++n) {
    for (int64_t h = 0; h < shape.h; h += rows) {
      const int64_t h_end = h + rows < shape.h ? h + rows : shape.h;
      form_dz(g, form, n, h, h_end, c_begin, kBlock, dz);
      add_rows<kVectors>(p, n, h, h_end, c_begin, dz, dw);
    }
  }
}

#if defined(__AVX512BF16__)

// -- bfloat16 ------------------------------------------------------------------------------------------------------
//
// The processor multiplies pairs of bfloat16 and adds both products to a float32 sum.  The sum here runs over pixels, so
// two neighbouring output pixels make a pair: dz and, for each column of the kernel, the input rows are rewritten with
// the values of both pixels side by side.  Padding is written as zeros, so the loops need no edges.

using Word32 = Vector<uint32_t, 16>;

// Pairs of pixels: target[pair][channel][2] holds, for output pixels 2*pair and 2*pair + 1, the values of the pixels
// first + step * output of `row`, zero where outside [0, limit) or beyond `outputs`.
void interleave_pixels(const BFloat16* row, int64_t pixel_pitch, int64_t limit, int64_t first, int64_t step,
                       int64_t outputs, int64_t channels, int64_t channel_pitch, BFloat16* target) {
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Word 2k from the first operand's word k, word 2k + 1 from the second one's.
  const __m512i low = _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(32)), 16));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t output = 0; output < outputs; output += 2, target += 2 * channel_pitch) {
    const int64_t p0 = first + output * step, p1 = p0 + step;
    const bool use0 = p0 >= 0 && p0 < limit, use1 = p1 >= 0 && p1 < limit && output + 1 < outputs;
    for (int64_t c = 0; c < channels; c += 32) {
      const __mmask32 mask = channels - c >= 32 ? ~0u : (1u << (channels - c)) - 1;
      const __m512i a = _mm512_maskz_loadu_epi16(use0 ? mask : 0, row + p0 * pixel_pitch + c);
      const __m512i b = _mm512_maskz_loadu_epi16(use1 ? mask : 0, row + p1 * pixel_pitch + c);
      _mm512_storeu_si512(target + 2 * c, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(target + 2 * c + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// One tap and one tile over some rows of pairs.
struct PairRows {
  const BFloat16* dz;      // [rows, pairs, channels of the block, 2]
  int64_t dz_row;          // elements
  const BFloat16* x;       // first input channel of the tile, in the interleaved row of the first valid output row
  int64_t x_row, x_pair;   // elements
  int64_t rows, pairs;
};

template <int kVectors, int kInputs>
void add_pair_tile(const PairRows& t, float* dw) {
  constexpr int kBlock = kVectors * kLanes<float>;
  __m512 sums[kInputs][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_loadu_ps(dw + i * kBlock + v * 16);
  for (int64_t r = 0; r < t.rows; ++r) {
    const BFloat16* dz = t.dz + r * t.dz_row;
    const BFloat16* x = t.x + r * t.x_row;
    for (int64_t pair = 0; pair < t.pairs; ++pair, dz += 2 * kBlock, x += t.x_pair) {
      __m512bh d[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) d[v] = (__m512bh)_mm512_loadu_si512(dz + v * 32);
#pragma GCC unroll 16
      for (int i = 0; i < kInputs; ++i) {
        int32_t both;
        __builtin_memcpy(&both, x + 2 * i, sizeof both);
        const __m512bh both_pixels = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], d[v], both_pixels);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(dw + i * kBlock + v * 16, sums[i][v]);
}

template <int kVectors, int kInputs = tile_inputs(kVectors)>
void add_pair_tile_of(int64_t inputs, const PairRows& t, float* dw) {
  if constexpr (kInputs > 1) {
    if (inputs < kInputs) return add_pair_tile_of<kVectors, kInputs - 1>(inputs, t, dw);
  }
  add_pair_tile<kVectors, kInputs>(t, dw);
}

template <int kVectors>
void bfloat16_task(const WeightGradientParams& p, int64_t chunk, int64_t c_begin, float* dw, void* scratch) {
  constexpr int kBlock = kVectors * kLanes<float>;
  const InputGradientParams& g = p.gradient;
  const Shape& out = g.map.shape;
  const Shape& in = p.x_shape;
  const FormRows<BFloat16> form = choose_form<BFloat16, BFloat16>(p);
  const int64_t rows = weight_gradient_rows(g.map);
  const int64_t pairs = (out.w + 1) / 2;
  const int64_t channel_pitch = interleaved_channels(in.c);
  const int64_t x_pair = 2 * channel_pitch, x_column = pairs * x_pair, x_input_row = p.window.kernel_w * x_column;
  BFloat16* dz = static_cast<BFloat16*>(scratch);      // [rows, W, block]
  BFloat16* dz_pairs = dz + rows * out.w * kBlock;     // [rows, pairs, block, 2]
  BFloat16* x_pairs = dz_pairs + rows * pairs * 2 * kBlock;  // [input rows, kernel_w, pairs, C_in, 2]
  const int64_t tiles = (in.c + tile_inputs(kVectors) - 1) / tile_inputs(kVectors);
  for (int64_t n = chunk * out.n / p.chunks; n < (chunk + 1) * out.n / p.chunks; ++n) {
    for (int64_t h = 0; h < out.h; h += rows) {
      const int64_t h_end = h + rows < out.h ? h + rows : out.h;
      form_dz(g, form, n, h, h_end, c_begin, kBlock, dz);
      for (int64_t r = 0; r < h_end - h; ++r)
        interleave_pixels(dz + r * out.w * kBlock, kBlock, out.w, 0, 1, out.w, kBlock, kBlock,
                          dz_pairs + r * pairs * 2 * kBlock);
      const int64_t x_first =
          h * p.window.stride_h - p.window.padding_h;  // the input row of output row h and the kernel's first row
      const int64_t x_last =
          (h_end - 1) * p.window.stride_h - p.window.padding_h + (p.window.kernel_h - 1) * p.window.dilation_h;
      for (int64_t row = x_first < 0 ? 0 : x_first; row <= x_last && row < in.h; ++row)
        for (int64_t kw = 0; kw < p.window.kernel_w; ++kw)
          interleave_pixels(at<BFloat16>(p.x, p.x_strides, n, 0, row, 0), p.x_strides.w, in.w,
                            kw * p.window.dilation_w - p.window.padding_w, p.window.stride_w, out.w, in.c,
                            channel_pitch, x_pairs + (row - x_first) * x_input_row + kw * x_column);
      for (int64_t kh = 0; kh < p.window.kernel_h; ++kh) {
        const Range valid = valid_range(out.h, in.h, p.window.stride_h, kh * p.window.dilation_h - p.window.padding_h);
        const int64_t first = valid.begin > h ? valid.begin : h;
        const int64_t last = valid.end < h_end ? valid.end : h_end;
        if (first >= last) continue;
        const int64_t x_offset = first * p.window.stride_h + kh * p.window.dilation_h - p.window.padding_h - x_first;
        for (int64_t kw = 0; kw < p.window.kernel_w; ++kw) {
          const BFloat16* x = x_pairs + x_offset * x_input_row + kw * x_column;
          PairRows t{dz_pairs + (first - h) * pairs * 2 * kBlock,
                     pairs * 2 * kBlock,
                     x,
                     p.window.stride_h * x_input_row,
                     x_pair,
                     last - first,
                     pairs};
          float* tap = dw + (kh * p.window.kernel_w + kw) * in.c * kBlock;
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t c = i * in.c / tiles;
            t.x = x + 2 * c;
            add_pair_tile_of<kVectors>((i + 1) * in.c / tiles - c, t, tap + c * kBlock);
          }
        }
      }
    }
  }
}

#endif

template <int kVectors>
void weight_gradient_block(const WeightGradientParams& p, int64_t chunk, int64_t c, float* dw, void* scratch) {
  const Map& map = p.gradient.map;
  if (p.winograd) {
    if (map.dtype == DType::kBFloat16) return winograd_weight_gradient<BFloat16, kVectors>(p, chunk, c, dw, scratch);
    return winograd_weight_gradient<float, kVectors>(p, chunk, c, dw, scratch);
  }
  const int64_t size = p.window.kernel_h * p.window.kernel_w * p.x_shape.c * kVectors * kLanes<float>;
  __builtin_memset(dw, 0, size * sizeof(float));
#if defined(__AVX512BF16__)
  if (map.dtype == DType::kBFloat16) return bfloat16_task<kVectors>(p, chunk, c, dw, scratch);
#endif
  float32_task<kVectors>(p, chunk, c, dw, scratch);
}

void weight_gradient(const WeightGradientParams& p, int64_t chunk, int64_t block, float* dw, void* scratch) {
  const int64_t c = block * kWeightGradientBlock, rest = p.gradient.map.shape.c - c;
  with_vectors(rest < kWeightGradientBlock ? rest : kWeightGradientBlock,
               [&]<int kVectors>() { weight_gradient_block<kVectors>(p, chunk, c, dw, scratch); });
}

#endif

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
