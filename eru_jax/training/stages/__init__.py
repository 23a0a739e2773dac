"""The stages an experiment can go through; each module has `build` and `absorb`."""

from eru_jax.training.stages import autoencoder, dk_dm, flow_matching, no_rl, reward

# Stages that make or change the backbone, and the name their result is evaluated under.
EVALUATED = {'flow_matching': 'base', 'dk_dm': 'dk_dm', 'no_rl': 'no_rl'}
STAGES = {
  'autoencoder': autoencoder,
  'reward': reward,
  'flow_matching': flow_matching,
  'dk_dm': dk_dm,
  'no_rl': no_rl,
}
