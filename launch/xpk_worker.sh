#!/usr/bin/env bash
# What every pod of a workload of xpk.sh runs.
#
#   xpk_worker.sh tpu|cuda FLAGS TRAINING-FLAGS...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

export EXTRA=$1 VENV="${VENV:-$PWD/.venv}"
flags=$2
shift 2
# What the image has already is not installed again.
[ -d "$VENV" ] || python3 -m venv --system-site-packages "$VENV"
# All pods must have the same versions, whenever each of them starts.
export PIP_CONSTRAINT=launch/constraints.txt
source launch/install.sh
use_flags "$flags"

# JAX finds the other pods of TPU slices. On GPU nodes XPK says who is who in words of its own, of
# which JAX understands one, and then misses the rest.
if [ -n "${NNODES:-}" ]; then
  export ERU_JAX_COORDINATOR="$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT"
  export ERU_JAX_NUM_PROCESSES="$NNODES" ERU_JAX_PROCESS_ID="$NODE_RANK"
  unset JAX_COORDINATOR_ADDRESS JAX_COORDINATOR_PORT
fi

# A pod that is taken away must not look as if its run were finished: XPK starts a workload again
# after a status from 127 to 255, and the training command says 0 when it has saved.
stopped='' child=''
stop_child() { [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; }
trap 'stopped=yes; stop_child' TERM
python -m eru_jax.train "$@" &
child=$!
# The signal may have come when there was nobody yet to hand it to.
[ -z "$stopped" ] || stop_child
status=0
wait "$child" || status=$?
[ -n "$stopped" ] || exit "$status"
while kill -0 "$child" 2>/dev/null; do
  wait "$child" || true
done
exit 143
