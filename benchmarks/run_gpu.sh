#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, a CUDA build of torch and nvcc; nothing is downloaded.
#   bash benchmarks/run_gpu.sh [--only STAGE,STAGE...] [--python PYTHON] [-- ARGUMENT OF bench_gpu.py ...]
# Stages: build, table (the operator tests on the device), sanitize (compute-sanitizer on a small table), graph (streams,
# capture, CUTLASS), bench, and, asked for by name, autotune (bench once more, with the autotuner's choices; for builds
# with CUTLASS).  Each stage runs within its time; the exit status says whether one failed.
set -uo pipefail
cd "$(dirname "$0")/.."
stages=build,table,sanitize,graph,bench
python=python3
while [ $# -gt 0 ]; do
  case $1 in
    --only) stages=$2 && shift 2 ;;
    --python) python=$2 && shift 2 ;;
    --) shift && break ;;
    *) echo "run_gpu.sh: unknown argument $1" >&2 && exit 2 ;;
  esac
done
folder=$PWD/build/gpu # of its own; only the device's architecture is compiled
failed=()
# stage NAME SECONDS COMMAND ...
stage() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name ($(date +%T))"
  timeout "$seconds" "$@" || { echo "== $name failed ($?)" && failed+=("$name"); }
}
wants() { [[ ",$stages," == *",$1,"* ]]; }

build() {
  set -e
  architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  if [ "$architecture" = 90 ]; then architecture=90a; fi
  cmake -S . -B "$folder/cmake" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DLAYERWISE_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$architecture-real"
  cmake --build "$folder/cmake"
  rm -rf "$folder/package"
  mkdir -p "$folder/package"
  cp -r python/layerwise_ext "$folder/package/"
  cp "$folder"/cmake/_C.*.so "$folder/package/layerwise_ext/"
}
export python folder
export -f build
export PYTHONPATH="$folder/package${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=2
test() { stage "$1" "$2" "$python" -m pytest -p no:cacheprovider -q "${@:3}"; }

if wants build; then stage build 240 bash -c build; fi
# An editable installation of the package would come before this build.
"$python" -c "
import os, layerwise_ext as lw
from layerwise_ext._ops import _C
assert lw.__file__.startswith(os.environ['folder']), lw.__file__ + ' is not the build of this script'
assert not _C.build_info()['CUDA kernels'].startswith('not in'), _C.build_info()" || exit 1
"$python" -m layerwise_ext info

if wants table; then
  test table 240 --backend=cuda -n 8 tests/test_cuda_kernels.py tests/test_bn_act_moments.py tests/test_conv_bn_act.py \
    tests/test_head.py tests/test_autograd.py tests/test_nn.py tests/test_stage.py
fi
if wants graph; then test graph 120 tests/test_cuda_device.py; fi
if wants bench; then stage bench 420 "$python" benchmarks/bench_gpu.py "$@"; fi
if wants autotune; then
  stage autotune 300 "$python" benchmarks/bench_gpu.py --autotune --no-max-autotune \
    --output benchmarks/results/bench_stage-gpu-autotuned.json "$@"
fi
if wants sanitize; then
  # initcheck sees all kernels, or it would miss what torch's own have written.
  for tool in "memcheck --kernel-name kns=layerwise" "racecheck --kernel-name kns=layerwise" initcheck; do
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "compute-sanitizer $tool" 120 compute-sanitizer --tool $tool \
      --report-api-errors no --error-exitcode 1 "$python" -m pytest -p no:cacheprovider -q --backend=cuda \
      tests/test_cuda_kernels.py -k "test_shapes and bfloat16"
  done
fi
echo "== done ($(date +%T)); failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
