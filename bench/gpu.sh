#!/usr/bin/env bash
# Everything that wants a GPU, in under nine minutes: tests, tiles, measurements. Rows and logs go to OUT.
#
#     OUT=results COMMIT=abc1234 bash bench/gpu.sh [arguments of python -m bench kernels]
#
# A step that fails or runs out of time does not stop the next. Peers are taken from wheels/, where that exists.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
PEERS=$(mktemp -d)
export PYTHONPATH=.:kernels:$PEERS PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what deterministic tests need of cuBLAS
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv,noheader || exit 1

for wheel in wheels/*.whl; do
    [[ -e $wheel ]] && "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$PEERS" "$wheel"
done

step() { # seconds, name, command...
    local seconds=$1 log=$OUT/$2.txt start=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    echo "== status $status after $((SECONDS - start)) s: $*"
    return "$status"
}

step 120 tests_gpu "$PYTHON" -m pytest -q --tb=short -m gpu --continue-on-collection-errors tests
step 40 tests_kernels "$PYTHON" -m pytest -q --tb=short -m "not gpu and not slow" tests/kernels
step 90 tune "$PYTHON" -m bench tune
kernels=("$PYTHON" -m bench kernels --peaked 1 --seconds 0.3 --out "$OUT" "$@")
step $((520 - SECONDS)) kernels "${kernels[@]}"
if (($? != 0 && SECONDS < 460)); then # one that breaks the device takes the others with it: without peers, then
    step $((520 - SECONDS)) kernels_alone "${kernels[@]}" --only "3 products" "4 products" copy eager ours
fi
