"""Plans a run on TPUs without having them: does it fit, and how fast could it be?

    python -m eru_jax.plan --config=configs/flux_dev_dk_dm.py:res=1024 --topology=v5e:2x2

Compiles every program of the run for that slice with the real TPU compiler (the package libtpu, no
TPU), without weights. Any value of the config can be overridden, as in eru_jax.train.
"""

import os

from absl import flags

from eru_jax import commands

_CONFIG = flags.DEFINE_string(
  'config', None, 'Experiment: configs/<name>.py[:argument]; --config.KEY=VALUE overrides.'
)
_TOPOLOGY = flags.DEFINE_string('topology', None, 'TPU slice, such as v5e:2x4 or v5p:2x2x1.')
_JSON = flags.DEFINE_string('json', None, 'File to write the estimates to, as JSON.')
_ONLY = flags.DEFINE_string(
  'only', '', 'Regular expression; compile only programs in whose name it is found.'
)
_THOROUGH = flags.DEFINE_bool(
  'thorough', False, 'Compile as the run itself would, which takes five times as long.'
)
flags.mark_flags_as_required(['config', 'topology'])


def main() -> None:
  from eru_jax.config_file import load_config

  # Before the slow imports: a mistake in the config is answered at once.
  config = load_config(_CONFIG.value, commands.config_overrides())
  # Whatever accelerator is here is not needed, and may be in use.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from eru_jax.training.planning import plan

  plan(config, _TOPOLOGY.value, _JSON.value, only=_ONLY.value, thorough=_THOROUGH.value)


if __name__ == '__main__':
  commands.run(main)
