#!/usr/bin/env bash
# What only a card can tell of trapo.py: one command for anybody who has one.
#
#     bash .ci/gpu.sh                                              at most 9 minutes on an H100
#     bash .ci/gpu.sh --model FOLDER --dataset FILE.jsonl          the time left: a real run
#
# PASS and FAIL lines with time stamps, then .github/gpu.md: card, versions, commit, what held, and
# the figures. First what may fail: attention's kernels and masks, graphs against plain decoding,
# three whole steps of a random Qwen2.5-0.5B, the tests that need a card, captures beside nccl. Then
# figures: sampling by rows and beside model.generate, Math-Verify, the embedded experiment. Needs
# the packages of requirements.txt and nothing from the network; 24 GB are enough, by arithmetic.
#
# Rehearsed without a card (bash .ci/gpu/rehearse.sh check): every question but the tests and nccl,
# at a tiny size, on the CPU's kernels. Not rehearsed: kernels, times, memory, nccl.
#
# LIMIT: seconds, 520.   OUT: also put the page and the log there.   PY: python, python3.
# WHEELS: a folder with wheels to use (transformers', where the machine's is older than 5.24).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PY:-python3} out=${OUT:-$(mktemp -d)}
export COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
export LIMIT=${LIMIT:-520} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$WHEELS"/*.whl
    export PYTHONPATH=$out/site
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
timeout -k 10 $((LIMIT + 15)) "$python" .ci/gpu/gpu_check.py "$@" 2>&1 | tee "$out/gpu.log"
code=${PIPESTATUS[0]}
[ -z "${OUT:-}" ] || cp .github/gpu.md "$OUT"
exit "$code"
