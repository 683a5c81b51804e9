#!/usr/bin/env bash
# The operator tables on builds with AddressSanitizer and UndefinedBehaviorSanitizer: the CPU kernels, and the CUDA
# kernels on the host.
#   tests/sanitize.sh [PYTHON] [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true
cxx=${CXX:-g++}
export PATH="$(dirname "$(command -v "$python")"):$PATH" # cmake and ninja beside the interpreter

mkdir -p build/sanitize
build() { # FOLDER SOURCE [CMAKE ARGUMENT ...]
  cmake -S "$2" -B "build/sanitize/$1" -G Ninja -DCMAKE_CXX_COMPILER="$cxx" \
    -DPython_EXECUTABLE="$(command -v "$python")" -DLAYERWISE_SANITIZE=ON "${@:3}" &&
    cmake --build "build/sanitize/$1"
}
build simt tests/simt & # both at once, since the kernels of one instruction set are one file
build cmake . -DLAYERWISE_CUDA=OFF || { wait $!; exit 1; }
wait $!
rm -rf build/sanitize/package
mkdir -p build/sanitize/package
cp -r python/layerwise_ext build/sanitize/package/
cp build/sanitize/cmake/_C.*.so build/sanitize/package/layerwise_ext/

# -S keeps an editable installation of the package out of the way. libstdc++ is loaded early because the sanitizer
# intercepts its exceptions. Python itself does not free everything at exit.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH="$PWD/build/sanitize/package:$site" OMP_NUM_THREADS=1
export LD_PRELOAD="$("$cxx" -print-file-name=libasan.so):$("$cxx" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" -S -c 'from layerwise_ext._ops import _C; assert _C.build_info()["sanitizers"] == "ON", _C.__file__'
export LAYERWISE_SIMT_BUILD="$PWD/build/sanitize/simt" # the CUDA kernels on the host
export LAYERWISE_SANITIZED=1 # conftest.py then insists on this build
pytest() { "$python" -S -m pytest -p no:cacheprovider -q "$@"; }
if [ $# -gt 0 ]; then
  pytest "$@"
else
  # Workers need the -S as well.
  parallel=(--dist load --tx "${WORKERS:-2}*popen//python=$python -S")
  pytest "${parallel[@]}" tests/test_bn_act_moments.py tests/test_extended.py tests/test_conv_bn_act.py tests/test_head.py \
    tests/test_winograd.py tests/test_dot_convolution.py tests/test_direct_convolution.py tests/test_simt.py
  pytest "${parallel[@]}" --backend=simt tests/test_cuda_kernels.py tests/test_bn_act_moments.py tests/test_extended.py \
    tests/test_conv_bn_act.py tests/test_head.py tests/test_autotune.py
fi
