#!/usr/bin/env bash
# Lint, format check, what may import what, and all tests. Arguments are passed on to pytest, e.g.
#   bash launch/test.sh tests/losses -k cka
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt requirements-gguf.txt
"$python" -m ruff check .
"$python" -m ruff format --check .
"${python%/*}/lint-imports" --no-cache
exec "$python" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadscope --no-loadscope-reorder "$@"
