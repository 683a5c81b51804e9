// PixelSums on the host, for each thread of the warp group that has a tile's accumulators: every accumulator is visited
// once, and the sums lie with their channels.  Prints "correct", or what is wrong.
#include <cstdio>
#include <limits>
#include <vector>

#include "cuda/cutlass/implicit_gemm.h"

using namespace layerwise::cuda;

namespace {

constexpr int kThreads = 128;

// What CUTLASS gives to the callbacks of a thread, as far as they use it for layouts.
template <class EpilogueTile, class TiledCopy>
struct Arguments {
  EpilogueTile epi_tile;
  TiledCopy tiled_copy;
  int thread_idx;
};

template <int kTileM, int kTileN>
bool correct() {
  using namespace cute;
  using Gemm = ImplicitGemm<cutlass::bfloat16_t, kTileM, kTileN, 1, 4, 1>;
  using Epilogue = typename Gemm::Epilogue;
  using Sums = PixelSums<typename Gemm::Tile>;
  const typename Gemm::Mainloop::TiledMma mma;
  const typename Epilogue::EpilogueTile epi_tile;
  // As in CollectiveEpilogue::store.
  const auto copy = make_tiled_copy_S(Copy_Atom<typename Epilogue::CopyOpR2S, cutlass::bfloat16_t>{},
                                      make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, mma));
  const auto positions = make_identity_tensor(make_shape(Int<kTileM>{}, Int<kTileN>{}));

  const auto z = [](int pixel, int channel) { return static_cast<float>((pixel * 37 + channel * 11) % 17 - 8); };
  std::vector<int> visits(kTileM * kTileN);
  std::vector<std::vector<float>> values(kThreads, std::vector<float>(Sums::kOwn));
  for (int thread = 0; thread < kThreads; ++thread) {
    const auto slice = copy.get_slice(thread);
    const auto accumulators = slice.retile_S(mma.get_thread_slice(thread).partition_C(positions));
    const Arguments<typename Epilogue::EpilogueTile, std::decay_t<decltype(copy)>> args{epi_tile, copy, thread};
    auto sums = make_tensor_like<float>(Sums::template own<true>(make_smem_ptr<float>(nullptr), args));
    fill(sums, 0.f);
    constexpr int kEpilogueN = size<1>(typename Epilogue::EpilogueTile{});
    constexpr int kMmaN = kTileN / decltype(size<2>(accumulators))::value;
    for (int n = 0; n < size<4>(sums); ++n)
      for (int m = 0; m < size<3>(sums); ++m) {
        auto sum = sums(_, _, _, m, n);
        const auto own = accumulators(_, m, n * kEpilogueN / kMmaN);
        const int first = n % (kMmaN / kEpilogueN) * size(sum);
        for (int i = 0; i < size(sum); ++i) {
          const int pixel = get<0>(own(first + i)), channel = get<1>(own(first + i));
          ++visits[pixel * kTileN + channel];
          sum(i) += z(pixel, channel);
        }
      }
    const auto own_values = filter(sums);
    for (int i = 0; i < Sums::kOwn; ++i) values[thread][i] = own_values(i);
  }
  for (const int count : visits)
    if (count != 1) return std::puts("an accumulator is not visited once"), false;

  // fold(), all threads at once
  int count = Sums::kOwn;
  for (int bit = 4; bit < 32; bit *= 2) {
    count /= 2;
    const auto before = values;
    for (int thread = 0; thread < kThreads; ++thread)
      for (int i = 0; i < count; ++i) {
        const int kept = (thread & bit) != 0 ? i + count : i;
        values[thread][i] = before[thread][kept] + before[thread ^ bit][kept];
      }
  }
  std::vector<float> shared(Sums::kWarps * kTileN, std::numeric_limits<float>::quiet_NaN());
  for (int thread = 0; thread < kThreads; ++thread) {
    const Arguments<typename Epilogue::EpilogueTile, std::decay_t<decltype(copy)>> args{epi_tile, copy, thread};
    auto target = filter(Sums::template own<true>(make_smem_ptr(shared.data() + thread / 32 * kTileN), args));
    for (int i = 0; i < count; ++i) target(folded_begin<Sums::kOwn>(thread % 32) + i) = values[thread][i];
  }
  for (int channel = 0; channel < kTileN; ++channel) {
    float sum = 0, exact = 0;
    for (int warp = 0; warp < Sums::kWarps; ++warp) sum += shared[warp * kTileN + channel];
    for (int pixel = 0; pixel < kTileM; ++pixel) exact += z(pixel, channel);
    if (sum != exact) {
      std::printf("%dx%d, channel %d: %g instead of %g\n", kTileM, kTileN, channel, sum, exact);
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  if (!correct<64, 64>() || !correct<64, 128>() || !correct<128, 64>() || !correct<128, 128>()) return 1;
  std::puts("correct");
}
