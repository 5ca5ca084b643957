#!/usr/bin/env bash
# AcuLa on simulated auscultation, from nothing to report.html. Arguments are passed on, e.g.
#   bash launch/demo.sh --workdir=workdirs/mine --config.train.steps=100
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
exec "$python" -m medalign_jax.main --config=configs/acula.py:demo "$@"
