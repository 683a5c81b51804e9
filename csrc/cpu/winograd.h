// Winograd's minimal filtering for 3x3 kernels with stride 1, channels_last: the convolution and its weight gradient.
//
// A tile of outputs and the inputs below it are transformed; the convolution is then one matrix product over the
// channels for each element of the transformed tile, all in float32.  One dimension, for outputs y, inputs d, weights g:
//   y = A^T ((G g) * (B^T d)),  and its transpose  dg = G^T ((A dy) * (B^T d)).
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.  The points of F(4, 3), +-5/8 and
// +-3/2 instead of +-1 and +-2, halve its rounding error (Barabasz et al., "Error Analysis and Improving the Accuracy of
// Winograd Convolution for Deep Neural Networks", 2020).
#pragma once

#include "input_gradient.h"
#include "statistics.h"
#include "winograd_plan.h"

namespace layerwise::cpu::LAYERWISE_ISA {
namespace {

#if defined(__AVX512F__)

using Float = Vec<float>;

static_assert(kWinogradLanes == kLanes<float> && kWinogradBlock == 4 * kLanes<float>);

// -- Transforms of one dimension: from elements `step` apart to elements `to` apart ----------------------------------------

struct Filter2 {  // F(2, 3), points 0, 1, -1, infinity
  static constexpr int kOutputs = 2, kInputs = 4;

  static ALWAYS_INLINE void inputs(const Float* d, int step, Float* t, int to) {
    t[0] = d[0] - d[2 * step];
    t[to] = d[step] + d[2 * step];
    t[2 * to] = d[2 * step] - d[step];
    t[3 * to] = d[step] - d[3 * step];
  }
  static ALWAYS_INLINE void outputs(const Float* m, int step, Float* y, int to) {
    y[0] = m[0] + m[step] + m[2 * step];
    y[to] = m[step] - m[2 * step] - m[3 * step];
  }
  static ALWAYS_INLINE void outputs_transposed(const Float* dy, int step, Float* t, int to) {
    t[0] = dy[0];
    t[to] = dy[0] + dy[step];
    t[2 * to] = dy[0] - dy[step];
    t[3 * to] = -dy[step];
  }
  static ALWAYS_INLINE void weights(const Float* g, int step, Float* t, int to) {
    const Float even = 0.5f * (g[0] + g[2 * step]), odd = 0.5f * g[step];
    t[0] = g[0];
    t[to] = even + odd;
    t[2 * to] = even - odd;
    t[3 * to] = g[2 * step];
  }
  static ALWAYS_INLINE void weights_transposed(const Float* t, int step, Float* dg, int to) {
    const Float even = 0.5f * (t[step] + t[2 * step]), odd = 0.5f * (t[step] - t[2 * step]);
    dg[0] = t[0] + even;
    dg[to] = odd;
    dg[2 * to] = even + t[3 * step];
  }
};

struct Filter4 {  // F(4, 3), points 0, a, -a, b, -b, infinity
  static constexpr int kOutputs = 4, kInputs = 6;
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;
  static constexpr float at_zero = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

