#!/usr/bin/env bash
# Style, formatting and types. PYTHON names the interpreter whose ruff and pyrefly are used (default: python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}"
failed=0

check() {
    echo "== $1"
    shift
    "$python" -m "$@" || failed=1
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "pyrefly" pyrefly check --python-interpreter-path "$(command -v "$python")"
exit "$failed"
