#!/usr/bin/env bash
# What needs an accelerator, in one go: the tests of the numerical parts, whole runs, and every
# measurement against its peer; about twelve minutes on one H100.
#
#   bash launch/device_check.sh [FOLDER]            logs go to FOLDER, by default device_check
#   SMALL=1 bash launch/device_check.sh             the same at small sizes, for a CPU
#   ONLY="tests loss" bash launch/device_check.sh   some of: card tests runs loss distill_ours distill_torch opera_gt
#
# Uses PYTHON (python3) as it finds it: jax with the card's plug-in, requirements.txt, and for the
# peers PyTorch, transformers, peft and liger_kernel. A part that fails does not stop the others; the
# exit status is the number of parts that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-device_check}"
mkdir -p "$folder"
python="${PYTHON:-python3}"
small="${SMALL:-}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # two libraries share the card
export PYTHONUNBUFFERED=1
failed=0

# part NAME SECONDS COMMAND...: runs it with a limit, and keeps what it prints.
part() {
  local name="$1" limit="$2" begun=$SECONDS status=0
  shift 2
  case " ${ONLY:-card tests runs loss distill_ours distill_torch opera_gt} " in *" $name "*) ;; *) return ;; esac
  env --default-signal=INT timeout --signal=INT --kill-after=20 "$limit" "$@" >"$folder/$name.log" 2>&1 || status=$?
  echo "== $name: status $status, $((SECONDS - begun)) s"
  grep -v -e "^I0000" -e "^W0000" "$folder/$name.log" | tail -n "${LINES_SHOWN:-14}"
  if [ "$status" -ne 0 ]; then failed=$((failed + 1)); fi
}

numerical=(
  tests/losses tests/models/test_attention.py tests/models/test_vit_mae.py
  tests/models/test_whisper.py tests/models/test_decoder.py
  tests/audio/test_whisper_mel.py tests/audio/test_clap_mel.py tests/audio/test_kaldi.py
  tests/methods/test_acula.py tests/evaluate/probes tests/train/test_step.py
)
platforms="cuda,cpu"
if [ -n "$small" ]; then platforms="cpu"; fi

part card 60 "$python" -m benchmarks.card
# In full float32: by default a card's float32 products are rounded to 10 bits (TF32).
part tests 240 env JAX_PLATFORMS="$platforms" JAX_DEFAULT_MATMUL_PRECISION=highest \
  "$python" -m pytest -v -p no:cacheprovider -p no:benchmark --tb=short -n "${TEST_PROCESSES:-8}" --dist loadscope "${numerical[@]}"
part runs 300 bash launch/device_runs.sh "$folder" "$platforms"
part loss 120 "$python" -m benchmarks.vocabulary_loss --chunks 1024,2048 \
  ${small:+--tokens 256 --vocab 2048 --width 128 --rounds 2}
for side in ours torch; do
  part "distill_$side" 150 "$python" -m benchmarks.distill_card --side "$side" ${small:+--small}
done
# torch.compile takes minutes of the processor for this model.
part opera_gt 300 "$python" -m benchmarks.opera_gt_card --batches 64 \
  ${small:+--batches 1 --rounds 1 --matrix 256 --without_torch}
exit "$failed"
