#!/usr/bin/env bash
# Lint, format check, what may import what, and all tests. Arguments are passed on to pytest, e.g.
#   bash launch/test.sh tests/losses -k cka
# --fast: the tests of what differs from the last commit (launch/changed.py), without slow ones.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt requirements-gguf.txt
"$python" -m ruff check .
"$python" -m ruff format --check .
"${python%/*}/lint-imports" --no-cache
if [ "${1:-}" = --fast ]; then
  mapfile -t tests < <("$python" launch/changed.py)
  if [ "${#tests[@]}" = 0 ]; then
    echo "no test is of what differs from the last commit"
    exit
  fi
  set -- -m "not slow" "${tests[@]}" "${@:2}"
fi
exec "$python" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadscope --no-loadscope-reorder "$@"
