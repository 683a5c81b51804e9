// Products of matrices as ATen has them, reached through the dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>

#include "maps.h"

namespace layerwise {

// out = a b.  Autocast, which would round the operands, leaves products with a given output alone.
inline void product_into(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Memory that is there, as a matrix; it must outlive the result.
inline Tensor matrix_of(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const Ints size{rows, columns}, strides{row_stride, column_stride};
  return torch::stable::from_blob(const_cast<void*>(t.const_data_ptr()), size, strides, t.device(), t.scalar_type());
}

}  // namespace layerwise
