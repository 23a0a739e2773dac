"""Scores models on a benchmark, or on pairs of your own.

    python -m eru_jax.evaluate --model=runs/emoji --prompts=mine.jsonl --output=out
    python -m eru_jax.evaluate --model=runs/flux --benchmark=science_t2i --data=Science-T2I-S \\
      --scorer=sci_score --scorer_model=SciScore --output=out
    python -m eru_jax.evaluate --model=runs/flux --benchmark=wise --data=WISE \\
      --judge=http://127.0.0.1:8000/v1 --judge_model=NAME --output=out

Every stage that a run has reached is drawn and scored from the same start noise. A killed
evaluation goes on where it was when the same command is given again. docs/evaluating.md says where
the benchmarks' files come from. On several machines, the same command is started once on each:
docs/several_machines.md.
"""

from absl import flags

from eru_jax import commands
from eru_jax.judges.flags import define_chat

_MODEL = flags.DEFINE_list(
  'model', None, "Workdir of a run, model directory, FLUX.1 snapshot, or 'emoji_base' (the model "
  'in the package); several with commas between, the first being what others are compared with.'
)  # fmt: skip
_STAGES = flags.DEFINE_list(
  'stages', [], 'Of a run: only these stages, such as base,no_rl; by default all it has reached.'
)
_BENCHMARK = flags.DEFINE_string(
  'benchmark', None, 'emoji, science_t2i, science_t2i_train (for reward anchors), wise or '
  'wise_verified.'
)  # fmt: skip
_DATA = flags.DEFINE_string('data', None, "Directory of the benchmark's files, or one file.")
_PROMPTS = flags.DEFINE_string(
  'prompts', None, 'JSON Lines file of knowledge pairs: short for --benchmark=emoji --data=FILE. '
  'Without another --scorer, each explicit prompt must be the name of a picture the judge knows.'
)  # fmt: skip
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Directory for evaluation.json, tables, gallery.html and the pictures.'
)
_SCORER = flags.DEFINE_string(
  'scorer', None, 'What looks at the pictures: emoji, sci_score, clip_score, or none to draw only; '
  'by default what the benchmark was published with.'
)  # fmt: skip
_SCORER_MODEL = flags.DEFINE_string(
  'scorer_model', None, 'Of sci_score and clip_score: a CLIPModel in the Hugging Face layout.'
)
_JUDGE = define_chat('judge', 'looks at the pictures of wise, wise_verified or science_t2i')
_REWRITER = define_chat('rewriter', 'rewrites implicit prompts, a rival that the first model draws')
_CONDITIONS = flags.DEFINE_list(
  'conditions', [], 'Prompts to draw, out of implicit, explicit and superficial; by default all '
  'that there are.'
)  # fmt: skip
_LIMIT = flags.DEFINE_integer(
  'limit', None, 'At most so many questions, evenly spread over the categories.', lower_bound=1
)
_IMAGES = flags.DEFINE_integer(
  'images_per_prompt', None, "Pictures of each prompt; by default as the benchmark's authors.",
  lower_bound=1,
)  # fmt: skip
_STEPS = flags.DEFINE_integer(
  'steps', None, 'Euler steps; by default what the model was made for.', lower_bound=1
)
_GUIDANCE = flags.DEFINE_float(
  'guidance', None, 'Guidance scale of a model that was made for one, as in `sample`.',
  lower_bound=0,
)  # fmt: skip
_CFG_SCALE = flags.DEFINE_float(
  'cfg_scale', None, 'Scale of classifier-free guidance, as in `sample`.', lower_bound=0
)
_HEIGHT = flags.DEFINE_integer(
  'height', None, "Pixels; by default the model's own size.", lower_bound=1
)
_WIDTH = flags.DEFINE_integer(
  'width', None, "Pixels; by default the model's own size.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], 'Of the computation, as in `sample`.'
)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', None, 'Pictures made at a time.', lower_bound=1)
_SEED = commands.define_seed()
_MESH = commands.define_mesh()
flags.mark_flags_as_required(['model', 'output'])


def main() -> None:
  from eru_jax.errors import UserError

  if (_PROMPTS.value is None) == (_BENCHMARK.value is None):
    raise UserError('Give either --benchmark=NAME with --data=DIR, or --prompts=FILE.')
  if _PROMPTS.value is not None and _DATA.value is not None:
    raise UserError('--prompts and --data are both given: --data is for --benchmark.')
  judge, rewriter = _JUDGE.service(), _REWRITER.service()
  from eru_jax import distributed

  distributed.initialize()
  from eru_jax.evaluating.evaluator import evaluate
  from eru_jax.evaluating.request import EvaluationRequest

  evaluate(
    EvaluationRequest(
      models=tuple(_MODEL.value),
      output=_OUTPUT.value,
      benchmark=_BENCHMARK.value or 'emoji',
      data=_DATA.value if _PROMPTS.value is None else _PROMPTS.value,
      scorer=_SCORER.value,
      scorer_model=_SCORER_MODEL.value,
      judge=judge,
      rewriter=rewriter,
      limit=_LIMIT.value,
      images_per_prompt=_IMAGES.value,
      conditions=tuple(_CONDITIONS.value),
      stages=tuple(_STAGES.value),
      seed=_SEED.value,
      mesh=_MESH.value,
      steps=_STEPS.value,
      guidance=_GUIDANCE.value,
      cfg_scale=_CFG_SCALE.value,
      height=_HEIGHT.value,
      width=_WIDTH.value,
      dtype=_DTYPE.value,
      batch_size=_BATCH_SIZE.value,
    )
  )


if __name__ == '__main__':
  commands.run(main)