  static ALWAYS_INLINE void inputs(const Float* d, int step, Float* t, int to) {
    const Float d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    const Float even_a = d4 - b2 * d2, odd_a = a * (d3 - b2 * d1);
    const Float even_b = d4 - a2 * d2, odd_b = b * (d3 - a2 * d1);
    t[0] = d4 - (a2 + b2) * d2 + (a2 * b2) * d[0];
    t[to] = even_a + odd_a;
    t[2 * to] = even_a - odd_a;
    t[3 * to] = even_b + odd_b;
    t[4 * to] = even_b - odd_b;
    t[5 * to] = d[5 * step] - (a2 + b2) * d3 + (a2 * b2) * d1;
  }
  static ALWAYS_INLINE void outputs(const Float* m, int step, Float* y, int to) {
    const Float even_a = m[step] + m[2 * step], odd_a = m[step] - m[2 * step];
    const Float even_b = m[3 * step] + m[4 * step], odd_b = m[3 * step] - m[4 * step];
    y[0] = m[0] + even_a + even_b;
    y[to] = a * odd_a + b * odd_b;
    y[2 * to] = a2 * even_a + b2 * even_b;
    y[3 * to] = (a * a2) * odd_a + (b * b2) * odd_b + m[5 * step];
  }
  static ALWAYS_INLINE void outputs_transposed(const Float* dy, int step, Float* t, int to) {
    const Float y0 = dy[0], y1 = dy[step], y2 = dy[2 * step], y3 = dy[3 * step];
    const Float even_a = y0 + a2 * y2, odd_a = a * (y1 + a2 * y3);
    const Float even_b = y0 + b2 * y2, odd_b = b * (y1 + b2 * y3);
    t[0] = y0;
    t[to] = even_a + odd_a;
    t[2 * to] = even_a - odd_a;
    t[3 * to] = even_b + odd_b;
    t[4 * to] = even_b - odd_b;
    t[5 * to] = y3;
  }
  static ALWAYS_INLINE void weights(const Float* g, int step, Float* t, int to) {
    const Float g0 = g[0], g1 = g[step], g2 = g[2 * step];
    const Float even_a = at_a * (g0 + a2 * g2), odd_a = (at_a * a) * g1;
    const Float even_b = at_b * (g0 + b2 * g2), odd_b = (at_b * b) * g1;
    t[0] = at_zero * g0;
    t[to] = even_a + odd_a;
    t[2 * to] = even_a - odd_a;
    t[3 * to] = even_b + odd_b;
    t[4 * to] = even_b - odd_b;
    t[5 * to] = g2;
  }
  static ALWAYS_INLINE void weights_transposed(const Float* t, int step, Float* dg, int to) {
    const Float even_a = at_a * (t[step] + t[2 * step]), odd_a = (at_a * a) * (t[step] - t[2 * step]);
    const Float even_b = at_b * (t[3 * step] + t[4 * step]), odd_b = (at_b * b) * (t[3 * step] - t[4 * step]);
    dg[0] = at_zero * t[0] + even_a + even_b;
    dg[to] = odd_a + odd_b;
    dg[2 * to] = a2 * even_a + b2 * even_b + t[5 * step];
  }
};

// The filters of rows and columns for maps of T, as in winograd_plan.
template <class T>
struct Tile;
template <>
struct Tile<float> {
  using H = Filter2;
  using W = Filter4;
};
template <>
struct Tile<BFloat16> {
  using H = Filter4;
  using W = Filter4;
};

// From kFromH x kFromW elements to kToH x kToW, both with rows in order: first along h, then along w.
template <auto kAlongH, auto kAlongW, int kFromH, int kFromW, int kToH, int kToW>
LAYERWISE_INLINE void transform(const Float (&from)[kFromH * kFromW], Float (&to)[kToH * kToW]) {
  Float half[kToH * kFromW];
#pragma GCC unroll 6
  for (int j = 0; j < kFromW; ++j) kAlongH(from + j, kFromW, half + j, kFromW);
#pragma GCC unroll 6
  for (int i = 0; i < kToH; ++i) kAlongW(half + i * kFromW, 1, to + i * kToW, 1);
}

// -- The matrix product --------------------------------------------------------------------------------------------------

// Most rows of a product: with `vectors` vectors per row its sums fill 24 of the 32 registers.
constexpr int product_rows(int vectors) { return 24 / vectors; }

// sum[r, :] (+)= over i of a[r * a_row + i * a_step] * b[i, :], rows of kVectors vectors.
struct Product {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t steps;
  float* sum;
};

template <int kVectors, int kRows, bool kAdd>
void multiply_rows(const Product& p) {
  constexpr int kBlock = kVectors * kLanes<float>;
  Float sums[kRows][kVectors] = {};
  const float *a = p.a, *b = p.b;
  for (int64_t i = 0; i < p.steps; ++i, a += p.a_step, b += kBlock) {
    Float row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes<float>);
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[r * p.a_row] * row[v];
  }
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* target = p.sum + r * kBlock + v * kLanes<float>;
      store(target, kAdd ? load(target) + sums[r][v] : sums[r][v]);
    }
  }
}

template <int kVectors, bool kAdd, int kRows = product_rows(kVectors)>
void multiply_up_to(int64_t rows, const Product& p) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_up_to<kVectors, kAdd, kRows - 1>(rows, p);
  }
  multiply_rows<kVectors, kRows, kAdd>(p);
}

// Pieces of nearly equal size: a small last one would wait for its few sums instead of multiplying.
int64_t product_pieces(int64_t rows, int vectors) { return divide_up(rows, product_rows(vectors)); }

