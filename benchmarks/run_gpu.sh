#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, a CUDA build of torch and nvcc; nothing is downloaded.
#   bash benchmarks/run_gpu.sh [--only STAGE,STAGE...] [--python PYTHON]
# Stages: build, table (the operator tests on the device), sanitize (compute-sanitizer on a small table), graph (capture),
# bench.  Ends with the first stage that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
stages=build,table,sanitize,graph,bench
python=python3
while [ $# -gt 0 ]; do
  case $1 in
    --only) stages=$2 && shift 2 ;;
    --python) python=$2 && shift 2 ;;
    *) echo "run_gpu.sh: unknown argument $1" >&2 && exit 2 ;;
  esac
done
wants() { [[ ",$stages," == *",$1,"* ]]; }
begin() { echo "== $1 ($(date +%T))"; }

# The build has a folder of its own; only the device's architecture is compiled.
folder=build/gpu
if wants build; then
  begin build
  architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  if [ "$architecture" = 90 ]; then architecture=90a; fi
  cmake -S . -B $folder/cmake -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DLAYERWISE_CUDA=ON \
    -DLAYERWISE_STRICT=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture-real"
  cmake --build $folder/cmake
  rm -rf $folder/package
  mkdir -p $folder/package
  cp -r python/layerwise_ext $folder/package/
  cp $folder/cmake/_C.*.so $folder/package/layerwise_ext/
fi
export PYTHONPATH="$PWD/$folder/package${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m layerwise_ext info

tests=(tests/test_cuda_kernels.py tests/test_bn_act_moments.py tests/test_conv_bn_act.py tests/test_autograd.py
  tests/test_nn.py tests/test_stage.py)
if wants table; then
  begin table
  "$python" -m pytest -p no:cacheprovider -q --backend=cuda -n 8 "${tests[@]}"
fi
if wants sanitize; then
  for tool in memcheck racecheck initcheck; do
    begin "compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 --kernel-name regex:layerwise \
      "$python" -m pytest -p no:cacheprovider -q --backend=cuda tests/test_cuda_kernels.py -k "test_shapes and bfloat16"
  done
fi
if wants graph; then
  begin graph
  "$python" -m pytest -p no:cacheprovider -q tests/test_cuda_device.py
fi
if wants bench; then
  begin bench
  "$python" benchmarks/bench_gpu.py
fi
begin "done"
