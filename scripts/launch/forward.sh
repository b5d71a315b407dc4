# Sourced by the launch scripts.

run_training() { # OPTION...: start the training by launcher.py, and hand signals on to its processes
  set -m # a process group of its own: Ctrl-C comes here only, and is handed on once
  "${PYTHON:-python}" scripts/launch/launcher.py "$@" </dev/null &
  set +m
  launcher=$!
  local name code
  for name in INT TERM USR1; do
    # shellcheck disable=SC2064  # the name as it is now
    trap "hand_on $name" "$name"
  done
  trap 'hand_on TERM' HUP # the terminal is gone
  while true; do # a trap interrupts `wait`
    code=0
    wait "$launcher" || code=$?
    kill -0 "$launcher" 2>/dev/null || return "$code"
  done
}

hand_on() { # SIGNAL: to the training; as long as there is none, nothing is lost by ending the launcher
  pkill "-$1" -P "$launcher" -f instructsam.train || kill -KILL "$launcher" 2>/dev/null || true
}
