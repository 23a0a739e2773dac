"""What the comparisons with diffusers share: floating-point operations, errors, times."""

import contextlib
import pathlib
import platform
import signal


def flops(cfg, batch, image_tokens, text_tokens):
  """Floating-point operations of the forward pass's matrix products, two a multiply-add."""
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


def full_flops(cfg, batch, image_tokens, text_tokens):
  """Operations of a training step of all parameters; what is computed again does not count."""
  return 3 * flops(cfg, batch, image_tokens, text_tokens)


def adapter_flops(cfg, batch, image_tokens, text_tokens, rank):
  """Operations of the forward pass of adapters on every linear layer of the blocks."""
  tokens = image_tokens + text_tokens
  # In and out, in widths: projections 4 x 2 and feed-forward 5 + 5; modulations (1 + 6) twice.
  double = 18 * tokens + 14
  # Projections 3 x 2, proj_mlp 1 + 4, proj_out 5 + 1; modulation 1 + 3.
  single = 17 * tokens + 4
  return 2 * batch * rank * cfg.width * (cfg.num_layers * double + cfg.num_single_layers * single)


def lora_flops(cfg, batch, image_tokens, text_tokens, rank):
  """Operations of a training step of such adapters on a frozen backbone."""
  blocks, tokens = cfg.num_layers + cfg.num_single_layers, image_tokens + text_tokens
  attention = 4 * batch * blocks * tokens**2 * cfg.width
  adapters = adapter_flops(cfg, batch, image_tokens, text_tokens, rank)
  return 2 * flops(cfg, batch, image_tokens, text_tokens) + attention + 3 * adapters


def relative_error(ours, theirs):
  import numpy as np

  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@contextlib.contextmanager
def time_limit(seconds):
  """Raises TimeoutError inside if it takes longer."""

  def expire(signum, frame):
    del signum, frame
    raise TimeoutError(f'not ready after {seconds} s')

  previous = signal.signal(signal.SIGALRM, expire)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def processor():
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  return platform.processor()
