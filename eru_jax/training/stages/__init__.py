"""The stages an experiment can go through; each module has `build` and `absorb`."""

from eru_jax.training.stages import autoencoder, dk_dm, flow_matching, no_rl, reward

STAGES = {
  'autoencoder': autoencoder,
  'reward': reward,
  'flow_matching': flow_matching,
  'dk_dm': dk_dm,
  'no_rl': no_rl,
}
