#!/usr/bin/env bash
# What tpu_vm.sh runs on every worker of a TPU, in the directory it has sent.
#
#   tpu_worker.sh install | start FLAGS TRAINING-FLAGS... | idle | follow | status | stop | kill
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

mkdir -p run
log=run/log
export VENV="${VENV:-$PWD/.venv}" EXTRA=tpu

# The lock is a run's from its start until the last of its processes is gone, however it goes.
running() { ! flock --nonblock run/lock true; }

# A Python that is new enough. TPU images come with Ubuntu's 3.10; uv brings one that needs no root.
find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  python3 -m pip install --quiet --user uv >&2
  python3 -m uv python install --quiet 3.12 >&2
  python3 -m uv python find 3.12
}

action=${1:-}
shift
case $action in
  install)
    PYTHON=$(find_python)
    # All workers of a slice must have the same versions, whenever each of them installs.
    export PYTHON PIP_CONSTRAINT=launch/constraints.txt
    source launch/install.sh
    echo "$(hostname): installed"
    ;;
  start)
    exec {lock}>run/lock
    flock --nonblock "$lock" || fail "$(hostname): a run is on already; stop it first"
    rm -f run/status
    # A session of its own outlives the connection, and can be signalled as a whole.
    setsid bash launch/tpu_worker.sh train "$@" </dev/null >>"$log" 2>&1 &
    echo $! >run/pid
    echo "$(hostname): started"
    ;;
  train)
    echo "--- $(date)"
    use_flags "$1"
    shift
    # shellcheck source=/dev/null
    source "$VENV/bin/activate"
    # The signal reaches the whole session: this shell stays to note how the run ended.
    trap : TERM
    status=0
    python -m eru_jax.train "$@" || status=$?
    echo "$status" >run/status
    echo "--- $(date) ended with status $status"
    ;;
  idle) ! running || fail "$(hostname): a run is on; stop it first" ;;
  follow) exec tail -n 200 -F "$log" ;;
  status)
    if running; then
      state=running
    elif [ -f run/status ]; then
      state="ended with status $(cat run/status)"
    elif [ -f run/pid ]; then
      state='broken off'
    else
      state='never started'
    fi
    echo "$(hostname): $state; $(tail -n 1 "$log" 2>/dev/null || true)"
    ;;
  stop | kill)
    if ! running; then
      echo "$(hostname): nothing runs"
      exit
    fi
    signal=TERM
    [ "$action" = stop ] || signal=KILL
    kill "-$signal" -- "-$(cat run/pid)"
    # Waits for the last process of the run to let go.
    flock --timeout "${STOP_SECONDS:-600}" run/lock true ||
      fail "$(hostname): still saving after ${STOP_SECONDS:-600} s; wait, or use kill"
    echo "$(hostname): stopped; $(tail -n 1 "$log")"
    ;;
  *) fail "tpu_worker.sh knows no '$action'" ;;
esac
