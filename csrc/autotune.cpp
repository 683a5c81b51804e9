#include "autotune.h"

#include <algorithm>
#include <utility>

namespace layerwise {

bool Autotuner::enabled() const {
  const std::lock_guard lock(mutex_);
  return enabled_;
}

void Autotuner::set_enabled(bool enabled) {
  const std::lock_guard lock(mutex_);
  enabled_ = enabled;
}

std::map<std::string, std::string> Autotuner::choices() const {
  const std::lock_guard lock(mutex_);
  return choices_;
}

void Autotuner::set_choices(std::map<std::string, std::string> choices) {
  const std::lock_guard lock(mutex_);
  choices_ = std::move(choices);
}

std::optional<size_t> Autotuner::remembered(const std::string& what, const std::vector<std::string>& ways) const {
  const std::lock_guard lock(mutex_);
  const auto choice = choices_.find(what);
  if (choice == choices_.end()) return {};
  const auto way = std::find(ways.begin(), ways.end(), choice->second);
  if (way == ways.end()) return {};  // of another build
  return way - ways.begin();
}

size_t Autotuner::measure(const std::string& what, const std::vector<std::string>& ways,
                          const std::function<double(size_t way)>& seconds) {
  size_t best = 0;
  double least = seconds(0);
  for (size_t way = 1; way < ways.size(); ++way) {
    const double time = seconds(way);
    if (time < least) {
      least = time;
      best = way;
    }
  }
  const std::lock_guard lock(mutex_);
  choices_[what] = ways[best];
  return best;
}

Autotuner& autotuner() {
  static Autotuner instance;
  return instance;
}

}  // namespace layerwise
