#!/bin/bash
# All that is worth doing on one card in eight minutes, the most telling first, each step with its own limit:
#   benchmarks/gpu.sh OUT [--data DIR]
# OUT takes a log of every step and the JSON files; DIR is CIFAR-10's, for the protocol in what is left of the time.
# Exits 1 where a step failed; a step that ran out of time is not a failure of the others.
set -u
OUT=${1:?"where to: benchmarks/gpu.sh OUT [--data DIR]"}
DATA=${3:-}
PYTHON=${PYTHON:-python}
LIMIT=${LIMIT:-480}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$OUT"
export PYTHONPATH=.
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' 2>/dev/null ||
    { echo "torch finds no CUDA device here"; exit 1; }
failed=0

step() { # name, most seconds, command ...
    local name=$1 most=$2 left=$((LIMIT - SECONDS)) code
    shift 2
    ((left > 5)) || { echo "$name: no time left"; return; }
    timeout "$((most < left ? most : left))" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$name: $( ((code == 124)) && echo "ran out of its time" || echo "exit $code"), $SECONDS s so far"
    ((code == 0 || code == 124)) || { failed=1; tail -15 "$OUT/$name.log"; }
}

step tests 90 "$PYTHON" -m pytest -q -m gpu
# Each criterion beside its peers, with the share of the card's copying speed, and no wait for the card.
step fp32 90 "$PYTHON" -m benchmarks --device cuda --seconds 0.1 --json "$OUT/fp32.json" --check
step bf16 60 "$PYTHON" -m benchmarks --device cuda --dtype bfloat16 --seconds 0.05 --json "$OUT/bf16.json"
step last 40 "$PYTHON" -m benchmarks --device cuda --channels-last --seconds 0.05 --json "$OUT/last.json" \
    --only Dense FitNet Attention Variational
step gallery 40 "$PYTHON" - <<'EOF'
import time
import torch
from structkd import RetrievalGallery

rows, labels = torch.randn(1_000_000, 256), torch.zeros(1_000_000, dtype=torch.int64)
queries, wanted = torch.randn(1000, 256).cuda(), labels[:1000].cuda()
gallery = RetrievalGallery(256, device="cuda")
for part in range(0, len(rows), 65_536):
    gallery.add(rows[part : part + 65_536], labels[part : part + 65_536])
gallery.search(queries, wanted)
torch.cuda.synchronize()
start = time.perf_counter()
_, ids = gallery.search(queries, wanted)
torch.cuda.synchronize()
spent = time.perf_counter() - start
scores = torch.nn.functional.normalize(queries.cpu()[:20]) @ torch.nn.functional.normalize(rows).T
assert torch.equal(ids[:20, 0].cpu(), scores.argmax(1)), "the nearest differ from the CPU's"
print(f"1,000 queries among 1,000,000 rows: {spent * 1e3:.3g} ms")
EOF
step compile 60 "$PYTHON" -m benchmarks --device cuda --compile --seconds 0.05 --json "$OUT/compile.json" \
    --only KDLoss Dense CrossCorrelation
# The paper's protocol; what is finished is kept, and the same command goes on from there.
[ -n "$DATA" ] && step protocol "$LIMIT" "$PYTHON" examples/train.py cifar10 --data "$DATA" --device cuda \
    --criterion alone kd ds --out "$OUT/protocol"
exit "$failed"
