#!/usr/bin/env bash
# Runs the tests and benchmarks that need a GPU, in parts of less than nine minutes. Needs no network.
# Rows and logs go to the folder OUT.
#
#     OUT=results COMMIT=abc1234 bash bench/gpu.sh PART [arguments of the part's commands]
#
#     test  tune  kernels
#     train_600m  train_1b        SFT, DPO and a reward model compared with TRL, at Qwen3-0.6B and at Llama-3.2-1B
#     on_policy_1b  on_policy_3b  an update of DR-PO compared with the padded reference and TRL's PPO, at Pythia-1B and
#                                 -2.8B; on_policy_1b also runs the benchmarks trunks and rollout
#
# Other libraries are installed from wheels/, TRL 1.12 (PPO) is read from the folder TRL_112, dialogues from
# FASTRLHF_DATA. Steps whose libraries or data are missing are skipped with a message. DEVICE=cpu runs all steps with
# tiny models, to test this script; the measured times mean nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PARTS='test, tune, kernels, train_600m, train_1b, on_policy_1b or on_policy_3b'
PART=${1:?$PARTS}
shift
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
PEERS=$(mktemp -d)
export PYTHONPATH=.:kernels:$PEERS:${PYTHONPATH:-} PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # makes cuBLAS deterministic, for tests that need it
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
bench() { # seconds, name, arguments of python -m bench; a failure does not stop later steps
    local seconds=$1 name=$2
    shift 2
    step "$seconds" "$name" "$PYTHON" -m bench "$@" --device "$DEVICE" --out "$OUT"
}

case $PART in
test)
    step 300 tests_gpu "$PYTHON" -m pytest -q --tb=short -m gpu --continue-on-collection-errors tests "$@"
    (($? == 5)) && FAILED=0 # status 5 is pytest's "no tests ran": there is no GPU
    [[ $DEVICE == cuda ]] && step 200 tests_kernels "$PYTHON" -m pytest -q --tb=short -m "not gpu and not slow" tests/kernels
    ;;
tune)
    if [[ $DEVICE == cuda ]]; then
        step 520 tune "$PYTHON" -m bench tune "$@"
    else
        step 520 aot "$PYTHON" -m bench aot --arch 90 --check # a CPU can only check that the kernels compile
    fi
    ;;
kernels)
    shapes=(--peaked 1 --seconds 0.3)
    [[ $DEVICE == cpu ]] && shapes=(--shape 64 32 100 --runs 2)
    bench 400 kernels kernels "${shapes[@]}" "$@"
    if (($? != 0 && SECONDS < 420)) && [[ $DEVICE == cuda ]]; then
        # An implementation that breaks the GPU makes all later ones fail, so try again without other libraries.
        bench 110 kernels_alone kernels "${shapes[@]}" "$@" --only "3 products" "4 products" copy eager ours
    fi
    ;;
train_600m | train_1b)
    # Estimated times on an H100, not measured. Per trainer: 40 s to start and to make the weights, then 6 to 8 variants,
    # each with 5 to 10 s to load and 7 steps of 10,000 to 20,000 tokens (.5 s per step; TRL with padding: 1 to 2 s).
    # In total 100 to 170 s.
    model=(--model qwen3-0.6b)
    [[ $PART == train_1b ]] && model=(--model llama-3.2-1b)
    size=(--steps 6 --batch-sizes 8 16)
    [[ $DEVICE == cpu ]] && model=(--model tiny) size=(--steps 1 --rows 4 --batch-sizes 2)
    if [[ -n ${FASTRLHF_DATA:-} ]] && "$PYTHON" -c "import trl" 2>/dev/null; then
        for trainer in sft dpo reward; do
            bench 175 "$PART.$trainer" train "$trainer" "${model[@]}" "${size[@]}" "$@"
        done
    else
        echo "== $PART is skipped: it needs trl and FASTRLHF_DATA"
        FAILED=1
    fi
    ;;
on_policy_1b | on_policy_3b)
    # Estimated times on an H100, not measured. Per process: 10 s to start, 20 s (1B) or 40 s (2.8B) to make two models on
    # the CPU, 15 s or 40 s for a warm-up and an update. Three implementations run, at 1B twice.
    size=(--shape pythia-1b --episodes 64 --rounds 2) seconds=300
    if [[ $PART == on_policy_3b ]]; then
        # Four models and two gradients take 33 GB; float32 AdamW with its copies would add 67 GB. Our trainer and the
        # padded reference therefore use 8-bit moments and stochastic rounding (13 GB); TRL uses bfloat16 moments (22 GB).
        size=(--shape pythia-2.8b --episodes 64 --rounds 1 --optim adamw_8bit --master-weights stochastic_rounding)
        seconds=500
    fi
    trunks=(--episodes 128) rollout=(--episodes 512 --slots 64)
    if [[ $DEVICE == cpu ]]; then
        size=(--shape tiny --episodes 4 --rounds 1)
        [[ $PART == on_policy_3b ]] && size+=(--optim adamw_8bit) # weights are float32 here, so there is nothing to round
        trunks=(--episodes 4 --rounds 1 --groups 4) rollout=(--episodes 4 --slots 4 --rounds 1 --groups 4)
    fi
    [[ -n ${TRL_112:-} ]] && size+=(--trl-path "$TRL_112")
    if [[ $PART == on_policy_1b ]]; then
        bench "$seconds" "$PART" train drpo "${size[@]}" "$@"
        bench 60 trunks trunks "${trunks[@]}"
        bench 60 rollout rollout "${rollout[@]}"
    elif "$PYTHON" -c "import bitsandbytes" 2>/dev/null; then
        bench "$seconds" "$PART" train drpo "${size[@]}" "$@"
    else
        echo "== $PART is skipped: it needs bitsandbytes"
        FAILED=1
    fi
    ;;
*)
    echo "gpu.sh: unknown part $PART; choose $PARTS" >&2
    exit 2
    ;;
esac
exit $FAILED