template <int kVectors, bool kAdd, class... Prefetchers>
void multiply(int64_t rows, Product p, Prefetchers&... prefetchers) {
  const int64_t pieces = product_pieces(rows, kVectors);
  const Product whole = p;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = i * rows / pieces;
    p.a = whole.a + first * whole.a_row;
    p.sum = whole.sum + first * kVectors * kLanes<float>;
    multiply_up_to<kVectors, kAdd>((i + 1) * rows / pieces - first, p);
    (prefetchers.step(), ...);
  }
}

// -- Tiles ---------------------------------------------------------------------------------------------------------------

struct TilePlace {
  int64_t n, h, w;  // first output pixel
};
LAYERWISE_INLINE TilePlace tile_place(const WinogradPlan& plan, int64_t row, int64_t column) {
  return {row / plan.rows_of_sample, row % plan.rows_of_sample * plan.tile_h, column * plan.tile_w};
}

// Some columns of some rows of tiles.
struct TileRange {
  int64_t row_begin, row_end, column_begin, column_end;
  int64_t tiles() const { return (row_end - row_begin) * (column_end - column_begin); }
};

// Calls body(range) for the rows [begin, end) of tiles, a few columns at a time.
template <class Body>
LAYERWISE_INLINE void for_each_range(const WinogradPlan& plan, int64_t begin, int64_t end, const Body& body) {
  for (int64_t column = 0; column < plan.tiles_of_row; column += plan.columns) {
    const int64_t rest = plan.tiles_of_row - column;
    body(TileRange{begin, end, column, column + (rest < plan.columns ? rest : plan.columns)});
  }
}

// Addresses of the kH x kW pixels from (h, w) on, `outside` for those beyond the map.
template <int kH, int kW, class T>
LAYERWISE_INLINE void pixel_addresses(T* sample, const Strides& strides, const Shape& map, int64_t h, int64_t w,
                                      T* outside, T* (&pixels)[kH * kW]) {
#pragma GCC unroll 6
  for (int i = 0; i < kH; ++i) {
    const bool row = h + i >= 0 && h + i < map.h;
#pragma GCC unroll 6
    for (int j = 0; j < kW; ++j) {
      const bool inside = row && w + j >= 0 && w + j < map.w;
      pixels[i * kW + j] = inside ? sample + (h + i) * strides.h + (w + j) * strides.w : outside;
    }
  }
}

// B^T x B of some tiles, [products, tiles, C_in]; channels are padded to whole vectors.
template <class T>
void transform_inputs(const WinogradPlan& plan, const void* x, const Shape& shape, const Strides& strides,
                      int64_t padding_h, int64_t padding_w, const TileRange& range, const T* zeros, float* target) {
  using H = typename Tile<T>::H;
  using W = typename Tile<T>::W;
  const int64_t channels = round_to_lanes(shape.c);
  for (int64_t row = range.row_begin; row < range.row_end; ++row) {
    for (int64_t column = range.column_begin; column < range.column_end; ++column, target += channels) {
      const TilePlace place = tile_place(plan, row, column);
      const T* pixels[H::kInputs * W::kInputs];
      pixel_addresses<H::kInputs, W::kInputs>(at<T>(x, strides, place.n, 0, 0, 0), strides, shape, place.h - padding_h,
                                              place.w - padding_w, zeros, pixels);
      for_each_vector<float>(shape.c, [&](int64_t c, auto group) ALWAYS_INLINE {
        Float d[H::kInputs * W::kInputs], t[H::kInputs * W::kInputs], one[1];
#pragma GCC unroll 36
        for (int i = 0; i < H::kInputs * W::kInputs; ++i) {
          group.get(pixels[i] + c, one);
          d[i] = one[0];
        }
        transform<H::inputs, W::inputs, H::kInputs, W::kInputs, H::kInputs, W::kInputs>(d, t);
#pragma GCC unroll 36
        for (int i = 0; i < H::kInputs * W::kInputs; ++i) store(target + i * plan.input_pitch + c, t[i]);
      });
    }
  }
}

