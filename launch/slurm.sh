#!/usr/bin/env bash
# Submits a run to Slurm: some nodes, one process for each GPU. Run it on the login node.
#
#   bash launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 --pass=--partition=gpu \
#     --config=configs/flux_dev_dk_dm.py --workdir=/shared/runs/dk_dm
#
# --config=FILE[:ARGUMENTS]  --workdir=DIR  --config.KEY=VALUE    as eru_jax.train has them
# --nodes=N      nodes (1)
# --gpus=N       GPUs a node (8)
# --time=T       time limit as Slurm writes it (what the partition has)
# --resumes=N    submits an array of N jobs that run one after the other and continue each other,
#                where jobs must not requeue themselves (no array: the job requeues itself)
# --grace=S      seconds before the time limit at which the run is told to save (300): more than two
#                iterations and a save take, and less than --time
# --name=NAME    the job's name, and its log's (the workdir's last part)
# --flags=NAME   a set of compiler flags: h100 (also for H200) or a100 (none)
# --pass=FLAG    one more flag of sbatch; may be repeated
# --dry_run      prints what would run, and changes nothing
#
# This clone, the environment in $VENV (.venv, made before submitting) and the workdir must lie
# where every node sees them. Logs: slurm-NAME-JOB.log beside this clone's README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

nodes=1 gpus=8 time='' resumes='' grace=300 name='' flags=''
parse_flags 'nodes gpus time resumes grace name flags' '' "$@"
require_run
require_number nodes gpus grace
check_flags "$flags"
case $workdir in
  *://*) fail 'on Slurm --workdir is a directory that every node sees, not a bucket' ;;
esac
require_tool sbatch 'run this on a login node of a Slurm cluster; without one, use launch/gpu.sh'

workdir=${workdir%/}
name=${name:-${workdir##*/}}
# JAX gives a process the GPU whose number is its rank on the node: as many tasks as GPUs, and no
# --gpus-per-task, which would hide all but one GPU, then known as number 0, from each of them.
submit=(
  sbatch
  "--job-name=$name"
  "--nodes=$nodes"
  "--ntasks-per-node=$gpus"
  "--gpus-per-node=$gpus"
  # To the processes, not to the batch script. They save and leave; slurm_job.sh sees to the rest.
  "--signal=TERM@$grace"
  --open-mode=append
)
if [ -n "$time" ]; then
  submit+=("--time=$time")
  # Slurm's words for "no limit" and the like are left to it.
  if limit=$(seconds_of "$time") && [ "$grace" -ge "$limit" ]; then
    fail "--grace=$grace is not below the $limit s of --time=$time: the run would stop at its start"
  fi
fi
if [ -n "$resumes" ]; then
  require_number resumes
  submit+=("--array=1-$resumes%1" --no-requeue "--output=slurm-$name-%A.log")
else
  submit+=(--requeue "--output=slurm-$name-%j.log")
fi

VENV="${VENV:-.venv}"
if [ -n "$dry_run" ]; then
  echo "export VENV=$(quote "$VENV") EXTRA=cuda"
  echo 'source launch/install.sh'
else
  export VENV EXTRA=cuda
  source launch/install.sh
fi
run "${submit[@]}" ${pass[@]+"${pass[@]}"} launch/slurm_job.sh "$VENV" "$flags" "${train[@]}"
