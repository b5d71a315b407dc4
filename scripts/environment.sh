#!/usr/bin/env bash
# Makes the virtual environment that the other scripts run in, unless it is complete already.
#
#     bash scripts/environment.sh [FOLDER]      default: .venv beside this folder
#
# PYTHON chooses the interpreter.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
venv=${1:-$root/.venv}

if [ ! -f "$venv/.quickstart-complete" ]; then
  echo "== environment in $venv, which takes a few minutes"
  "${PYTHON:-python3}" -m venv "$venv"
  install() { "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" "$@"; }
  # PyTorch by its tested version first, so that nothing else pulls another build in.
  install "$(grep '^torch==' "$root/constraints.txt")"
  install -e "$root"
  touch "$venv/.quickstart-complete"
fi
