"""Draws prompts.

    python -m eru_jax.sample --model=runs/emoji --output=out \\
      --prompt='what the Harlem Globetrotters spin'
    python -m eru_jax.sample --model=FLUX.1-dev --output=out --prompt='a red apple' \\
      --height=768 --width=1344

Writes one PNG a picture, named by its index, `grid.png` and `samples.json`. On several machines,
the same command is started once on each: docs/several_machines.md.
"""

from absl import flags

from eru_jax import commands

_MODEL = flags.DEFINE_string(
  'model', None, "Workdir of a run, model directory, FLUX.1 snapshot in diffusers' layout, or "
  "'emoji_base' (the model in the package)."
)  # fmt: skip
_STAGE = flags.DEFINE_string(
  'stage', None, 'For a workdir: draw with the model after this stage (base, dk_dm, no_rl); '
  'by default the last one the run has reached.'
)  # fmt: skip
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'A prompt to draw; may be repeated.')
_PROMPTS = flags.DEFINE_string(
  'prompts', None, 'File of prompts: JSON Lines of knowledge pairs (.jsonl or .json), else one a '
  'line.'
)  # fmt: skip
_OUTPUT = flags.DEFINE_string('output', None, 'Directory for the pictures; made if needed.')
_STEPS = flags.DEFINE_integer(
  'steps', None, 'Euler steps; by default what the model was made for.', lower_bound=1
)
_GUIDANCE = flags.DEFINE_float(
  'guidance', None, 'Guidance scale of a model that was made for one: embedded (FLUX.1-dev), or '
  'classifier-free (emoji_base). Others do not take it.', lower_bound=0,
)  # fmt: skip
_CFG_SCALE = flags.DEFINE_float(
  'cfg_scale', None, 'Scale of classifier-free guidance against the empty prompt, for any model; 1 '
  'is off. Takes twice the time.', lower_bound=0,
)  # fmt: skip
_HEIGHT = flags.DEFINE_integer(
  'height', None, "Pixels; by default the model's own size.", lower_bound=1
)
_WIDTH = flags.DEFINE_integer(
  'width', None, "Pixels; by default the model's own size.", lower_bound=1
)
_SEED = commands.define_seed()
_NUM_IMAGES = flags.DEFINE_integer('num_images', 1, 'Pictures of each prompt.', lower_bound=1)
_LATENTS = flags.DEFINE_string(
  'latents', None, 'Start noise instead of --seed: .npy file, packed (N, S, C) float32, one row a '
  'picture.'
)  # fmt: skip
_LORA = flags.DEFINE_multi_string(
  'lora', [], 'Adapter file in the form of diffusers or kohya; may be repeated.'
)
_LORA_SCALE = flags.DEFINE_multi_float(
  'lora_scale', [], 'Strength of the adapters, one for all or one for each in turn; 1 by default.'
)
_IMAGE = flags.DEFINE_string(
  'image', None, 'Picture to set out from instead of pure noise, cut to what is drawn.'
)
_STRENGTH = flags.DEFINE_float(
  'strength', None, 'Of --image: share of the steps that are taken, 0.6 by default; 1 forgets the '
  'picture.',
  lower_bound=0, upper_bound=1,
)  # fmt: skip
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'],
  'Of the computation; by default what the run has, for a published model bfloat16 (on a CPU '
  'float32).',
)  # fmt: skip
_BATCH_SIZE = flags.DEFINE_integer('batch_size', None, 'Pictures made at a time.', lower_bound=1)
_SAVE_LATENTS = flags.DEFINE_bool(
  'save_latents', False, 'Also write the final packed latents, latents_final.npy.'
)
_MESH = commands.define_mesh()
flags.mark_flags_as_required(['model', 'output'])


def main() -> None:
  from eru_jax import distributed

  distributed.initialize()
  from eru_jax.training.sampling import SampleRequest, sample

  sample(
    SampleRequest(
      model=_MODEL.value,
      stage=_STAGE.value,
      prompts=tuple(_PROMPT.value),
      prompt_file=_PROMPTS.value,
      output=_OUTPUT.value,
      steps=_STEPS.value,
      guidance=_GUIDANCE.value,
      cfg_scale=_CFG_SCALE.value,
      height=_HEIGHT.value,
      width=_WIDTH.value,
      seed=_SEED.value,
      num_images=_NUM_IMAGES.value,
      latents=_LATENTS.value,
      save_latents=_SAVE_LATENTS.value,
      lora=tuple(_LORA.value),
      lora_scale=tuple(_LORA_SCALE.value),
      image=_IMAGE.value,
      strength=_STRENGTH.value,
      dtype=_DTYPE.value,
      batch_size=_BATCH_SIZE.value,
      mesh=_MESH.value,
    )
  )


if __name__ == '__main__':
  commands.run(main)
