// CUTLASS's implicit GEMM for sm_90 with the sums of its result in the epilogue.
//
// M runs over the pixels of z in the order of their memory, N over its channels, K over channels and taps of the
// window.  A block computes one tile, kTileM pixels by kTileN channels; the tile of block x begins at pixel x * kTileM,
// whatever the cluster, for these kernels have no scheduler.  Pixels and channels past the end of z are loaded as zeros
// and add nothing to the sums.
#pragma once

// clang-format off: other headers of CUTLASS use these two without including them.
#include <cutlass/kernel_hardware_info.hpp>
#include <cute/tensor.hpp>
// clang-format on
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace layerwise::cuda {

// From kCount values, one for each channel that a thread has, to kCount / 8 sums over the lanes with the same channels
// and other pixels, those that differ in the bits 4, 8 and 16: each time, half of the values go to the other lane.
template <int kBit, int kCount, class Values>
CUTLASS_DEVICE void fold(Values& values, int lane) {
  if constexpr (kBit < 32) {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane & kBit) != 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? values(i + kHalf) : values(i), given = upper ? values(i) : values(i + kHalf);
      values(i) = kept + __shfl_xor_sync(0xffffffff, given, kBit);
    }
    fold<2 * kBit, kHalf>(values, lane);
  }
}
// Where the first of them lies among the kCount.
template <int kCount>
CUTLASS_HOST_DEVICE int folded_begin(int lane) {
  return (lane / 4 % 2) * (kCount / 2) + (lane / 8 % 2) * (kCount / 4) + (lane / 16 % 2) * (kCount / 8);
}

// Sums the accumulators and their squares over the pixels of a tile on their way through the epilogue.  Each tile
// writes a row of its own, so there are no atomics, and the sums are the same in every run.
//
// In the place of two of CUTLASS's Sm90RowReduction: its loops over 128 channels are not unrolled, and their values
// then lie in local memory.
template <class Tile>
struct PixelSums {
  struct SharedStorage {};
  struct Arguments {
    float* sums;
    float* squares;
  };
  using Params = Arguments;
  static constexpr int kTileM = cute::size<0>(Tile{}), kTileN = cute::size<1>(Tile{});
  static constexpr int kWarps = 4;  // of the warp group that has the accumulators, each with other pixels
  static constexpr int kOwn = kTileN / 4;  // channels of a thread
  using Row = cute::Layout<cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>>, cute::Stride<cute::_0, cute::_1>>;

  Params params;

  PixelSums() = default;
  CUTLASS_HOST_DEVICE PixelSums(const Params& p, const SharedStorage&) : params(p) {}

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const Args&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  // The part of a row at `data` that a thread has, in the order of its accumulators.
  template <bool kSource, class Data, class Args>
  static CUTLASS_HOST_DEVICE auto own(Data data, const Args& args) {
    return cutlass::epilogue::fusion::sm90_partition_for_epilogue<kSource>(
        cute::make_tensor(data, Row{}), args.epi_tile, args.tiled_copy, args.thread_idx);
  }

  template <bool kSource, class Values, class Args>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    Values sums, squares;
    Params params;
    Args args;

    CUTLASS_DEVICE Callbacks(const Values& zeros, const Params& p, const Args& a)
        : sums(zeros), squares(zeros), params(p), args(a) {}

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, kSize>& values, int epi_v, int epi_m, int epi_n) {
      using cute::_;
      auto sum = sums(_, _, _, epi_m, epi_n), square = squares(_, _, _, epi_m, epi_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        sum(epi_v * kSize + i) += values[i];
        square(epi_v * kSize + i) += values[i] * values[i];
      }
      return values;
    }

    // `buffer` is memory of the next store of z, free at this point.
    template <class Buffer, class Sync, class Results>
    CUTLASS_DEVICE void reduce(Buffer&& buffer, const Sync& sync, int, int, bool last, const Results&) {
      static_assert(cute::cosize_v<typename cute::remove_cvref_t<Buffer>::layout_type> *
                        sizeof(typename cute::remove_cvref_t<Buffer>::value_type) >=
                    2 * kWarps * kTileN * sizeof(float));
      if (!last) return;
      const auto [pixels, channels, k, l] = args.problem_shape_mnkl;
      const auto [tile_m, tile_n, tile_k, tile_l] = args.tile_coord_mnkl;
      if (tile_m * kTileM >= pixels) return;  // the other block of a pair, past the end
      float* const shared = reinterpret_cast<float*>(cute::raw_pointer_cast(buffer.data()));
      const int thread = args.thread_idx, warp = thread / 32, lane = thread % 32;
      const int64_t row = static_cast<int64_t>(tile_m) * ((channels + kTileN - 1) / kTileN * kTileN) + tile_n * kTileN;
      sync();
      each(sums, shared, warp, lane);
      each(squares, shared + kWarps * kTileN, warp, lane);
      sync();
      for (int i = thread; i < 2 * kTileN; i += 32 * kWarps) {
        const int square = i / kTileN, channel = i % kTileN;
        const float* const of_warps = shared + square * kWarps * kTileN + channel;
        (square ? params.squares : params.sums)[row + channel] =
            (of_warps[0] + of_warps[kTileN]) + (of_warps[2 * kTileN] + of_warps[3 * kTileN]);
      }
      sync();
    }

    // To shared memory: [warp, channel].
    CUTLASS_DEVICE void each(Values& values, float* shared, int warp, int lane) {
      auto own_values = cute::filter(values);
      fold<4, kOwn>(own_values, lane);
      auto target = cute::filter(own<kSource>(cute::make_smem_ptr(shared + warp * kTileN), args));
      static_assert(cute::size(own_values) == kOwn && cute::size(target) == kOwn);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kOwn / 8; ++i) target(folded_begin<kOwn>(lane) + i) = own_values(i);
    }
  };

  template <bool kSource, class... Types>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const cutlass::epilogue::fusion::ConsumerStoreArgs<Types...>& args) {
    auto zeros = cute::make_tensor_like<float>(own<kSource>(cute::make_smem_ptr<float>(nullptr), args));
    cute::fill(zeros, 0.f);
    return Callbacks<kSource, decltype(zeros), cutlass::epilogue::fusion::ConsumerStoreArgs<Types...>>(zeros, params,
                                                                                                       args);
  }
};

