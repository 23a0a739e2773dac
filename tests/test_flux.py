"""The FLUX backbone against diffusers' FluxTransformer2DModel on random weights."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from eru_jax.errors import UserError
from eru_jax.models import flux, layers
from eru_jax.types import Conditioning
from eru_jax.weights import flux as flux_table
from eru_jax.weights import table

TOLERANCE = 1e-5
SMALL = dict(
  in_channels=8,
  num_layers=2,
  num_single_layers=3,
  attention_head_dim=16,
  num_attention_heads=2,
  joint_attention_dim=12,
  pooled_projection_dim=10,
  axes_dims_rope=(4, 6, 6),
)
# Published FLUX.1-dev, counted on diffusers' model.
DEV_PARAMETERS = 11_901_408_320


def _config(guidance=False):
  return flux.FluxConfig(**SMALL, guidance_embeds=guidance)


def _distance(ours, reference):
  ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
  assert ours.shape == reference.shape
  return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def _inputs(batch=2, length=5, grid=(3, 4), seed=0):
  """x_t, t, conditioning, ids, guidance, and the direction that makes the output a scalar."""
  rng = np.random.default_rng(seed)
  tokens = grid[0] * grid[1]

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  conditioning = Conditioning(
    tokens=normal(batch, length, SMALL['joint_attention_dim']),
    mask=None,
    pooled=normal(batch, SMALL['pooled_projection_dim']),
  )
  t = rng.uniform(0.05, 0.95, batch).astype(np.float32)
  # Up to 1: beyond, the last bit of a frequency is seen, see the test of the deployed guidance.
  guidance = rng.uniform(0.1, 1, batch).astype(np.float32)
  x, direction = (normal(batch, tokens, SMALL['in_channels']) for _ in range(2))
  return x, t, conditioning, flux.image_ids(*grid), guidance, direction


def _sinusoids(t):
  """diffusers' embedding of times, with frequencies that are rounded correctly.

  torch's exp, which makes them, differs by an ulp between processors. At 1000 t that is seen in the
  fifth digit of gradients, and parity would depend on the processor; `test_sinusoids` has torch's.
  """
  torch = pytest.importorskip('torch')
  exponents = -math.log(10000) * np.arange(128, dtype=np.float32) / 128
  frequencies = torch.from_numpy(np.exp(exponents.astype(np.float64)).astype(np.float32))
  angles = t[:, None].float() * frequencies
  return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


@functools.cache
def _reference(guidance):
  """diffusers' model with random parameters, no two blocks alike."""
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  torch.set_num_threads(1)
  model = diffusers.FluxTransformer2DModel(**SMALL, patch_size=1, guidance_embeds=guidance)
  model.time_text_embed.time_proj.forward = _sinusoids
  generator = torch.Generator().manual_seed(int(guidance))
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim == 2:
        parameter.copy_(noise / math.sqrt(parameter.shape[1]))
      else:
        # Norm scales start at one, biases at zero; here neither does.
        parameter.copy_(parameter.mean().round() + 0.3 * noise)
  return model


def _params(guidance):
  cfg = _config(guidance)
  tensors = {name: value.numpy() for name, value in _reference(guidance).state_dict().items()}
  return table.to_flax(tensors, flux_table.rows(cfg), flux_table.counts(cfg))


@functools.cache
def _random_params(guidance=False):
  """Non-trivial parameters without torch, and without compiling an initialiser."""
  rng = np.random.default_rng(0)
  model = flux.FluxTransformer(_config(guidance))
  shapes = nn.unbox(jax.eval_shape(functools.partial(_init, model), jax.random.key(0)))

  def draw(path, leaf):
    values = rng.standard_normal(leaf.shape).astype(np.float32)
    if path[-1].key == 'kernel':
      return values * leaf.shape[-2] ** -0.5
    return (path[-1].key == 'scale') + 0.2 * values

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _init(model, key):
  cfg = model.config
  conditioning = Conditioning(
    tokens=jnp.zeros((1, 2, cfg.joint_attention_dim)),
    mask=None,
    pooled=jnp.zeros((1, cfg.pooled_projection_dim)),
  )
  x, t = jnp.zeros((1, 2, cfg.in_channels)), jnp.zeros(1)
  return model.init(key, x, t, conditioning, flux.image_ids(1, 2), t)['params']


def _apply(params, inputs, **options):
  x, t, conditioning, ids, guidance, _ = inputs
  model = flux.FluxTransformer(_config('guidance_embedder' in params['time_text_embed']), **options)
  return jax.jit(model.apply)({'params': params}, x, t, conditioning, ids, guidance)


CASES = [
  # guidance, batch, text length, grid, module options
  (False, 2, 5, (3, 4), {}),
  (True, 2, 5, (3, 4), {}),
  (True, 1, 1, (2, 7), {}),
  (True, 2, 4, (2, 3), {'remat': 'full'}),
  (False, 2, 4, (2, 3), {'remat': 'attn'}),
  (False, 3, 8, (5, 1), {'remat': 'names', 'scan': False}),
]


