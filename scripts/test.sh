#!/usr/bin/env bash
# Everything a change must pass: style, types and the tests, in a virtual environment of its own (.venv-test).
#
#   scripts/test.sh                    all of it
#   scripts/test.sh --fast             without the tests that take long or start processes
#   scripts/test.sh -k matching        further arguments go to pytest
#   PYTHON=python3.12 scripts/test.sh  another interpreter
#   JOBS=8 scripts/test.sh             so many tests at once (default: one more than cores, as some wait; --fast: cores)
#
# The environment is built anew when pyproject.toml, constraints.txt or the interpreter changes, and reused otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selected=()
waiting=1
if [ "${1:-}" = --fast ]; then
    shift
    selected=(-m "not slow and not multiprocess")
    waiting=0
fi
interpreter="${PYTHON:-python3}"
environment=.venv-test
stamp="$environment/installed-for"
python="$PWD/$environment/bin/python"

"$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$interpreter is older than Python 3.10; name another one: PYTHON=python3.11 $0" >&2
    exit 2
}

# One thread a process: several that share a few cores spin against each other and are many times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
# What a process compiles, the next one reads; empty means that compiled files are kept.
export PYTHONDONTWRITEBYTECODE=
# No test may need a network.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline

wanted="$("$interpreter" - pyproject.toml constraints.txt <<'PY'
import hashlib, pathlib, sys
contents = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print(hashlib.sha256(contents + sys.version.encode()).hexdigest())
PY
)"
echo "== environment"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "$environment is up to date"
else
    echo "installing into $environment, which takes a few minutes"
    rm -rf "$environment"
    "$interpreter" -m venv "$environment"
    torch="$(grep -E '^torch==' constraints.txt)"
    pip() { "$python" -m pip install -qq --no-compile -c constraints.txt "$@"; } # compiled when imported: not all are
    pip --upgrade pip # which chooses versions in a third of the time that Python's own takes
    pip "$torch" # by itself first, as the largest part
    "$python" -c "import torch._dynamo" 2>/dev/null & # compiles what every test needs, beside the rest
    pip -e ".[dev,lora,tracking,deepspeed,bnb,plots,demo,serve,supervision]"
    echo "$wanted" >"$stamp"
fi
"$python" --version
jobs="${JOBS:-$("$python" -c "import os; print(os.cpu_count() + $waiting)")}"

checks="$(mktemp)"
PYTHON="$python" scripts/check.sh >"$checks" 2>&1 & # beside the tests
checking=$!
trap 'kill "$checking" 2>/dev/null || true; rm -f "$checks"' EXIT # one that has ended is no failure

failed=0
echo "== pytest, $jobs at once"
"$python" -m pytest --numprocesses "$jobs" --dist loadfile --no-loadscope-reorder ${selected[@]+"${selected[@]}"} "$@" || failed=1
wait "$checking" || failed=1
cat "$checks"
if [ "$failed" = 0 ]; then echo "== all passed"; else echo "== FAILED, see above"; fi
exit "$failed"
