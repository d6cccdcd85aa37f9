#!/usr/bin/env bash
# All that the speed figures need of a GPU, in one go: the trainer itself on the demo's 250 faces, then the bench's rows
# side by side, with SD 1.5's shapes and random weights (4 GB, made once).
#
#     bash bench/run_gpu.sh
#     MODEL=demo RESOLUTION=128 bash bench/run_gpu.sh     the demo in fp16: does it reach the CPU's validation loss?
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
ROWS="${ROWS:-a,a:b2,a:b2+ckpt,a:b8,a:b8+cheap,${compiled}b,c:b2,c:b8,c:b2+ckpt,c:b8+ckpt}"
STEPS="${STEPS:-25}"        # timed, of each row
WARMUP="${WARMUP:-5}"
EPOCHS="${EPOCHS:-30}"
OUT="${OUT:-$root/bench/results}"

sd15="$root/.cache/bench_sd15"
data=(--dataset_dir "$root/demo/faces" --pretrained_model "$sd15")
[ "$MODEL" = demo ] && data=(--demo)
work="$(mktemp -d)"         # checkpoints, and a cache that is cold
trap 'rm -rf "$work"' EXIT

train() {  # name of the run, epochs, further flags
    local name="$1" epochs="$2" kept="$OUT/trainer-$MODEL-$RESOLUTION-$1"
    shift 2
    mkdir -p "$kept"
    "$PYTHON" "$root/train_manga_lora.py" "${data[@]}" \
        --resolution "$RESOLUTION" --num_train_epochs "$epochs" --early_stopping_patience 0 \
        --cache_dir "$work/cache" --output_dir "$work/$name" "$@" | tee "$kept/log.txt"
    cp -r "$work/$name"/{config.json,summary.json,metrics.csv,samples} "$kept"
}

mkdir -p "$OUT"
if [ "$MODEL" = sd15 ] && [ ! -d "$sd15" ]; then
    make="import pathlib, sys; import bench_training; bench_training.make_sd15(pathlib.Path(sys.argv[1]))"
    PYTHONPATH="$root/bench" "$PYTHON" -c "$make" "$sd15"
fi
train cold "$EPOCHS" --sample_every_n_epochs "$EPOCHS"
train warm 1 --sample_every_n_epochs 0 --sample_steps 1  # for the time to its first step: as few pictures as can be
"$PYTHON" "$root/bench/bench_training.py" --model "$MODEL" --resolution "$RESOLUTION" --rows "$ROWS" \
    --steps "$STEPS" --warmup "$WARMUP" --cache "$sd15" --out "$OUT" ${BENCH_FLAGS:-}
if command -v nvidia-smi > /dev/null; then
    nvidia-smi > "$OUT/trainer-$MODEL-$RESOLUTION-cold/nvidia-smi.txt"
fi
grep -H "first step after" "$OUT"/trainer-"$MODEL-$RESOLUTION"-{cold,warm}/log.txt
