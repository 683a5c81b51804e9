// The passes in their extended form (params.h, Extension): any activation, a residual, and y pooled from windows.
#pragma once

#include "sums.h"

namespace layerwise::cuda {

void extended_apply(const Apply& p, Stream stream);

Cut extended_cut(const DenseMap& p);  // of the elements of y
void extended_sums(const DenseMap& p, const Norm& norm, const Partial& partial, const Cut& cut, Stream stream);

void extended_gradient(const InputGradient& p, Stream stream);

}  // namespace layerwise::cuda
