#!/usr/bin/env bash
# From a clone to a report: makes a virtual environment, installs, trains on the emoji world.
#
#   bash launch/local.sh            about ten minutes on a laptop with 2 cores, no GPU needed
#
# --config.KEY=VALUE  overrides a value of configs/emoji.py, or of the config that is named by
# --config=FILE[:ARGUMENTS]; another config needs another directory for its run:
# --workdir=DIR       (runs/emoji), for example
#   bash launch/local.sh --workdir=runs/long --config.dk_dm.num_steps=400
# --dry_run           prints what would run, and changes nothing
#
# VENV chooses the environment's directory (.venv), WORKDIR the run's where there is no --workdir,
# PYTHON the interpreter. The same command again continues an interrupted run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

# What is given comes later, and counts.
parse_flags '' '' --config=configs/emoji.py "--workdir=${WORKDIR:-runs/emoji}" "$@"
require_run

if [ -n "$dry_run" ]; then
  echo "export VENV=$(quote "${VENV:-.venv}")"
  echo 'source launch/install.sh'
  echo 'source launch/flags/cpu.sh'
else
  export VENV="${VENV:-.venv}"
  source launch/install.sh
  source launch/flags/cpu.sh
fi
run python -m eru_jax.train "${train[@]}"
