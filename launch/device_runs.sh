#!/usr/bin/env bash
# Whole runs on this machine's devices, for launch/device_check.sh: AcuLa's demo, then its encoder
# measured and its table of embeddings. TEACHER names another language model than the demo's.
#
#   bash launch/device_runs.sh FOLDER PLATFORMS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="$1"
export JAX_PLATFORMS="$2"
python="${PYTHON:-python3}"
config=configs/acula.py:demo
if [ -n "${SMALL:-}" ]; then config=tests/runs/tiny_config.py; fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

begun=$SECONDS
"$python" -m medalign_jax.main --config="$config" --workdir="$work/run" \
  ${TEACHER:+--config.teacher.source="$TEACHER"}
echo "-- the run took $((SECONDS - begun)) s"
cp "$work/run/evaluation.json" "$work/run/report.html" "$folder"
begun=$SECONDS
"$python" -m medalign_jax.evaluate --encoder "$work/run" --manifest "$work/run/simulated/metadata.csv" \
  --tasks label --out "$work/measured"
echo "-- the evaluation took $((SECONDS - begun)) s"
