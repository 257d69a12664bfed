#!/usr/bin/env bash
# From the drawings to the experts: about three hours on two cores. Every stage goes on where it stopped.
#   train_all.sh DRAWINGS WORK
set -euo pipefail
drawings=$(realpath "$1") work=$(realpath "$2")
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 # two trainings side by side use two cores better than one training does
places=(--drawings "$drawings" --work "$work")

python train_judge.py "${places[@]}" &
judge=$!
python train_vae.py "${places[@]}"
python train_base.py "${places[@]}"
wait "$judge"

expert() { python train_expert.py "${places[@]}" "$@"; }
{
  expert --style noto
  expert --style noto-blob --train-text-encoder
  expert --style openmoji --lora-rank 16
  expert --style openmoji-black --lora-rank 16
} &
first=$!
{
  expert --style twemoji
  expert --style fluent
  expert --style fluent-flat --lora-rank 16
  expert --style fluent-contrast --lora-rank 16
} &
second=$!
wait "$first"
wait "$second"
expert --style noto --name noto-v --prediction-type v_prediction --steps 1800
python publish.py --work "$work"
python measure.py
