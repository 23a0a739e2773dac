"""The stages an experiment can go through; each module has `build` and `absorb`."""

from eru_jax.training.stages import autoencoder, dk_dm, flow_matching, no_rl, reward

STAGES = {
  'autoencoder': autoencoder,
  'reward': reward,
  'flow_matching': flow_matching,
  'dk_dm': dk_dm,
  'no_rl': no_rl,
}
# What a run that had one of these hands on as a model directory.
PRETRAINING = ('autoencoder', 'reward', 'flow_matching')


def evaluated_as(stage: str, source: str) -> str | None:
  """The label under which a stage's result is evaluated; None where it leaves the backbone alone.

  From scratch, pretraining makes the base; from a model, it changes one that was the base before.
  """
  if stage in ('autoencoder', 'reward'):
    return None
  return 'base' if stage == 'flow_matching' and source == 'scratch' else stage
