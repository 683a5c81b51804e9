// Times work on a stream, for the choice between kernels.  Nothing of CUDA in this header.
#pragma once

#include <functional>
#include <string>

#include "kernels.h"

namespace layerwise::cuda {

// Seconds of one run(), which launches on the stream: the least of several, after one that does not count.  Waits for the
// device.
double seconds_of(const std::function<void()>& run, Stream stream);
bool is_capturing(Stream stream);  // into a graph: nothing may wait then
std::string device_name();         // of the current device

}  // namespace layerwise::cuda
