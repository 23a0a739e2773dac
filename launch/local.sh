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
source launch/flags/cpu.sh
python -m eru_jax.train --config=configs/emoji.py --workdir="$WORKDIR" "$@"
