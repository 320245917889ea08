#!/usr/bin/env bash
# Five ranks on five GPUs without a cluster; run it from the checkout, after `make install`. The arguments of this script
# are passed to all five runs:  cloud/five_gpus.sh --config configs/gennx_qlora.yaml --dataset my_rows.jsonl
# Ctrl-C or kill ends all five; a run that has started training saves a checkpoint first.
set -muo pipefail   # m: only this script receives a Ctrl-C, and signals the five
PY=${PY:-.venv/bin/python}; RUNS=${RUNS:-experiments/five_gpus_$(date +%Y%m%d_%H%M%S)}; mkdir -p "$RUNS"
jobs=(); failed=0
trap 'trap "" INT TERM HUP; kill "${jobs[@]}" 2>/dev/null; wait; exit 130' INT TERM HUP

CUDA_VISIBLE_DEVICES=0 "$PY" train_lora.py "$@" --rank 4 --experiments_dir "$RUNS" --name rank4 > "$RUNS/rank4.log" 2>&1 & jobs+=($!)
CUDA_VISIBLE_DEVICES=1 "$PY" train_lora.py "$@" --rank 8 --experiments_dir "$RUNS" --name rank8 > "$RUNS/rank8.log" 2>&1 & jobs+=($!)
CUDA_VISIBLE_DEVICES=2 "$PY" train_lora.py "$@" --rank 16 --experiments_dir "$RUNS" --name rank16 > "$RUNS/rank16.log" 2>&1 & jobs+=($!)
CUDA_VISIBLE_DEVICES=3 "$PY" train_lora.py "$@" --rank 32 --experiments_dir "$RUNS" --name rank32 > "$RUNS/rank32.log" 2>&1 & jobs+=($!)
CUDA_VISIBLE_DEVICES=4 "$PY" train_lora.py "$@" --rank 64 --experiments_dir "$RUNS" --name rank64 > "$RUNS/rank64.log" 2>&1 & jobs+=($!)

for job in "${jobs[@]}"; do wait "$job" || failed=1; done
"$PY" visualize_loss.py -o "$RUNS/rank_comparison.png" -s "$RUNS/summary.csv" "$RUNS" || failed=1
exit $failed