// What the rows of tiles behind `end` will read of a map; past its end nothing is read, and asking does no harm.
template <class T>
Prefetcher next_rows(const WinogradPlan& plan, const void* map, const Strides& strides, const Shape& shape,
                     int64_t first_channel, int64_t channels, int64_t end, int64_t known_rows, int64_t steps) {
  const TilePlace place = tile_place(plan, end, 0);
  const T* first = at<T>(map, strides, place.n, first_channel, place.h + known_rows, 0);
  return {first, plan.group_rows * plan.tile_h * shape.w, strides.w * static_cast<int64_t>(sizeof(T)),
          channels * static_cast<int64_t>(sizeof(T)), steps};
}

// -- Weights ---------------------------------------------------------------------------------------------------------------

// Task: an input channel.  transformed: [blocks of output channels][products][C_in][block]
template <class T>
void transform_weights(const ConvolutionParams& p, int64_t begin, int64_t end) {
  using H = typename Tile<T>::H;
  using W = typename Tile<T>::W;
  constexpr int kTaps = kWinogradTaps * kWinogradTaps, kProducts = H::kInputs * W::kInputs;
  const int64_t inputs = p.x_shape.c;
  float* block_target = static_cast<float*>(p.weights);
  for (int64_t k = p.channel_begin; k < p.channel_end; k += kWinogradBlock) {
    const int64_t block = p.channel_end - k < kWinogradBlock ? p.channel_end - k : kWinogradBlock;
    const int64_t pitch = inputs * block + kWinogradSkew;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t v = 0; v < block; v += kLanes<float>) {
        Float g[kTaps], t[kProducts];
        for (int tap = 0; tap < kTaps; ++tap) {
          const T* w = at<T>(p.w, p.w_strides, k + v, c, tap / kWinogradTaps, tap % kWinogradTaps);
          float lanes[kLanes<float>];
          for (int i = 0; i < kLanes<float>; ++i) lanes[i] = load_one(w + i * p.w_strides.n);
          g[tap] = load(lanes);
        }
        transform<H::weights, W::weights, kWinogradTaps, kWinogradTaps, H::kInputs, W::kInputs>(g, t);
#pragma GCC unroll 36
        for (int i = 0; i < kProducts; ++i) store(block_target + i * pitch + c * block + v, t[i]);
      }
    }
    block_target += kProducts * pitch;
  }
}

// -- Forward -----------------------------------------------------------------------------------------------------------------

template <class T, int kVectors>
void convolve_block(const ConvolutionParams& p, const WinogradPlan& plan, const TileRange& range, int64_t k,
                    const float* inputs, const float* weights, float* products, Prefetcher& prefetcher) {
  using H = typename Tile<T>::H;
  using W = typename Tile<T>::W;
  constexpr int kBlock = kVectors * kLanes<float>, kProducts = H::kInputs * W::kInputs;
  constexpr int kOutputs = H::kOutputs * W::kOutputs;
  const int64_t channels = p.x_shape.c;
  for (int i = 0; i < kProducts; ++i) {
    multiply<kVectors, false>(
        range.tiles(),
        {inputs + i * plan.input_pitch, round_to_lanes(channels), 1, weights + i * (channels * kBlock + kWinogradSkew),
         channels, products + i * plan.output_pitch},
        prefetcher);
  }
  T unused[kBlock];  // pixels of a tile beyond the edge of the map
  const float* source = products;
  for (int64_t row = range.row_begin; row < range.row_end; ++row) {
    for (int64_t column = range.column_begin; column < range.column_end; ++column, source += kBlock) {
      const TilePlace place = tile_place(plan, row, column);
      T* pixels[kOutputs];
      pixel_addresses<H::kOutputs, W::kOutputs>(at<T>(p.z, p.z_strides, place.n, k, 0, 0), p.z_strides, p.map.shape,
                                                place.h, place.w, unused, pixels);
#pragma GCC unroll 1
      for (int v = 0; v < kVectors; ++v) {
        Float m[kProducts], y[kOutputs];
#pragma GCC unroll 36
        for (int i = 0; i < kProducts; ++i) m[i] = load(source + i * plan.output_pitch + v * kLanes<float>);
        transform<H::outputs, W::outputs, H::kInputs, W::kInputs, H::kOutputs, W::kOutputs>(m, y);
#pragma GCC unroll 16
        for (int i = 0; i < kOutputs; ++i) store(pixels[i] + v * kLanes<float>, y[i]);
      }
    }
  }
}

