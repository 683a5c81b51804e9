// Choice of the instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace layerwise::cpu {

// The kernels in use: the best that this machine runs, unless LAYERWISE_CPU_CAPABILITY or set_capability says otherwise.
const Kernels& kernels();

// Names of what was compiled and this machine can run, best first: avx512_bf16, avx512, avx2, portable.
std::vector<std::string> available_capabilities();
std::string capability();
// Throws std::invalid_argument for a name that is not available.
void set_capability(const std::string& name);

}  // namespace layerwise::cpu
