// Build information and kernel switches.  The operators register themselves when this library is loaded (*_ops.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "autotune.h"
#include "build_info.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/passes.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace layerwise;
  cpu::capability();  // chooses now, so that a wrong LAYERWISE_CPU_CAPABILITY fails the import
  m.def("build_info", [] {
    py::dict info;
    info["version"] = kVersion;
    info["torch at build"] = kTorchVersion;
    info["torch needed"] = std::string(">= ") + kTorchMinimum;
    info["compiler"] = kCompiler;
    info["build type"] = kBuildType;
    info["flags"] = kFlags;
    info["CPU kernels"] = kCapabilities;
    info["CUDA kernels"] = kCuda;
    info["CUTLASS"] = kCutlass;
    info["sanitizers"] = kSanitize;
    return info;
  });
  m.def("autotune_enabled", [] { return autotuner().enabled(); });
  m.def("set_autotune_enabled", [](bool enabled) { autotuner().set_enabled(enabled); });
  m.def("autotune_choices", [] { return autotuner().choices(); });
  m.def("set_autotune_choices",
        [](const std::map<std::string, std::string>& choices) { autotuner().set_choices(choices); });
  m.def("cpu_capabilities", &cpu::available_capabilities);
  m.def("cpu_capability", &cpu::capability);
  m.def("set_cpu_capability", &cpu::set_capability, py::arg("name"));
  m.def("cache_limit", &cpu::cache_limit);
  m.def("set_cache_limit", &cpu::set_cache_limit, py::arg("bytes"));
  m.def("cached_bytes", &cpu::cached_bytes);
  m.def("empty_cache", &cpu::empty_cache);
  m.def("make_room", &cpu::make_room, py::arg("bytes"));
  const auto def_has = [&](const char* name, auto has) {  // 3x3 convolutions that keep the size
    m.def(
        name,
        [has](int64_t n, int64_t channels, int64_t height, int64_t width, int64_t inputs, bool bfloat16) {
          const DType dtype = bfloat16 ? DType::kBFloat16 : DType::kFloat32;
          const Map z{{n, channels, height, width}, Layout::kChannelsLast, dtype};
          const Shape x{n, inputs, height, width};
          return has(z, x, {height * width * inputs, 1, width * inputs, inputs}, {3, 3, 1, 1, 1, 1, 1, 1});
        },
        py::arg("n"), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("inputs"), py::kw_only(),
        py::arg("bfloat16"));
  };
  def_has("has_convolution", &cpu::has_convolution);
  def_has("has_weight_gradient", &cpu::has_weight_gradient);
}
