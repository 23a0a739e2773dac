#!/usr/bin/env bash
# Trains on the GPUs of this machine, with one process for all of them.
#
#   bash launch/gpu.sh --config=configs/flux_dev_dk_dm.py --workdir=runs/dk_dm \
#     --config.model.source=FLUX.1-dev --config.data.pairs=pairs.jsonl
#
# --config=FILE[:ARGUMENTS]  --workdir=DIR  --config.KEY=VALUE    as eru_jax.train has them
# --gpus=N       the first N GPUs (all that CUDA_VISIBLE_DEVICES names, or all there are)
# --flags=NAME   a set of compiler flags: h100 (also for H200) or a100 (none)
# --dry_run      prints what would run, and changes nothing
#
# The first start makes an environment in $VENV (.venv) with JAX for CUDA. The same command again
# continues an interrupted run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

gpus='' flags=''
parse_flags 'gpus flags' '' "$@"
require_run
check_flags "$flags"

if [ -n "$gpus" ]; then
  require_number gpus
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    named=${CUDA_VISIBLE_DEVICES//[!,]/}
    [ "$gpus" -le $((${#named} + 1)) ] ||
      fail "--gpus=$gpus is more than CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names"
    visible=$(cut -d, -f "1-$gpus" <<<"$CUDA_VISIBLE_DEVICES")
  else
    visible=$(seq -s, 0 $((gpus - 1)))
  fi
fi

if [ -n "$dry_run" ]; then
  echo "export VENV=$(quote "${VENV:-.venv}") EXTRA=cuda"
  echo 'source launch/install.sh'
  [ -z "$flags" ] || echo "source launch/flags/$flags.sh"
  [ -z "$gpus" ] || echo "export CUDA_VISIBLE_DEVICES=$visible"
else
  require_tool nvidia-smi 'there is no NVIDIA driver; without a GPU use launch/local.sh'
  found=$(nvidia-smi --list-gpus | grep -c '^GPU' || true)
  [ "${gpus:-1}" -le "$found" ] || fail "--gpus=${gpus:-1}, but nvidia-smi lists $found"
  export VENV="${VENV:-.venv}" EXTRA=cuda
  source launch/install.sh
  use_flags "$flags"
  [ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES="$visible"
fi
run python -m eru_jax.train "${train[@]}"
