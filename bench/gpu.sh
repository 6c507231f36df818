#!/usr/bin/env bash
# What wants a GPU, in parts of less than nine minutes, without a network. Rows and logs go to OUT.
#
#     OUT=results COMMIT=abc1234 bash bench/gpu.sh test | tune | kernels | train [arguments of the part's command]
#
# Peers come from wheels/, TRL 1.12 (PPO) from the folder TRL_112, dialogues from FASTRLHF_DATA; what is missing is left
# out and said. DEVICE=cpu runs the same steps at tiny shapes: a rehearsal, no measurement.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PART=${1:?test, tune, kernels or train}
shift
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
PEERS=$(mktemp -d)
export PYTHONPATH=.:kernels:$PEERS:${PYTHONPATH:-} PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what deterministic tests need of cuBLAS
mkdir -p "$OUT"
if [[ $DEVICE == cuda ]]; then
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv,noheader || exit 1
fi

for wheel in wheels/*.whl; do
    [[ -e $wheel ]] && "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$PEERS" "$wheel"
done

FAILED=0
step() { # seconds, name, command...
    local seconds=$1 log=$OUT/$2.txt start=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    echo "== status $status after $((SECONDS - start)) s: $*"
    ((status == 0)) || FAILED=1
    return "$status"
}
bench() { # seconds, name, arguments of python -m bench: one that fails does not stop the next
    local seconds=$1 name=$2
    shift 2
    step "$seconds" "$name" "$PYTHON" -m bench "$@" --device "$DEVICE" --out "$OUT"
}

case $PART in
test)
    step 300 tests_gpu "$PYTHON" -m pytest -q --tb=short -m gpu --continue-on-collection-errors tests "$@"
    (($? == 5)) && FAILED=0 # pytest's "no test was run": there is no GPU
    [[ $DEVICE == cuda ]] && step 200 tests_kernels "$PYTHON" -m pytest -q --tb=short -m "not gpu and not slow" tests/kernels
    ;;
tune)
    if [[ $DEVICE == cuda ]]; then
        step 520 tune "$PYTHON" -m bench tune "$@"
    else
        step 520 aot "$PYTHON" -m bench aot --arch 90 --check # tiles that can be compiled are all a CPU can tell
    fi
    ;;
kernels)
    shapes=(--peaked 1 --seconds 0.3)
    [[ $DEVICE == cpu ]] && shapes=(--shape 64 32 100 --runs 2)
    bench 400 kernels kernels "${shapes[@]}" "$@"
    if (($? != 0 && SECONDS < 420)) && [[ $DEVICE == cuda ]]; then
        # One that breaks the device takes the others with it: without peers, then.
        bench 110 kernels_alone kernels "${shapes[@]}" "$@" --only "3 products" "4 products" copy eager ours
    fi
    ;;
train)
    dpo=(--model qwen3-0.6b --steps 6) drpo=(--shape pythia-1b --episodes 64 --rounds 2)
    trunks=(--episodes 128) rollout=(--episodes 512 --slots 64)
    if [[ $DEVICE == cpu ]]; then
        dpo=(--model tiny --steps 1 --batch-sizes 1) drpo=(--shape tiny --episodes 4 --rounds 1)
        trunks=(--episodes 8 --rounds 1 --groups 4) rollout=(--episodes 4 --slots 4 --rounds 1 --groups 4)
    fi
    if [[ -n ${FASTRLHF_DATA:-} ]] && "$PYTHON" -c "import trl" 2>/dev/null; then
        bench 240 train_dpo train dpo "${dpo[@]}"
    else
        echo "== train dpo is left out: it needs trl and FASTRLHF_DATA"
    fi
    [[ -n ${TRL_112:-} ]] && drpo+=(--trl-path "$TRL_112")
    bench 200 train_drpo train drpo "${drpo[@]}" "$@"
    bench 60 trunks trunks "${trunks[@]}"
    bench 60 rollout rollout "${rollout[@]}"
    ;;
*)
    echo "gpu.sh: no part $PART; test, tune, kernels or train" >&2
    exit 2
    ;;
esac
exit $FAILED
