#!/usr/bin/env bash
# What slurm.sh submits. Slurm runs a copy of it on the first node, in the directory of the clone.
#
#   slurm_job.sh VENV FLAGS TRAINING-FLAGS...
set -euo pipefail
source launch/common.sh

venv=$1 flags=$2
shift 2
parse_flags '' '' "$@"
# shellcheck source=/dev/null
source "$venv/bin/activate"
use_flags "$flags"
echo "$(date) job ${SLURM_JOB_ID:?} on ${SLURM_JOB_NODELIST:-one node}"

# No trap: this shell dies of the SIGTERM with which scancel ends a job, and nothing is requeued.
step=(srun --kill-on-bad-exit=1)
# sbatch's own is no longer handed on to srun.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
status=0
"${step[@]}" python -m eru_jax.train "${train[@]}" || status=$?

# A run that was told to stop has saved and says 0, or 143 if it had nothing to save yet; one that
# is finished has its summary.
[ "$status" = 0 ] || [ "$status" = 143 ] || exit "$status"
[ ! -f "$workdir/summary.json" ] || exit 0
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || exit 0
echo "$(date) saved before its end; the job goes back into the queue"
# Incomplete: not a job that somebody cancels, nor one that Slurm is requeueing already.
exec scontrol requeue Incomplete "$SLURM_JOB_ID"