def _against_diffusers(guidance, inputs, options):
  """Relative distances of the outputs, and of the gradients by name, with the same weights."""
  reference, cfg = _reference(guidance), _config(guidance)
  torch = pytest.importorskip('torch')
  x, t, conditioning, ids, scale, direction = inputs

  def tensor(value):
    return torch.from_numpy(np.array(value)).requires_grad_()

  theirs = [tensor(x), tensor(conditioning.tokens), tensor(conditioning.pooled)]
  reference.zero_grad()
  output = reference(
    hidden_states=theirs[0],
    encoder_hidden_states=theirs[1],
    pooled_projections=theirs[2],
    timestep=torch.from_numpy(t),
    img_ids=torch.from_numpy(ids).float(),
    txt_ids=torch.zeros(conditioning.tokens.shape[1], 3),
    guidance=torch.from_numpy(scale) if guidance else None,
  ).sample
  (output * torch.from_numpy(direction)).mean().backward()

  model = flux.FluxTransformer(cfg, **options)

  def loss(params, x, tokens, pooled):
    text = Conditioning(tokens=tokens, mask=None, pooled=pooled)
    velocity = model.apply({'params': params}, x, t, text, ids, scale)
    return jnp.mean(velocity * direction), velocity

  grad_fn = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
  grads, velocity = grad_fn(_params(guidance), x, conditioning.tokens, conditioning.pooled)
  ours = table.to_torch(grads[0], flux_table.rows(cfg), flux_table.counts(cfg))
  expected = {name: p.grad.numpy() for name, p in reference.named_parameters()}
  assert set(ours) == set(expected)
  distances = {name: _distance(ours[name], expected[name]) for name in expected}
  for name, value, wanted in zip(('x', 'tokens', 'pooled'), grads[1:], theirs, strict=True):
    distances[name] = _distance(value, wanted.grad.numpy())
  return _distance(velocity, output.detach().numpy()), distances


@pytest.mark.parametrize('guidance,batch,length,grid,options', CASES)
def test_forward_and_all_gradients_equal_diffusers(guidance, batch, length, grid, options):
  inputs = _inputs(batch, length, grid, seed=batch + length)
  output, gradients = _against_diffusers(guidance, inputs, options)
  assert output <= TOLERANCE
  worst = max(gradients, key=gradients.get)
  assert gradients[worst] <= TOLERANCE, (worst, gradients[worst])


def test_parity_at_the_deployed_guidance_scale():
  inputs, other = list(_inputs()), list(_inputs())
  inputs[4], other[4] = np.float32([3.5, 3.5]), np.float32([4, 4])
  output, gradients = _against_diffusers(True, inputs, {})
  assert output <= TOLERANCE
  worst = max(gradients, key=gradients.get)
  assert gradients[worst] <= TOLERANCE, (worst, gradients[worst])
  # The scale does matter.
  params = _params(True)
  assert _distance(_apply(params, other), _apply(params, inputs)) > 1e-2


def test_sinusoids():
  """Ours are those of `_sinusoids`, and diffusers' but for the last bit of 128 frequencies."""
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  times = np.float32([0, 1e-3, 250, 999.5, 1000, 3500])
  ours = layers.sinusoidal_embedding(jnp.asarray(times), 256)
  assert _distance(ours, _sinusoids(torch.from_numpy(times)).numpy()) <= 1e-6
  theirs = diffusers.models.embeddings.Timesteps(256, True, 0)(torch.from_numpy(times))
  ulp = 3500 * 2.0**-24
  assert np.abs(ours - theirs.numpy()).max() <= 2 * ulp


def test_table_round_trip_is_exact():
  cfg = _config(True)
  tensors = {name: value.numpy() for name, value in _reference(True).state_dict().items()}
  back = table.to_torch(_params(True), flux_table.rows(cfg), flux_table.counts(cfg))
  assert set(back) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(back[name], value)


def test_published_architecture_by_shape():
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  cfg = flux.FluxConfig()
  with torch.device('meta'):
    reference = diffusers.FluxTransformer2DModel.from_config(cfg.to_dict())
  theirs = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
  model = flux.FluxTransformer(cfg, dtype=jnp.bfloat16)
  shapes = jax.eval_shape(lambda: nn.unbox(_init(model, jax.random.key(0))))
  ours = {k: v.shape for k, v in traverse_util.flatten_dict(shapes, sep='/').items()}
  assert sum(math.prod(shape) for shape in theirs.values()) == DEV_PARAMETERS
  assert sum(math.prod(shape) for shape in ours.values()) == DEV_PARAMETERS

  counts, seen = flux_table.counts(cfg), set()
  for row in flux_table.rows(cfg):
    lead = tuple(n for key, n in counts.items() if '{' + key + '}' in row.torch)
    names = {row.torch.format(i=index, j=index) for index in range(*lead or (1,))}
    seen |= names
    (shape,) = {theirs[name] for name in names}
    assert ours.pop(row.flax) == lead + (shape[::-1] if row.op == 'linear' else shape), row
  assert seen == set(theirs)
  assert not ours


