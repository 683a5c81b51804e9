#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, a CUDA build of torch and nvcc; nothing is downloaded.
#   bash benchmarks/run_gpu.sh [--only STAGE,STAGE...] [--python PYTHON] [-- ARGUMENT OF bench_gpu.py ...]
# Stages: build, table (the operator tests on the device), graph (streams, capture, CUTLASS), sanitize (compute-sanitizer
# on a small table), bench, and, asked for by name, autotune (bench once more, with the autotuner's choices; for builds
# with CUTLASS), local and chain (whole networks: bench_local.py, bench_chain.py).  Each has a time limit; together they take less than 9 minutes where compilation is not slow, and --only
# cuts them into several calls.  The exit status says whether one failed.  JSON goes to $OUT, or to benchmarks/results.
# LAYERWISE_CUTLASS=ON insists on CUTLASS.
set -uo pipefail
cd "$(dirname "$0")/.."
stages=build,table,graph,sanitize,bench
python=python3
while [ $# -gt 0 ]; do
  case $1 in
    --only) stages=$2 && shift 2 ;;
    --python) python=$2 && shift 2 ;;
    --) shift && break ;;
    *) echo "run_gpu.sh: unknown argument $1" >&2 && exit 2 ;;
  esac
done
export PATH="$(dirname "$(command -v "$python")"):$PATH" # cmake and ninja beside the interpreter
results=${OUT:-benchmarks/results}
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
    -DCMAKE_CUDA_ARCHITECTURES="$architecture-real" -DLAYERWISE_CUTLASS="${LAYERWISE_CUTLASS:-AUTO}"
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

if wants build; then stage build 200 bash -c build; fi
# An editable installation of the package would come before this build.
"$python" -c "
import os, layerwise_ext as lw
from layerwise_ext._ops import _C
assert lw.__file__.startswith(os.environ['folder']), lw.__file__ + ' is not the build of this script'
assert not _C.build_info()['CUDA kernels'].startswith('not in'), _C.build_info()" || exit 1
"$python" -m layerwise_ext info

if wants table; then
  test table 150 --backend=cuda -n 8 tests/test_cuda_kernels.py tests/test_bn_act_moments.py tests/test_extended.py \
    tests/test_conv_bn_act.py tests/test_head.py tests/test_autograd.py tests/test_nn.py tests/test_stage.py
fi
if wants graph; then test graph 120 tests/test_cuda_device.py; fi
if wants sanitize; then
  # initcheck sees all kernels, or it would miss what torch's own have written.
  for tool in "memcheck --kernel-name kns=layerwise" "racecheck --kernel-name kns=layerwise" initcheck; do
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "compute-sanitizer $tool" 90 compute-sanitizer --tool $tool \
      --report-api-errors no --error-exitcode 1 "$python" -m pytest -p no:cacheprovider -q --backend=cuda \
      tests/test_cuda_kernels.py -k "test_shapes and bfloat16"
  done
fi
bench() { stage "$1" 330 "$python" benchmarks/bench_gpu.py --output "$results/$2.json" "${@:3}"; }
if wants bench; then bench bench bench_stage-gpu "$@"; fi
if wants autotune; then bench autotune bench_stage-gpu-autotuned --autotune --no-max-autotune "$@"; fi
if wants local; then
  stage local 300 "$python" benchmarks/bench_local.py --device cuda --output "$results/bench_local-cuda.json"
fi
if wants chain; then
  stage chain 500 "$python" benchmarks/bench_chain.py --device cuda --output "$results/bench_chain-cuda.json"
fi
echo "== done ($(date +%T)); failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
