"""Trains: `python -m eru_jax.train --config=configs/emoji.py --workdir=runs/emoji`.

Running the same command again continues an interrupted run; a finished one says so. Any value of
the config can be overridden: `--config.dk_dm.num_steps=50`. On several machines, the same command
is started once on each: docs/several_machines.md.
"""

from absl import flags

from eru_jax import commands

_CONFIG = flags.DEFINE_string(
  'config', None, 'Experiment: configs/<name>.py[:argument]; --config.KEY=VALUE overrides.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run: checkpoints, metrics, pictures and report.html.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def main() -> None:
  from eru_jax.config_file import load_config

  # Before the slow imports: a mistake in the config is answered at once.
  config = load_config(_CONFIG.value, commands.config_overrides())
  from eru_jax import distributed

  distributed.initialize()
  from eru_jax.training.run import train

  train(config, _WORKDIR.value)


if __name__ == '__main__':
  commands.run(main)
