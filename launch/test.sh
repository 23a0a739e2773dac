#!/usr/bin/env bash
# Installs what the tests need (PyTorch and diffusers are their oracles) and runs them.
#
#   bash launch/test.sh             all but the slow ones
#   bash launch/test.sh -m slow     the slow ones; other pytest arguments work too
#
# VENV and PYTHON as in local.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv}"
source launch/install.sh
# PyTorch first and by exact version: a range would fetch the newest CUDA build.
python -m pip install --quiet --disable-pip-version-check torch==2.13.0
python -m pip install --quiet --disable-pip-version-check -e '.[test]'

ruff check .
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
python -m pytest "$@"
