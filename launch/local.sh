#!/usr/bin/env bash
# From a clone to a report: makes a virtual environment, installs, trains on the emoji world.
#
#   bash launch/local.sh            about ten minutes on a laptop with 2 cores, no GPU needed
#
# Extra arguments go to the training command; another config needs another WORKDIR, for example
#   WORKDIR=runs/long bash launch/local.sh --config.dk_dm.num_steps=400
# VENV chooses the environment's directory, WORKDIR the run's, PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv}"
WORKDIR="${WORKDIR:-runs/emoji}"
source launch/install.sh

# glibc would give XLA's large buffers back to the system after every step and fault them in again,
# a quarter of a step's time. XLA allocates on threads of its own, whose arenas hold 64 MB at most
# and map what is larger whatever the first setting says: hence one arena. Huge pages fault less.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_ARENA_MAX=1
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
python -m eru_jax.train --config=configs/emoji.py --workdir="$WORKDIR" "$@"
