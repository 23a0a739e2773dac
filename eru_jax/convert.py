"""Converts a model's weights from one layout into another.

    python -m eru_jax.convert --family=flux --source=FLUX.1-dev --output=flux-dev --to=eru

The layout of the source is told by the names of its tensors. Layouts: `eru`, sharded arrays that
are read straight into a mesh; `diffusers`, the folders of a snapshot; `original`, the files of the
model's authors; `comfyui`, one checkpoint. Text encoders, tokenisers and the like come along.
"""

from absl import flags

from eru_jax import commands

_FAMILY = flags.DEFINE_string('family', None, 'Model family, such as flux.')
_SOURCE = flags.DEFINE_string('source', None, 'Model directory or .safetensors file.')
_OUTPUT = flags.DEFINE_string('output', None, 'Directory to write; must not be there yet.')
_TO = flags.DEFINE_string('to', 'eru', 'Layout: eru, diffusers, original or comfyui.')
_INT8 = flags.DEFINE_bool(
  'int8',
  False,
  "Round the kernels of the backbone's blocks to int8, for --to=eru; they can only stay frozen.",
)
_DTYPE = flags.DEFINE_string(
  'dtype', None, 'float32, bfloat16 or float16; by default every tensor stays as it is.'
)
flags.mark_flags_as_required(['family', 'source', 'output'])


def main() -> None:
  from eru_jax.weights.conversion import ConversionRequest, convert

  request = ConversionRequest(
    family=_FAMILY.value,
    source=_SOURCE.value,
    output=_OUTPUT.value,
    to=_TO.value,
    int8=_INT8.value,
    dtype=_DTYPE.value,
  )
  for line in convert(request):
    print(line)
  print(f'Written: {_OUTPUT.value}')


if __name__ == '__main__':
  commands.run(main)
