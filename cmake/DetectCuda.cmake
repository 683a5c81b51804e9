# Whether CUDA kernels go into the build, and why not.  This version has none yet: the toolkit is looked for so that
# `layerwise-ext info` can say what stands in the way, and LAYERWISE_CUDA=ON fails rather than build something else.

if(NOT LAYERWISE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LAYERWISE_CUDA must be AUTO, ON or OFF, got '${LAYERWISE_CUDA}'")
endif()

if(LAYERWISE_CUDA STREQUAL "OFF")
  set(LAYERWISE_CUDA_STATUS "not built: LAYERWISE_CUDA=OFF")
else()
  find_program(LAYERWISE_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT LAYERWISE_NVCC)
    set(LAYERWISE_CUDA_STATUS "not built: nvcc was not found")
    set(remedy "Put the CUDA toolkit's bin folder on PATH, set CUDACXX to nvcc, or build with LAYERWISE_CUDA=OFF")
  else()
    # nvcc checks its host compiler only when it compiles.
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/probe.cu "int main() { return 0; }\n")
    set(host_compiler ${CMAKE_CXX_COMPILER})
    if(DEFINED ENV{CUDAHOSTCXX})
      set(host_compiler $ENV{CUDAHOSTCXX})
    endif()
    execute_process(COMMAND ${LAYERWISE_NVCC} -ccbin ${host_compiler} -c probe.cu -o probe.o
                    WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR} RESULT_VARIABLE failed
                    OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(failed)
      set(LAYERWISE_CUDA_STATUS "not built: ${LAYERWISE_NVCC} does not accept the host compiler ${host_compiler}")
      set(remedy "Name one that it accepts in the environment variable CUDAHOSTCXX, or build with LAYERWISE_CUDA=OFF")
    else()
      set(LAYERWISE_CUDA_STATUS "not built: this version has CPU kernels only")
      set(remedy "Build with LAYERWISE_CUDA=OFF or AUTO")
    endif()
  endif()
  if(LAYERWISE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "LAYERWISE_CUDA=ON, but CUDA kernels are ${LAYERWISE_CUDA_STATUS}. ${remedy}.")
  endif()
endif()
message(STATUS "CUDA kernels: ${LAYERWISE_CUDA_STATUS}")
