#!/usr/bin/env bash
# All that the speed figures need of a GPU, in one go: the bench's rows side by side, then the trainer itself on the
# demo's 250 faces, with SD 1.5's shapes and random weights (4 GB, made once).
#
#     bash bench/run_gpu.sh
#     MODEL=demo RESOLUTION=128 STEPS=2 WARMUP=1 EPOCHS=1 OUT=small bash bench/run_gpu.sh     small, also on a CPU
#
# All rows are in memory at once; for a card that is too small for that, set BENCH_FLAGS=--one_at_a_time. Leaves in OUT
# the bench's file, and per training a folder with its log, summary, metrics and pictures.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
PYTHON="${PYTHON:-python}"
MODEL="${MODEL:-sd15}"      # sd15 or demo
RESOLUTION="${RESOLUTION:-512}"
compiled="$(command -v nvidia-smi > /dev/null && echo a:b8+compile, || true)"
ROWS="${ROWS:-a,a:b2,a:b2+ckpt,a:b8,${compiled}b,c:b2,c:b8,c:b2+ckpt,c:b8+ckpt}"
STEPS="${STEPS:-100}"       # timed, of each row
WARMUP="${WARMUP:-20}"
EPOCHS="${EPOCHS:-30}"
OUT="${OUT:-$root/bench/results}"

sd15="$root/.cache/bench_sd15"
base="$([ "$MODEL" = demo ] && echo "$root/demo/base" || echo "$sd15")"
work="$(mktemp -d)"         # checkpoints, and a cache that is cold
trap 'rm -rf "$work"' EXIT

train() {  # name of the run, epochs, further flags
    local name="$1" epochs="$2" kept="$OUT/trainer-$MODEL-$RESOLUTION-$1"
    shift 2
    mkdir -p "$kept"
    "$PYTHON" "$root/train_manga_lora.py" --dataset_dir "$root/demo/faces" --pretrained_model "$base" \
        --resolution "$RESOLUTION" --num_train_epochs "$epochs" --early_stopping_patience 0 \
        --cache_dir "$work/cache" --output_dir "$work/$name" "$@" | tee "$kept/log.txt"
    cp -r "$work/$name"/{config.json,summary.json,metrics.csv,samples} "$kept"
}

mkdir -p "$OUT"
"$PYTHON" "$root/bench/bench_training.py" --model "$MODEL" --resolution "$RESOLUTION" --rows "$ROWS" \
    --steps "$STEPS" --warmup "$WARMUP" --cache "$sd15" --out "$OUT" ${BENCH_FLAGS:-}
train cold "$EPOCHS" --sample_every_n_epochs "$EPOCHS"
train warm 1 --sample_every_n_epochs 0 --sample_steps 1  # for the time to its first step: as few pictures as can be
if command -v nvidia-smi > /dev/null; then
    nvidia-smi > "$OUT/trainer-$MODEL-$RESOLUTION-cold/nvidia-smi.txt"
fi
grep -H "first step after" "$OUT"/trainer-"$MODEL-$RESOLUTION"-{cold,warm}/log.txt
