// Which of several ways to compute something was measured to be the fastest, per shape.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace layerwise {

class Autotuner {
 public:
  bool enabled() const;
  void set_enabled(bool enabled);

  // By name, so that they outlive the process and the build: what (a shape on a device) -> way.
  std::map<std::string, std::string> choices() const;
  void set_choices(std::map<std::string, std::string> choices);

  // The way that is remembered for `what`, as its place among `ways`.
  std::optional<size_t> remembered(const std::string& what, const std::vector<std::string>& ways) const;
  // Measures each way once and remembers the fastest.  An error of any of them is the caller's: nothing is remembered.
  size_t measure(const std::string& what, const std::vector<std::string>& ways,
                 const std::function<double(size_t way)>& seconds);

 private:
  mutable std::mutex mutex_;
  bool enabled_ = false;
  std::map<std::string, std::string> choices_;
};

Autotuner& autotuner();  // off, until somebody turns it on

}  // namespace layerwise