template <class T>
void convolve(const ConvolutionParams& p, int64_t begin, int64_t end, void* scratch) {
  const WinogradPlan plan = winograd_plan(p.map, p.x_shape.c);
  float* inputs = static_cast<float*>(scratch);
  float* products = inputs + plan.products * plan.input_pitch;
  T* zeros = reinterpret_cast<T*>(products + plan.products * plan.output_pitch);
  for (int64_t c = 0; c < round_to_lanes(p.x_shape.c); ++c) zeros[c] = T{};
  const int64_t blocks = divide_up(p.channel_end - p.channel_begin, kWinogradBlock);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * plan.group_rows;
    const int64_t last = first + plan.group_rows < plan.rows ? first + plan.group_rows : plan.rows;
    const int64_t steps = divide_up(plan.tiles_of_row, plan.columns) * plan.products * blocks;
    Prefetcher prefetcher =
        next_rows<T>(plan, p.x, p.x_strides, p.x_shape, 0, p.x_shape.c, last, kWinogradTaps - 1 - p.window.padding_h,
                     steps * product_pieces(plan.most_tiles, 4));
    for_each_range(plan, first, last, [&](const TileRange& range) {
      transform_inputs<T>(plan, p.x, p.x_shape, p.x_strides, p.window.padding_h, p.window.padding_w, range, zeros,
                          inputs);
      const float* weights = static_cast<const float*>(p.weights);
      for (int64_t k = p.channel_begin; k < p.channel_end; k += kWinogradBlock) {
        const int64_t block = p.channel_end - k < kWinogradBlock ? p.channel_end - k : kWinogradBlock;
        with_vectors(block, [&]<int kVectors>() {
          convolve_block<T, kVectors>(p, plan, range, k, inputs, weights, products, prefetcher);
        });
        weights += plan.products * (p.x_shape.c * block + kWinogradSkew);
      }
    });
    if (p.block_mean == nullptr) continue;
    const PixelRun run = winograd_pixels(plan, p.map.shape, first, last);
    run_statistics(p, static_cast<const T*>(p.z) + run.first * p.z_strides.w, run.last - run.first,
                   group * plan.group_blocks, p.channel_begin, p.channel_end);
  }
}

void winograd_weights(const ConvolutionParams& p, int64_t begin, int64_t end) {
  p.map.dtype == DType::kBFloat16 ? transform_weights<BFloat16>(p, begin, end)
                                  : transform_weights<float>(p, begin, end);
}

void winograd(const ConvolutionParams& p, int64_t begin, int64_t end, void* scratch) {
  p.map.dtype == DType::kBFloat16 ? convolve<BFloat16>(p, begin, end, scratch)
                                  : convolve<float>(p, begin, end, scratch);
}

// -- Weight gradient -----------------------------------------------------------------------------------------------------

// A dz A^T of some tiles of one row, [products, tiles, block], from dz of that row, [tile_h, W, block].
template <class T, int kVectors>
void transform_gradients(const WinogradPlan& plan, const float* dz, const Shape& rows, const TileRange& range,
                         const float* zeros, float* target) {
  using H = typename Tile<T>::H;
  using W = typename Tile<T>::W;
  constexpr int kBlock = kVectors * kLanes<float>;
  constexpr int kOutputs = H::kOutputs * W::kOutputs, kProducts = H::kInputs * W::kInputs;
  const Strides strides{0, 1, rows.w * kBlock, kBlock};
  for (int64_t column = range.column_begin; column < range.column_end; ++column, target += kBlock) {
    const float* pixels[kOutputs];
    pixel_addresses<H::kOutputs, W::kOutputs>(dz, strides, rows, 0, column * plan.tile_w, zeros, pixels);
#pragma GCC unroll 1
    for (int64_t v = 0; v < kBlock; v += kLanes<float>) {
      Float d[kOutputs], t[kProducts];
#pragma GCC unroll 16
      for (int i = 0; i < kOutputs; ++i) d[i] = load(pixels[i] + v);
      transform<H::outputs_transposed, W::outputs_transposed, H::kOutputs, W::kOutputs, H::kInputs, W::kInputs>(d, t);
#pragma GCC unroll 36
      for (int i = 0; i < kProducts; ++i) store(target + i * plan.output_pitch + v, t[i]);
    }
  }
}

