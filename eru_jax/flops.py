"""Floating-point operations by formula: matrix products and convolutions, two a multiply-add.

`cost_analysis` of a compiled program counts the body of a loop once, and with it one block of 57.
"""

import math
from typing import Any

# How training's operations follow from the forward pass's; printed beside every figure.
FORMULAS = {
  'forward': (
    '2 B [N (12 W^2 T + 2 T^2 W) + (12 D + 3 S + 2) W^2 + embedders + ends]: B pictures, N = D + S '
    'blocks (double, single), width W, T image and text tokens'
  ),
  'full': '3 x forward: once more for the gradient of each factor of a product',
  'lora': (
    '2 x forward + attention + 3 x adapters: frozen weights take no gradient, both factors of '
    "attention's products, 4 B N T^2 W, do; adapters are 2 B r (in + out) a token of each layer"
  ),
}


def flops(cfg: Any, batch: int, image_tokens: int, text_tokens: int) -> int:
  """Operations of FLUX.1's forward pass; `cfg` is a FluxConfig."""
  width, tokens = cfg.width, image_tokens + text_tokens
  embedders = (256 + width) * width + (cfg.pooled_projection_dim + width) * width
  if cfg.guidance_embeds:
    embedders += (256 + width) * width
  # Per token: projections 3 + 1, feed-forward 4 + 4; a single block fuses its two last ones.
  block = 12 * width**2 * tokens + 2 * tokens**2 * width
  modulations = (12 * cfg.num_layers + 3 * cfg.num_single_layers + 2) * width**2
  ends = 2 * image_tokens * cfg.in_channels * width + text_tokens * cfg.joint_attention_dim * width
  blocks = (cfg.num_layers + cfg.num_single_layers) * block
  return 2 * batch * (blocks + modulations + embedders + ends)


def full_flops(cfg: Any, batch: int, image_tokens: int, text_tokens: int) -> int:
  """Operations of a training step of all parameters; what is computed again does not count."""
  return 3 * flops(cfg, batch, image_tokens, text_tokens)


def adapter_flops(cfg: Any, batch: int, image_tokens: int, text_tokens: int, rank: int) -> int:
  """Operations of the forward pass of adapters on every linear layer of the blocks."""
  tokens = image_tokens + text_tokens
  # In and out, in widths: projections 4 x 2 and feed-forward 5 + 5; modulations (1 + 6) twice.
  double = 18 * tokens + 14
  # Projections 3 x 2, proj_mlp 1 + 4, proj_out 5 + 1; modulation 1 + 3.
  single = 17 * tokens + 4
  return 2 * batch * rank * cfg.width * (cfg.num_layers * double + cfg.num_single_layers * single)


def lora_flops(cfg: Any, batch: int, image_tokens: int, text_tokens: int, rank: int) -> int:
  """Operations of a training step of such adapters on a frozen backbone."""
  blocks, tokens = cfg.num_layers + cfg.num_single_layers, image_tokens + text_tokens
  attention = 4 * batch * blocks * tokens**2 * cfg.width
  adapters = adapter_flops(cfg, batch, image_tokens, text_tokens, rank)
  return 2 * flops(cfg, batch, image_tokens, text_tokens) + attention + 3 * adapters


def traced_flops(jaxpr: Any) -> int:
  """Operations of a traced program: every product and convolution, times the loops around it.

  Of a `cond` the dearer branch counts, of a `while` one turn. What is computed again in the
  backward pass counts again: trace a model without rematerialisation to know what is needed.

  Args:
    jaxpr: of `jax.jit(...).trace(...)` or `jax.make_jaxpr`.
  """
  total = 0
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = parameters['dimension_numbers']
      shape = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    elif name == 'conv_general_dilated':
      kernel, numbers = equation.invars[1].aval.shape, parameters['dimension_numbers']
      total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    elif name == 'cond':
      total += max(traced_flops(branch) for branch in parameters['branches'])
    else:
      inner = sum(traced_flops(part) for part in _inner(parameters))
      total += inner * parameters['length'] if name == 'scan' else inner
  return total


def _inner(parameters: dict[str, Any]) -> list[Any]:
  """The programs an equation holds."""
  # A function with a gradient of its own holds that, too, as functions and not as programs.
  values = [value for key, value in parameters.items() if key != 'cond_jaxpr']
  return [value for value in values if hasattr(getattr(value, 'jaxpr', value), 'eqns')]
