# shellcheck shell=bash
# Sourced by the launchers: an environment in $VENV with everything a run needs, and with the EXTRA
# of setup.cfg, such as cuda or tpu.

: "${VENV:?}"

require_python() {
  if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: eru_jax needs Python 3.11 or newer, $1 is $("$1" --version 2>&1); $2" >&2
    exit 2
  fi
}

# Last of what venv writes: an interrupted creation is made anew.
if [ ! -f "$VENV/bin/activate" ]; then
  PYTHON="${PYTHON:-python3}"
  require_python "$PYTHON" "name another one with PYTHON=..."
  "$PYTHON" -m venv "$VENV"
fi
require_python "$VENV/bin/python" "remove $VENV, or choose another place with VENV=..."
# shellcheck source=/dev/null
source "$VENV/bin/activate"

# What has been installed from these very lists is not asked of the network again, so that a run can
# be resumed without one. The clone's place counts, because the installation refers to it.
lists="$(
  { pwd && cat setup.cfg pyproject.toml requirements.txt launch/*.txt; } |
    python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
)"
is_installed() { [ "$(cat "$VENV/installed-$1" 2>/dev/null)" = "$lists" ]; }
mark_installed() { echo "$lists" >"$VENV/installed-$1"; }
pip_install() { python -m pip install --quiet --disable-pip-version-check "$@"; }

if ! is_installed run; then
  pip_install --upgrade pip setuptools wheel
  # The build backend warns at length about every editable installation.
  PYTHONWARNINGS=ignore pip_install -r requirements.txt
  pip_install --no-deps --require-hashes -r launch/requirements-emoji.txt
  mark_installed run
fi
if [ -n "${EXTRA:-}" ] && ! is_installed "$EXTRA"; then
  PYTHONWARNINGS=ignore pip_install -e ".[$EXTRA]"
  mark_installed "$EXTRA"
fi
