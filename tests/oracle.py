"""What the parity tests share: random oracles, errors relative to them."""

import numpy as np


def relative_error(ours, reference) -> float:
  """Relative L2 error, in float64."""
  ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
  assert ours.shape == reference.shape, (ours.shape, reference.shape)
  return float(np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-30))


def randomise(module, seed: int = 0):
  """Gives every parameter of a torch module values that would betray a swapped tensor."""
  import torch

  torch.set_num_threads(1)
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        fan_in = parameter[0].numel()
        parameter.copy_(noise * fan_in**-0.5)
      else:
        offset = 1.0 if name.endswith('weight') else 0.0
        parameter.copy_(offset + 0.2 * noise)
  return module.eval()


def tensors(module) -> dict[str, np.ndarray]:
  """A torch module's state as numpy arrays."""
  return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def gradients(module) -> dict[str, np.ndarray]:
  """The gradients of its parameters, after a backward pass."""
  return {name: p.grad.detach().numpy() for name, p in module.named_parameters()}
