"""Trains: `python -m eru_jax.train --config=configs/emoji.py --workdir=runs/emoji`.

Running the same command again continues an interrupted run; a finished one says so. Any value of
the config can be overridden: `--config.dk_dm.num_steps=50`.
"""

from absl import flags
from ml_collections import config_flags

from eru_jax import commands

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Experiment: configs/<name>.py[:argument,...].', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run: checkpoints, metrics, pictures and report.html.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def main() -> None:
  from eru_jax.training.run import train

  train(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
  commands.run(main)
