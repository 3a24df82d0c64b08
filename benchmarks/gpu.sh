#!/bin/bash
# All that is worth doing on one card in eight minutes, the most telling first, each step with its own limit:
#   benchmarks/gpu.sh OUT [--data DIR]
#   DEVICE=cpu benchmarks/gpu.sh OUT     # a little of every step on the CPU: does the script itself work?
# OUT takes a log of every step and the JSON files, which name the card; DIR is CIFAR-10's, for the protocol in what is
# left of the time. Exits 1 where a step failed; a step that ran out of time is not a failure of the others.
set -u
OUT=${1:?"where to: benchmarks/gpu.sh OUT [--data DIR]"}
DATA=${3:-}
PYTHON=${PYTHON:-python}
LIMIT=${LIMIT:-480}
DEVICE=${DEVICE:-cuda}
DATA=${DATA:+$(realpath "$DATA")}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && cd "$(dirname "$0")/.." || exit 1
[ -z "$DATA" ] || [ -d "$DATA" ] || { echo "no folder $DATA"; exit 1; }
export PYTHONPATH=. STRUCTKD_DEVICE=$DEVICE
rows=1000000 jobs=$(($(nproc) < 8 ? $(nproc) : 8)) few_tests=() few_rows=() check=--check
if [ "$DEVICE" = cuda ]; then
    "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' 2>/dev/null ||
        { echo "torch finds no CUDA device here"; exit 1; }
else
    rows=10000 jobs=1 few_tests=(-k "dkd-accelerator or shares or nested") few_rows=(--quick --only KDLoss FitNet)
    check=--quick # a little on a shared core says nothing of speed
fi
failed=0

step() { # name, most seconds, command ...
    local name=$1 most=$2 left=$((LIMIT - SECONDS)) code
    shift 2
    [ "$DEVICE" = cuda ] || most=$LIMIT
    ((left > 5)) || { echo "$name: no time left"; return; }
    timeout "$((most < left ? most : left))" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$name: $( ((code == 124)) && echo "ran out of its time" || echo "exit $code"), $SECONDS s so far"
    ((code == 0 || code == 124)) || { failed=1; tail -15 "$OUT/$name.log"; }
}

tests() { # name, most seconds, files ...: what has the mark gpu, as many at once as there are cores
    local name=$1 most=$2
    shift 2
    step "$name" "$most" "$PYTHON" -m pytest -q -m gpu -n "$jobs" --dist worksteal "${few_tests[@]}" "$@"
}

measure() { # name, most seconds, options ...
    local name=$1 most=$2
    shift 2
    step "$name" "$most" "$PYTHON" -m benchmarks --device "$DEVICE" --json "$OUT/$name.json" "$@"
}

# Every criterion under the contract, its definition included, and whether it waits for the card.
tests contract 100 tests/criteria/test_contract.py
# Each criterion beside its peers: bytes that move against the card's copying speed, and again no wait for the card.
measure fp32 90 --seconds 0.1 "$check" "${few_rows[@]}"
measure gallery 40 --only gallery --gallery "$rows" --check
measure bf16 60 --seconds 0.05 --dtype bfloat16 "${few_rows[@]}"
tests others 60 tests/capture tests/gallery/test_search.py
# Whole files to one process: their tests share a group of processes, which gloo joins where there is one card.
few_tests+=(--dist loadfile)
tests processes 80 tests/test_distributed.py tests/test_distributed_sums.py tests/test_distiller_ddp.py \
    tests/test_distiller_rows.py
measure last 40 --seconds 0.05 --channels-last --only Dense FitNet Attention Variational "${few_rows[@]}"
measure compile 60 --seconds 0.05 --compile --only KDLoss Dense CrossCorrelation "${few_rows[@]}"
# The paper's protocol; what is finished is kept, and the same command goes on from there.
[ -n "$DATA" ] && step protocol "$LIMIT" "$PYTHON" examples/train.py cifar10 --data "$DATA" --device "$DEVICE" \
    --criterion alone kd ds --out "$OUT/protocol"
exit "$failed"
