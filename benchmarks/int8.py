"""What does rounding the frozen kernels to int8 cost? On the base of the emoji world.

    python benchmarks/int8.py

Compares the base read in float32 with the same base rounded to int8 on the way: the relative L2
error of the velocity at several noise levels and of the latents after Euler steps, under real
prompts, each from the same noise. Then with fewer kernels rounded, to see which matter.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

_PROMPTS = flags.DEFINE_integer('prompts', 32, 'Names of emoji to draw.')
_STEPS = flags.DEFINE_multi_integer('steps', [4, 8, 16], 'Euler steps.')
_PATTERNS = {
  'all kernels': '',
  'blocks only': 'blocks/',
  'all but adaLN': r'^(?!.*norm)',
}


def main(argv):
  del argv
  from eru_jax import flow
  from eru_jax.training.config import ModelConfig, model_path
  from eru_jax.training.restore import open_model
  from eru_jax.training.run import versions
  from eru_jax.weights import model_directory

  experiment, base, _ = open_model('emoji_base', [])
  names = experiment.world.pictures.names[:: len(experiment.world.pictures.names) // _PROMPTS.value]
  names = list(names[: _PROMPTS.value])
  conditioning = experiment.conditioning(names)
  path = model_path(ModelConfig().source)
  whole, model = model_directory.load(path), base.model
  noise = jax.random.normal(jax.random.key(0), (len(names), *model.latent_shape))

  @jax.jit
  def velocity(params, x, t):
    return model.velocity(params)(x, jnp.full(len(names), t), conditioning)

  def draw(params, steps):
    schedule = flow.timestep_schedule(steps)
    return jax.jit(lambda p: model.sample(model.velocity(p), noise, conditioning, schedule))(params)

  def error(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

  results = {}
  finals = {steps: draw(whole.backbone, steps) for steps in _STEPS.value}
  # Points of the model's own path: its picture, noised.
  clean = finals[max(finals)]
  for name, pattern in _PATTERNS.items():
    params = model_directory.load(path, int8=pattern).backbone
    row = {'velocity': {}, 'latents': {}}
    for t in (0.1, 0.5, 0.9):
      x = (1 - t) * clean + t * noise
      row['velocity'][t] = error(velocity(params, x, t), velocity(whole.backbone, x, t))
    for steps, final in finals.items():
      drawn = draw(params, steps)
      row['latents'][steps] = error(drawn, final)
      if steps == max(finals):
        pictures = [np.asarray(model.decode(whole.autoencoder, z)) for z in (drawn, final)]
        row['rms of pixels'] = float(np.sqrt(np.mean((pictures[0] - pictures[1]) ** 2)))
    row['megabytes'] = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
    results[name] = row
    print(name, row)
  print(json.dumps({'prompts': len(names), 'versions': versions(), 'results': results}))


if __name__ == '__main__':
  app.run(main)
