// Weight gradient with dz formed on the way: a direct convolution whose accumulators stay in registers.
//
// A task owns one part of the samples and one block of output channels.  It forms dz for a few rows at a time in the
// L1 cache and adds their outer products with the input to tiles of dw: kTileInputs input channels by a vector block
// of output channels, over all pixels of the rows, for each kernel tap.
#pragma once

#include "blocks.h"
#include "input_gradient.h"

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
  const int64_t steps = p.kernel_h * p.kernel_w * tiles;
  const int64_t bytes = sizeof(float);
  // What the next rows will need; past the end of the map nothing is read, and asking does no harm.
  const int64_t x_known = (h_end - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h - p.padding_h + 1;
  Prefetcher z(at<float>(p.gradient.z, p.gradient.z_strides, n, c_begin, h_end, 0), (h_end - h_begin) * out.w,
               p.gradient.z_strides.w * bytes, kBlock * bytes, steps);
  Prefetcher x_ahead(at<float>(p.x, p.x_strides, n, 0, x_known, 0), (h_end - h_begin) * p.stride_h * in.w,
                     p.x_strides.w * bytes, in.c * bytes, steps);
  for (int64_t kh = 0; kh < p.kernel_h; ++kh) {
    const int64_t offset_h = kh * p.dilation_h - p.padding_h;
    const Range valid = valid_range(out.h, in.h, p.stride_h, offset_h);
    const int64_t first = valid.begin > h_begin ? valid.begin : h_begin;
    const int64_t last = valid.end < h_end ? valid.end : h_end;
    if (first >= last) continue;
    for (int64_t kw = 0; kw < p.kernel_w; ++kw) {
      const int64_t offset_w = kw * p.dilation_w - p.padding_w;
      const Range columns = valid_range(out.w, in.w, p.stride_w, offset_w);
      if (columns.begin >= columns.end) continue;
      const float* x =
          at<float>(p.x, p.x_strides, n, 0, first * p.stride_h + offset_h, columns.begin * p.stride_w + offset_w);
      TileRows t{dz + ((first - h_begin) * out.w + columns.begin) * kBlock,
                 out.w * kBlock,
                 x,
                 p.stride_h * p.x_strides.h,
                 p.stride_w * p.x_strides.w,
                 last - first,
                 columns.end - columns.begin};
      float* tap = dw + (kh * p.kernel_w + kw) * in.c * kBlock;
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

using FormRows = void (*)(const InputGradientParams&, int64_t n, const Segment& rows, int64_t c_begin, int64_t c_end,
                          float* target, int64_t target_row, int64_t target_pixel);

FormRows choose_form(const InputGradientParams& p) {
  FormRows form = nullptr;
  for_bool(p.activation.relu, [&](auto relu) {
    for_bool(p.q != nullptr, [&](auto q) {
      for_bool(p.grad_y != nullptr,
               [&](auto dense) { form = input_gradient_rows<float, float, relu.value, q.value, dense.value>; });
    });
  });
  return form;
}

template <int kVectors>
void weight_gradient_task(const WeightGradientParams& p, FormRows form, int64_t chunk, int64_t c_begin, float* dw,
                          float* scratch, int64_t scratch_rows) {
  constexpr int kBlock = kVectors * kLanes<float>;
  const InputGradientParams& g = p.gradient;
  const Shape& shape = g.map.shape;
  for (int64_t n = chunk * shape.n / p.chunks; n < (chunk + 1) * shape.n / p.chunks; ++n) {
    for (int64_t h = 0; h < shape.h; h += scratch_rows) {
      const int64_t h_end = h + scratch_rows < shape.h ? h + scratch_rows : shape.h;
      for (int64_t s = 0; s < segment_count(g.bins_h); ++s) {
        Segment rows = segment(s, shape.h, g.bins_h);
        if (rows.begin < h) rows.begin = h;
        if (rows.end > h_end) rows.end = h_end;
        if (rows.begin >= rows.end) continue;
        form(g, n, rows, c_begin, c_begin + kBlock, scratch + (rows.begin - h) * shape.w * kBlock, shape.w * kBlock,
             kBlock);
      }
      add_rows<kVectors>(p, n, h, h_end, c_begin, scratch, dw);
    }
  }
}

// Task: (part of the samples, block of output channels).  scratch: weight_gradient_scratch floats.
void weight_gradient(const WeightGradientParams& p, int64_t begin, int64_t end, float* scratch) {
  const Shape& shape = p.gradient.map.shape;
  const int64_t blocks = weight_gradient_blocks(shape);
  const int64_t taps = p.kernel_h * p.kernel_w * p.x_shape.c;  // rows of dw per output channel
  const int64_t rows = weight_gradient_rows(shape);
  const FormRows form = choose_form(p.gradient);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t chunk = t / blocks, c = t % blocks * kWeightGradientBlock;
    float* dw = static_cast<float*>(p.dw) + (chunk * shape.c + c) * taps;
    const int64_t channels = shape.c - c < kWeightGradientBlock ? shape.c - c : kWeightGradientBlock;
    switch (channels / kLanes<float>) {
      case 1:
        weight_gradient_task<1>(p, form, chunk, c, dw, scratch, rows);
        break;
      case 2:
        weight_gradient_task<2>(p, form, chunk, c, dw, scratch, rows);
        break;
      case 3:
        weight_gradient_task<3>(p, form, chunk, c, dw, scratch, rows);
        break;
      default:
        weight_gradient_task<4>(p, form, chunk, c, dw, scratch, rows);
    }
  }
}

#endif

}  // namespace
}  // namespace layerwise::cpu::LAYERWISE_ISA
