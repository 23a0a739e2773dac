"""Scores a model on pairs of your own.

    python -m eru_jax.evaluate --model=runs/emoji --prompts=mine.jsonl --output=out

Each line of the file has `implicit` and `explicit`; the explicit prompt must be the name of a
picture the judge knows. Every stage the run has reached is scored, from the same start noise.
"""

from absl import flags

from eru_jax import commands

_MODEL = flags.DEFINE_string(
  'model', None, "Workdir of a run, model directory, or 'emoji_base' (the model in the package)."
)
_PROMPTS = flags.DEFINE_string('prompts', None, 'JSON Lines file of knowledge pairs.')
_OUTPUT = flags.DEFINE_string('output', None, 'Directory for evaluation.json and grid.png.')
_SEED = commands.define_seed()
_MESH = commands.define_mesh()
flags.mark_flags_as_required(['model', 'prompts', 'output'])


def main() -> None:
  from eru_jax.training.scoring import score_prompt_file

  score_prompt_file(_MODEL.value, _PROMPTS.value, _OUTPUT.value, _SEED.value, _MESH.value)


if __name__ == '__main__':
  commands.run(main)
