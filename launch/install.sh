# Sourced by local.sh and test.sh: an environment in $VENV with everything a run needs.
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: eru_jax needs Python 3.11 or newer, $PYTHON is $("$PYTHON" --version 2>&1);" \
    "name another one with PYTHON=..." >&2
  exit 2
fi
# Last of what venv writes: an interrupted creation is made anew.
if [ ! -f "$VENV/bin/activate" ]; then
  "$PYTHON" -m venv "$VENV"
fi
source "$VENV/bin/activate"
python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
# The build backend warns at length about every editable installation.
PYTHONWARNINGS=ignore python -m pip install --quiet --disable-pip-version-check -r requirements.txt
python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
  -r launch/requirements-emoji.txt
