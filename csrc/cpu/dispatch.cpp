#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace layerwise::cpu {
namespace {

struct Capability {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

// Best first.
const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> all = [] {
    std::vector<Capability> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(LAYERWISE_HAVE_AVX512_BF16)
    list.push_back({"avx512_bf16", &avx512_bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
#if defined(LAYERWISE_HAVE_AVX512)
    list.push_back({"avx512", &avx512::kernels, avx512});
#endif
#if defined(LAYERWISE_HAVE_AVX2)
    list.push_back({"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#endif
    list.push_back({"portable", &portable::kernels, true});
    return list;
  }();
  return all;
}

const Capability& find(const std::string& name) {
  std::string allowed;
  for (const Capability& c : capabilities()) {
    if (!c.supported) continue;
    if (c.name == name) return c;
    allowed += (allowed.empty() ? "" : ", ") + std::string(c.name);
  }
  throw std::invalid_argument("CPU capability '" + name +
                              "' is not available; this build and machine have: " + allowed);
}

const Capability& best() {
  if (const char* name = std::getenv("LAYERWISE_CPU_CAPABILITY")) return find(name);
  for (const Capability& c : capabilities())
    if (c.supported) return c;
  throw std::logic_error("no CPU kernels were compiled");
}

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> chosen{&best()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed)->kernels; }

std::vector<std::string> available_capabilities() {
  std::vector<std::string> names;
  for (const Capability& c : capabilities())
    if (c.supported) names.emplace_back(c.name);
  return names;
}

std::string capability() { return current().load()->name; }

void set_capability(const std::string& name) { current().store(&find(name)); }

}  // namespace layerwise::cpu
