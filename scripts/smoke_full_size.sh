#!/usr/bin/env bash
# The full-size model with random weights on one photograph: memory, time and parameters, part by part.
#
#     bash scripts/smoke_full_size.sh [PICTURE] [--phrase PHRASE] [--json FILE] [--device cuda] [--tiny] ...
#
# All options: scripts/smoke_full_size.py. Needs 8 GiB of memory and no weights; without PICTURE it takes the public-domain
# photograph that matplotlib brings along. The environment is the quickstart's (.venv), made if it is not there.
# PYTHON chooses the interpreter, VENV another folder than .venv.
set -euo pipefail
# Not changed into: PICTURE and FILE may be relative to where the caller is.
root="$(cd "$(dirname "$0")/.." && pwd)"

venv=${VENV:-$root/.venv}

bash "$root/scripts/environment.sh" "$venv"
if ! "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("matplotlib") is None)'; then
  echo "== matplotlib, for its photograph"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" matplotlib ||
    echo "matplotlib cannot be installed: name a picture" >&2
fi
exec "$venv/bin/python" "$root/scripts/smoke_full_size.py" "$@"
