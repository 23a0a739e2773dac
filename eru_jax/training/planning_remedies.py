"""What to change where a program does not fit, as flags that the same config takes."""

from jax.sharding import Mesh

from eru_jax import sharding
from eru_jax.training.config import ExperimentConfig
from eru_jax.training.stage_config import StageConfig

_SMALLER = 512


def remedies(name: str, config: ExperimentConfig, mesh: Mesh) -> list[str]:
  """Flags that make a program smaller, what costs least first.

  Args:
    name: the program's, '<phase>.<what>'.
    config: the experiment, before it was settled for the mesh.
    mesh: what the program is compiled for.
  """
  phase, _, what = name.partition('.')
  found = []
  if phase in config.stages:
    found += _of_stage(phase, what, config, mesh)
  if what in ('sample_and_decode', 'teacher_pictures'):
    found += _fewer_pictures(config, sharding.batch_share(mesh))
  if phase == 'prompts':
    return [*found, *_more_devices(config, mesh, split_pictures=False)]
  if config.lora and config.model.params != 'int8':
    found.append("--config.model.params=int8 (a byte a frozen weight of the backbone's blocks)")
  if config.model.resolution and config.model.resolution > _SMALLER:
    found.append(f'--config.model.resolution={_SMALLER}')
  return [*found, *_more_devices(config, mesh, split_pictures=True)]


def _of_stage(phase: str, what: str, config: ExperimentConfig, mesh: Mesh) -> list[str]:
  stage, found = config.stage(phase), []
  if what == 'train_step':
    if config.model.remat != 'full':
      found.append('--config.model.remat=full (recomputes blocks in the backward pass)')
    found += _smaller_microbatches(phase, stage, sharding.batch_share(mesh))
    if phase == 'dk_dm' and not stage.in_turn:
      found.append('--config.dk_dm.in_turn=true (one kind of states at a time)')
    if not config.lora and stage.optimizer.moments == 'float32':
      found.append(f'--config.{phase}.optimizer.moments=bfloat16')
    if config.lora and max(rule.rank for rule in config.lora) > 16:
      found.append('--config.lora.0.rank=16 (a smaller adapter)')
  elif phase == 'no_rl' and what == 'rollout_and_reward':
    share = sharding.batch_share(mesh)
    at_once = stage.on(share).rollout_batch or stage.prompts_per_step * stage.images_per_prompt
    if at_once > share and at_once % (2 * share) == 0:
      found.append(f'--config.{phase}.rollout_batch={at_once // 2}')
  return found


def _smaller_microbatches(phase: str, stage: StageConfig, share: int) -> list[str]:
  """Half as many examples a device at a time, if it sees more than one."""
  if stage.per_device > 1:
    return [f'--config.{phase}.per_device={stage.per_device // 2} (smaller microbatches)']
  if stage.per_device:
    return []
  twice = 2 * stage.accumulation
  # Of every kind, all devices need examples in each microbatch.
  if any(size % (twice * share) for size in stage.kinds.values()):
    return []
  return [f'--config.{phase}.accumulation={twice} (smaller microbatches)']


def _fewer_pictures(config: ExperimentConfig, share: int) -> list[str]:
  size = config.evaluation.batch_size
  return [f'--config.evaluation.batch_size={max(share, size // 2)}'] if size > share else []


def _more_devices(config: ExperimentConfig, mesh: Mesh, split_pictures: bool) -> list[str]:
  found, wanted = [], config.mesh
  # Where `fsdp` takes what is left, it gives up one half.
  if split_pictures and wanted.fsdp == -1 and mesh.shape['fsdp'] % 2 == 0:
    twice = 2 * mesh.shape['sequence']
    found.append(f'--config.mesh.sequence={twice} (splits pictures over devices)')
  if mesh.devices.size > 1 and wanted.fsdp != -1 and wanted.data != -1:
    found.append('--config.mesh.fsdp=-1 (splits parameters over all devices)')
  return [*found, 'a larger slice']
