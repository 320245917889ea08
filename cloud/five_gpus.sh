#!/usr/bin/env bash
# Five ranks on five GPUs with nothing but a shell; run it from the checkout, after `make install`. Flags given to this
# script go to all five runs:  cloud/five_gpus.sh --config configs/gennx_qlora.yaml --dataset my_rows.jsonl
set -uo pipefail
PY=${PY:-.venv/bin/python}; RUNS=${RUNS:-experiments/five_gpus_$(date +%Y%m%d_%H%M%S)}; mkdir -p "$RUNS"

CUDA_VISIBLE_DEVICES=0 "$PY" train_lora.py "$@" --rank 4 --experiments_dir "$RUNS" --name rank4 > "$RUNS/rank4.log" 2>&1 &
CUDA_VISIBLE_DEVICES=1 "$PY" train_lora.py "$@" --rank 8 --experiments_dir "$RUNS" --name rank8 > "$RUNS/rank8.log" 2>&1 &
CUDA_VISIBLE_DEVICES=2 "$PY" train_lora.py "$@" --rank 16 --experiments_dir "$RUNS" --name rank16 > "$RUNS/rank16.log" 2>&1 &
CUDA_VISIBLE_DEVICES=3 "$PY" train_lora.py "$@" --rank 32 --experiments_dir "$RUNS" --name rank32 > "$RUNS/rank32.log" 2>&1 &
CUDA_VISIBLE_DEVICES=4 "$PY" train_lora.py "$@" --rank 64 --experiments_dir "$RUNS" --name rank64 > "$RUNS/rank64.log" 2>&1 &

failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
"$PY" visualize_loss.py -o "$RUNS/rank_comparison.png" -s "$RUNS/summary.csv" "$RUNS" || failed=1
exit $failed
