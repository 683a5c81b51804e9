// Statistics from the sums of a convolution's tiles, against float64: `tile_sums` says "correct", or what is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cuda/fused_convolution.h"

namespace {

using layerwise::cuda::TileSums;

struct Case {
  int64_t rows, channels, tile_rows, row_stride;
  float mean, deviation;
};

bool correct(const Case& k) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal(k.mean, k.deviation);
  const int64_t tiles = (k.rows + k.tile_rows - 1) / k.tile_rows;
  const auto size = static_cast<size_t>(tiles * k.row_stride);
  const auto channels = static_cast<size_t>(k.channels);
  // What lies past the channels must not be read, so it is NaN.
  std::vector<float> sums(size, std::numeric_limits<float>::quiet_NaN()), squares = sums;
  std::vector<float> mean(channels), var(channels);
  std::vector<double> z(static_cast<size_t>(k.rows));
  std::vector<double> exact_mean(channels), exact_var(channels);
  for (int64_t c = 0; c < k.channels; ++c) {
    double sum = 0, m2 = 0;
    for (double& v : z) sum += v = normal(random);
    for (const double v : z) m2 += (v - sum / k.rows) * (v - sum / k.rows);
    exact_mean[c] = sum / k.rows;
    exact_var[c] = m2 / k.rows;
    for (int64_t t = 0; t < tiles; ++t) {
      float tile_sum = 0, tile_square = 0;
      for (int64_t r = t * k.tile_rows; r < std::min(k.rows, (t + 1) * k.tile_rows); ++r) {
        const float v = static_cast<float>(z[r]);
        tile_sum += v;
        tile_square += v * v;
      }
      sums[t * k.row_stride + c] = tile_sum;
      squares[t * k.row_stride + c] = tile_square;
    }
  }
  layerwise::cuda::combine_tile_sums(
      {k.rows, k.channels, tiles, k.row_stride, sums.data(), squares.data(), mean.data(), var.data()}, nullptr);
  // A rounding of each of a tile's terms, relative to the sums of |z| and of z * z.
  const double scale = std::abs(k.mean) + k.deviation, rounding = std::numeric_limits<float>::epsilon();
  for (int64_t c = 0; c < k.channels; ++c) {
    const double error_mean = std::abs(mean[c] - exact_mean[c]), error_var = std::abs(var[c] - exact_var[c]);
    if (!(error_mean <= 4 * rounding * scale && error_var <= 8 * rounding * scale * scale)) {
      std::printf("%ld rows, channel %ld: mean %g, not %g; variance %g, not %g\n", static_cast<long>(k.rows),
                  static_cast<long>(c), mean[c], exact_mean[c], var[c], exact_var[c]);
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const Case cases[] = {
      {128, 8, 128, 64, 0, 1},         // one tile
      {1, 8, 64, 64, 3, 1},            // one pixel
      {1000, 24, 128, 64, 1, 1},       // the last tile is short
      {64 * 600 + 1, 8, 64, 8, -2, 1}  // more tiles than threads, one pixel in the last
  };
  for (const Case& k : cases)
    if (!correct(k)) return 1;
  if (layerwise::cuda::fused_convolution_count() != 0) return std::puts("kernels without CUTLASS"), 1;
  std::puts("correct");
}
