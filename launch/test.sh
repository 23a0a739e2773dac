#!/usr/bin/env bash
# Installs what the tests need (PyTorch and diffusers are their oracles) and runs them.
#
#   bash launch/test.sh             all but the slow ones
#   bash launch/test.sh -m slow     the slow ones; other pytest arguments work too
#
# VENV and PYTHON as in local.sh; TEST_WORKERS=0 runs the tests in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv}"
source launch/install.sh
if ! is_installed test; then
  # On Linux, PyPI's PyTorch is the CUDA build of several GB. For the CPU build of the same version,
  # set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU wheels (pytorch.org names it): pip reads
  # that variable, and prefers a version with "+cpu" to the same one without.
  PYTHONWARNINGS=ignore pip_install -e '.[test,plan]'
  pip_install --no-deps --require-hashes -r launch/requirements-test.txt
  mark_installed test
fi

ruff check .
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Compiling uses one core: two workers take little more than half the time, and 6 GB.
python -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
