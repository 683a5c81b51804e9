#!/usr/bin/env bash
# All CPU benchmarks one after another, then the README's table and plots.  Leave the machine alone: about an hour and a
# half.  Arguments go to every benchmark (--quick: minutes, and says nothing about speed).
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
for benchmark in bench_stage bench_local bench_chain bench_model roofline; do
  "$python" "$benchmark.py" "$@"
done
"$python" readme_table.py
"$python" plots.py
