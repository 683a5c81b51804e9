#include <string>
#include <vector>

#include "platform.h"
#include "timer.h"

#if defined(LAYERWISE_SIMT)
#include <chrono>
#endif

namespace layerwise::cuda {

#if defined(LAYERWISE_SIMT)

double seconds_of(const std::function<void()>& run, Stream) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
bool is_capturing(Stream) { return false; }
std::string device_name() { return "simulator"; }

#else

namespace {

constexpr int kRounds = 5, kRunsOfRound = 4;  // several at a time: an event takes microseconds of its own

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

class Event {
 public:
  Event() { check(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream)); }
  double seconds_until(const Event& end) const {
    float milliseconds = 0;
    check(cudaEventSynchronize(end.event_));
    check(cudaEventElapsedTime(&milliseconds, event_, end.event_));
    return milliseconds / 1e3;
  }

 private:
  cudaEvent_t event_;
};

}  // namespace

double seconds_of(const std::function<void()>& run, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  run();
  double least = INFINITY;
  for (int round = 0; round < kRounds; ++round) {
    Event begin, end;
    begin.record(on);
    for (int i = 0; i < kRunsOfRound; ++i) run();
    end.record(on);
    const double seconds = begin.seconds_until(end) / kRunsOfRound;
    least = seconds < least ? seconds : least;
  }
  return least;
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

std::string device_name() {
  int device = 0;
  check(cudaGetDevice(&device));
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device));
  return properties.name;
}

#endif

}  // namespace layerwise::cuda