// kStages of the main loop in shared memory, so few that kBlocks fit on a multiprocessor: the epilogue of one block
// runs beside the main loop of another.
template <class T, int kTileM, int kTileN, int kClusterM, int kStages, int kBlocks>
struct ImplicitGemm {
  using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Shape<cute::_64>>;
  using Cluster = cute::Shape<cute::Int<kClusterM>, cute::_1, cute::_1>;
  using Layout = cutlass::layout::TensorNHWC;
  static constexpr int kAligned = 8;  // channels, 16 bytes
  static constexpr auto kOperator = cutlass::conv::Operator::kFprop;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Layout, kAligned, T, Layout, kAligned,
      cutlass::epilogue::TmaWarpSpecialized, PixelSums<Tile>>::CollectiveOp;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kOperator, T, Layout, kAligned, T, Layout, kAligned, float,
      Tile, Cluster, cutlass::conv::collective::StageCount<kStages>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  using Problem = cutlass::conv::ConvProblemShape<kOperator, 2>;
  struct Kernel : cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue> {
    static constexpr uint32_t MinBlocksPerMultiprocessor = kBlocks;
  };
  using Convolution = cutlass::conv::device::ConvUniversalAdapter<Kernel>;

  static typename Kernel::Arguments arguments(const FusedConvolution& p) {
    const auto i = [](int64_t v) { return static_cast<int>(v); };
    const Shape& x = p.input;
    const Window& w = p.window;
    const Problem problem(cutlass::conv::Mode::kCrossCorrelation, {i(x.n), i(x.h), i(x.w), i(x.c)},
                          {i(p.output.c), i(w.kernel_h), i(w.kernel_w), i(x.c)}, {i(w.padding_h), i(w.padding_w)},
                          {i(w.padding_h), i(w.padding_w)}, {i(w.stride_h), i(w.stride_w)},
                          {i(w.dilation_h), i(w.dilation_w)}, 1);
    typename Kernel::StrideD pixels{};
    cute::get<0, 0>(pixels) = problem.stride_C[2];
    cute::get<0, 1>(pixels) = problem.stride_C[1];
    cute::get<0, 2>(pixels) = problem.stride_C[0];
    const typename Epilogue::Arguments epilogue{
        {p.tile_sums, p.tile_squares}, nullptr, pixels, static_cast<T*>(p.z), pixels};
    return {problem, {static_cast<const T*>(p.x), static_cast<const T*>(p.w)}, epilogue};
  }

  static FusedConvolutionPlan plan(const FusedConvolution& p) {
    if (Convolution::can_implement(arguments(p)) != cutlass::Status::kSuccess) return {};
    const int64_t pixels = p.output.n * p.output.h * p.output.w;
    return {true, (pixels + kTileM - 1) / kTileM, kTileM, (p.output.c + kTileN - 1) / kTileN * kTileN};
  }

  static void run(const FusedConvolution& p, Stream stream) {
    const cutlass::Status status = Convolution()(arguments(p), nullptr, static_cast<cudaStream_t>(stream));
    if (status != cutlass::Status::kSuccess) throw std::runtime_error(cutlassGetStatusString(status));
  }
};

template <int kTileM, int kTileN, int kClusterM, int kStages, int kBlocks>
constexpr FusedKernel fused_kernel(const char* name) {
  using BFloat16 = ImplicitGemm<cutlass::bfloat16_t, kTileM, kTileN, kClusterM, kStages, kBlocks>;
  using Float16 = ImplicitGemm<cutlass::half_t, kTileM, kTileN, kClusterM, kStages, kBlocks>;
  return {name,
          [](const FusedConvolution& p) { return p.dtype == DType::kBFloat16 ? BFloat16::plan(p) : Float16::plan(p); },
          [](const FusedConvolution& p, Stream stream) {
            p.dtype == DType::kBFloat16 ? BFloat16::run(p, stream) : Float16::run(p, stream);
          }};
}

}  // namespace layerwise::cuda
