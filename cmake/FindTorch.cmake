# Python and torch's headers and library, asked of the interpreter.  torch's own CMake package is not used: it insists on
# the CUDA toolkit, architecture lists and nvrtc, none of which the stable ABI needs.

set(LAYERWISE_TORCH_MINIMUM 2.11)
set(LAYERWISE_TORCH_TARGET 0x020b000000000000)  # the same, as TORCH_TARGET_VERSION

find_package(Python COMPONENTS Interpreter Development.Module QUIET)
if(NOT Python_Interpreter_FOUND)
  message(FATAL_ERROR "No Python interpreter was found. Name one: -DPython_EXECUTABLE=/path/to/python3")
elseif(NOT Python_Development.Module_FOUND)
  message(FATAL_ERROR "Python's C headers were not found for ${Python_EXECUTABLE}. Install them (Debian and Ubuntu: "
                      "apt install python3-dev; Fedora: dnf install python3-devel) and build again.")
endif()

# find_spec does not import torch, which takes seconds.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(torch_dir STREQUAL "")
  message(FATAL_ERROR
    "torch was not found by ${Python_EXECUTABLE}: either it is not installed there, or pip is building in isolation from "
    "it. layerwise_ext is built against the torch that will run it. Install torch >= ${LAYERWISE_TORCH_MINIMUM}, then "
    "build without isolation: pip install --no-build-isolation .")
endif()
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import runpy, sys; print(runpy.run_path(sys.argv[1])['__version__'])"
          ${torch_dir}/version.py
  OUTPUT_VARIABLE TORCH_VERSION OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_release "${TORCH_VERSION}")
if(torch_release VERSION_LESS LAYERWISE_TORCH_MINIMUM)
  message(FATAL_ERROR "torch ${TORCH_VERSION} is too old: layerwise_ext needs torch >= ${LAYERWISE_TORCH_MINIMUM}. "
                      "Upgrade it with: pip install 'torch>=${LAYERWISE_TORCH_MINIMUM}'")
endif()

set(TORCH_INCLUDE_DIR ${torch_dir}/include)
set(TORCH_LIBRARY ${torch_dir}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX})
foreach(path IN LISTS TORCH_INCLUDE_DIR TORCH_LIBRARY)
  if(NOT EXISTS ${path})
    message(FATAL_ERROR "${path} is missing: the torch installation in ${torch_dir} is incomplete. Install it again.")
  endif()
endforeach()
message(STATUS "torch ${TORCH_VERSION} in ${torch_dir}")