// dw, [3, 3, C_in, block], from the transformed sums, [products, C_in, block].
template <class T, int kVectors>
void untransform_weights(const float* sums, int64_t pitch, int64_t inputs, float* dw) {
  using H = typename Tile<T>::H;
  using W = typename Tile<T>::W;
  constexpr int kProducts = H::kInputs * W::kInputs, kTaps = kWinogradTaps * kWinogradTaps;
  const int64_t size = inputs * kVectors * kLanes<float>;
  for (int64_t offset = 0; offset < size; offset += kLanes<float>) {
    Float t[kProducts], taps[kTaps];
#pragma GCC unroll 36
    for (int i = 0; i < kProducts; ++i) t[i] = load(sums + i * pitch + offset);
    transform<H::weights_transposed, W::weights_transposed, H::kInputs, W::kInputs, kWinogradTaps, kWinogradTaps>(t,
                                                                                                                  taps);
    for (int tap = 0; tap < kTaps; ++tap) store(dw + tap * size + offset, taps[tap]);
  }
}

// Task as in weight_gradient.h: dw, [3, 3, C_in, block], is that of the samples of one chunk.
template <class T, int kVectors>
void winograd_weight_gradient(const WeightGradientParams& p, int64_t chunk, int64_t k, float* dw, void* scratch) {
  constexpr int kBlock = kVectors * kLanes<float>;
  const InputGradientParams& g = p.gradient;
  const Shape& shape = g.map.shape;
  const WinogradPlan plan = winograd_plan(g.map, p.x_shape.c);
  const FormRows<float> form = choose_form<T, float>(p);
  const int64_t inputs = p.x_shape.c, sum_pitch = inputs * kBlock + kWinogradSkew;
  float* transformed_x = static_cast<float*>(scratch);
  float* transformed_dz = transformed_x + plan.products * plan.input_pitch;
  float* sums = transformed_dz + plan.products * plan.output_pitch;
  float* dz = sums + plan.products * sum_pitch;
  float* zero_dz = dz + plan.tile_h * shape.w * kBlock;
  T* zero_x = reinterpret_cast<T*>(zero_dz + kBlock);
  for (int64_t i = 0; i < plan.products * sum_pitch; ++i) sums[i] = 0;
  for (int i = 0; i < kBlock; ++i) zero_dz[i] = 0;
  for (int64_t c = 0; c < inputs; ++c) zero_x[c] = T{};

  const int64_t chunk_end = (chunk + 1) * shape.n / p.chunks * plan.rows_of_sample;
  for (int64_t first = chunk * shape.n / p.chunks * plan.rows_of_sample; first < chunk_end; first += plan.group_rows) {
    const int64_t last = first + plan.group_rows < chunk_end ? first + plan.group_rows : chunk_end;
    const int64_t steps = divide_up(plan.tiles_of_row, plan.columns) * plan.products * product_pieces(inputs, kVectors);
    Prefetcher z = next_rows<T>(plan, g.z, g.z_strides, shape, k, kBlock, last, 0, steps);
    Prefetcher x =
        next_rows<T>(plan, p.x, p.x_strides, p.x_shape, 0, inputs, last, kWinogradTaps - 1 - p.window.padding_h, steps);
    for_each_range(plan, first, last, [&](const TileRange& range) {
      transform_inputs<T>(plan, p.x, p.x_shape, p.x_strides, p.window.padding_h, p.window.padding_w, range, zero_x,
                          transformed_x);
      float* target = transformed_dz;
      for (int64_t row = first; row < last; ++row, target += (range.column_end - range.column_begin) * kBlock) {
        const TilePlace begin = tile_place(plan, row, 0);
        const int64_t h_end = begin.h + plan.tile_h < shape.h ? begin.h + plan.tile_h : shape.h;
        if (range.column_begin == 0) form_dz(g, form, begin.n, begin.h, h_end, k, kBlock, dz);  // of the whole row
        transform_gradients<T, kVectors>(plan, dz, {1, kBlock, h_end - begin.h, shape.w}, range, zero_dz, target);
      }
      for (int64_t i = 0; i < plan.products; ++i) {
        multiply<kVectors, true>(inputs,
                                 {transformed_x + i * plan.input_pitch, 1, round_to_lanes(inputs),
                                  transformed_dz + i * plan.output_pitch, range.tiles(), sums + i * sum_pitch},
                                 z, x);
      }
    });
  }
  untransform_weights<T, kVectors>(sums, sum_pitch, inputs, dw);
}

#endif

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
