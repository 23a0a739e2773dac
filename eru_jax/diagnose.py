"""Shows how knowledge is organised inside: where implicit prompts lie, seen from their anchors.

    python -m eru_jax.diagnose --model=runs/emoji --output=out

Compares the inner features of implicit prompts, at every stage a run has reached, with those that
the base has of their anchors, block by block: distance, nearest-anchor retrieval, linear CKA. No
judge is asked, so `--prompts` may name a file of any pairs. Writes `diagnosis.json` (all figures)
and `diagnosis.html` (charts, and a map).
"""

from absl import flags

from eru_jax import commands

_MODEL = flags.DEFINE_string(
  'model', None, "Workdir of a run, model directory, or 'emoji_base' (the model in the package)."
)
_OUTPUT = flags.DEFINE_string('output', None, 'Directory for the results; made if needed.')
_PROMPTS = flags.DEFINE_string(
  'prompts',
  None,
  'JSON Lines file of knowledge pairs; by default those the run was evaluated on; a '
  'FLUX model has none of its own.',
)
_MAX_PROMPTS = flags.DEFINE_integer(
  'max_prompts', 128, 'At most this many pairs of a split, evenly spread.', lower_bound=1
)
_TIMESTEPS = flags.DEFINE_list(
  'timesteps', ['0.9', '0.6', '0.3'], 'Noise levels, in (0, 1]; the highest is the one charted.'
)
_SEED = commands.define_seed()
_MESH = commands.define_mesh()
flags.mark_flags_as_required(['model', 'output'])


def main() -> None:
  from eru_jax.training.diagnosing import diagnose_model

  diagnose_model(
    _MODEL.value,
    _OUTPUT.value,
    prompts=_PROMPTS.value,
    max_prompts=_MAX_PROMPTS.value,
    timesteps=_TIMESTEPS.value,
    seed=_SEED.value,
    mesh=_MESH.value,
  )


if __name__ == '__main__':
  commands.run(main)
