#!/usr/bin/env bash
# What a GPU makes of trainings of full size: one command, at most nine minutes, no network. See benchmarks/gpu.py.
#   bash benchmarks/gpu.sh [FOLDER] [options of gpu.py]      FOLDER, by default gpu-results, gets results.json and results.md
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
folder=${1:-gpu-results}
[ $# -gt 0 ] && shift
exec "${PYTHON:-python}" benchmarks/gpu.py "$folder" "$@"
