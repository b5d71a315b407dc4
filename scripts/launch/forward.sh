# Sourced by the launch scripts. Signals that ask for a checkpoint are meant for the training processes: launchers die of
# SIGUSR1, and on SIGTERM leave their processes 30 seconds, which may be too short for a checkpoint.

run_forwarding() { # COMMAND...: run a launcher, hand SIGTERM and SIGUSR1 on to the processes that it starts
  (trap '' USR1 TERM && exec "$@") &
  local launcher=$! code
  # shellcheck disable=SC2064  # the number as it is now
  trap "pkill -USR1 -P $launcher" USR1
  # shellcheck disable=SC2064
  trap "pkill -TERM -P $launcher" TERM
  while true; do # a trap interrupts `wait`
    code=0
    wait "$launcher" || code=$?
    kill -0 "$launcher" 2>/dev/null || return "$code"
  done
}