def test_config_survives_json_and_refuses_what_it_cannot_do():
  cfg = _config(True)
  assert flux.FluxConfig.from_dict(cfg.to_dict()) == cfg
  with pytest.raises(UserError, match='patch_size'):
    flux.FluxConfig.from_dict({**cfg.to_dict(), 'patch_size': 2})
  with pytest.raises(UserError, match='axes_dims_rope .* must sum to attention_head_dim'):
    flux.FluxConfig.from_dict({**cfg.to_dict(), 'axes_dims_rope': [4, 4, 4]})
  # All of these sum to the head's 16 channels.
  for dims in ([8, 8], [4, 4, 4, 4], [3, 6, 7], [0, 8, 8], [-4, 10, 10], [2, 4, '10'], 16, None):
    with pytest.raises(UserError, match='axes_dims_rope is .* three positive even integers'):
      flux.FluxConfig.from_dict({**cfg.to_dict(), 'axes_dims_rope': dims})
  for value in (1, None, 'false'):
    with pytest.raises(UserError, match='guidance_embeds is .* must be true or false'):
      flux.FluxConfig.from_dict({**cfg.to_dict(), 'guidance_embeds': value})


def test_image_ids_are_row_major():
  ids = flux.image_ids(2, 3)
  assert ids.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


def test_missing_inputs_and_unknown_options_are_user_errors():
  inputs = list(_inputs())
  params = _random_params(True)
  without = [*inputs[:2], inputs[2].replace(pooled=None), *inputs[3:]]
  with pytest.raises(UserError, match='pooled'):
    _apply(params, without)
  without = [*inputs[:4], None, inputs[5]]
  with pytest.raises(UserError, match='guidance'):
    _apply(params, without)
  with pytest.raises(UserError, match='remat'):
    _apply(params, inputs, remat='sometimes')
  with pytest.raises(UserError, match='attention'):
    _apply(params, inputs, attention='magic')


def test_masked_text_changes_nothing():
  params = _random_params()
  x, *rest, direction = _inputs(length=4)
  t, text, ids, guidance = rest
  expected = _apply(params, (x, t, text, ids, guidance, direction))
  noise = np.random.default_rng(9).standard_normal((2, 3, text.tokens.shape[-1]))
  padded = Conditioning(
    tokens=np.concatenate([text.tokens, 50 * noise.astype(np.float32)], axis=1),
    mask=np.arange(7)[None].repeat(2, 0) < 4,
    pooled=text.pooled,
  )
  found = _apply(params, (x, t, padded, ids, guidance, direction))
  assert _distance(found, expected) <= TOLERANCE
  # Unmasked, the same tokens matter.
  seen = _apply(params, (x, t, padded.replace(mask=None), ids, guidance, direction))
  assert _distance(seen, expected) > 1e-2


@pytest.mark.parametrize('scan', [True, False])
def test_taps_read_and_override_activations(scan):
  params, cfg = _random_params(), _config()
  model = flux.FluxTransformer(cfg, scan=scan)

  # Not under jit, every operation would be compiled by itself.
  apply = jax.jit(functools.partial(model.apply, mutable=['intermediates']))

  def run(inputs, overrides=None):
    variables = {'params': params} | ({} if overrides is None else {'overrides': overrides})
    output, state = apply(variables, *inputs[:-1])
    return output, state['intermediates']

  first, other = _inputs(seed=1), _inputs(seed=2)
  # Both share what modulates the last layer, so that the joint sequence decides the output.
  shared = other[2].replace(pooled=first[2].pooled)
  other = (other[0], first[1], shared, *other[3:])
  output, _ = run(first)
  wanted, recorded = run(other)
  shapes = jax.tree.map(jnp.shape, recorded, is_leaf=lambda x: hasattr(x, 'shape'))
  assert shapes == {
    'transformer_blocks': {'image': (2, 2, 12, 32), 'text': (2, 2, 5, 32)},
    'single_transformer_blocks': {'joint': (3, 2, 17, 32)},
  }
  assert _distance(output, wanted) > 1e-2
  for name in ('transformer_blocks', 'single_transformer_blocks'):
    replaced, _ = run(first, {name: recorded[name]})
    assert _distance(replaced, wanted) <= TOLERANCE


def test_bfloat16_stays_close_and_returns_bfloat16():
  params, inputs = _random_params(True), _inputs()
  found = _apply(params, inputs, dtype=jnp.bfloat16)
  assert found.dtype == jnp.bfloat16
  assert _distance(found.astype(jnp.float32), _apply(params, inputs)) <= 0.1
