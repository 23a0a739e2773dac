"""Opens what `sample` and `evaluate` are pointed at: a run's workdir or a model directory."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from eru_jax import distributed, sharding
from eru_jax.errors import UserError
from eru_jax.training import config as config_lib
from eru_jax.training import workdir as workdir_lib
from eru_jax.training.experiment import (
  Experiment,
  Snapshot,
  open_experiment,
  prepare_model,
  resolve,
)
from eru_jax.training.loop import load_result
from eru_jax.training.stages import STAGES, evaluated_as
from eru_jax.weights import model_directory

# Of a device's memory: backbones that take more are split over all devices.
_SHARE = 0.5


def read_config(model: str) -> tuple[config_lib.ExperimentConfig, pathlib.Path | None]:
  """The experiment behind `--model`, resolved, and its workdir if it is one.

  Args:
    model: a workdir, a model directory, or 'emoji_base'.

  Raises:
    UserError: if it is none of these.
  """
  if '://' in model:
    raise UserError(f'--model={model} is not on this machine: copy it to a directory first.')
  path = pathlib.Path(model).expanduser()
  if (path / 'config.json').is_file():
    try:
      values, _ = workdir_lib.read_config(path)
    except (OSError, ValueError) as error:
      raise UserError(
        f'{path / "config.json"} cannot be read ({error}): put back a copy of it.'
      ) from error
    config = config_lib.from_mapping(config_lib.ExperimentConfig, values)
    return resolve(config), path.absolute()
  named = model in config_lib.MODEL_NAMES and model != 'scratch'
  if not named and not model_directory.is_model(path):
    raise UserError(
      f'--model={model} is neither the workdir of a run (it would hold config.json) nor a model '
      'directory (it would hold eru_jax.json or model_index.json): check the path, download the '
      "model into it, or take what comes with the package, 'emoji_base' or 'tiny_flux'."
    )
  source = model if named else str(path)
  prepare_model(source)
  stored = model_directory.read_settings(config_lib.model_path(source))
  settings = config_lib.ModelConfig(source=source, scan=False)
  data, evaluation = config_lib.DataConfig(), config_lib.EvaluationConfig()
  if stored.get('text_encoder') == 'flux':
    # Large: compiled in a loop, and computed in what accelerators are made for.
    dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    settings = dataclasses.replace(settings, scan=True, dtype=dtype, params=dtype)
    data = config_lib.DataConfig(world='prompts', pairs='')
    evaluation = dataclasses.replace(evaluation, batch_size=1)
  sampling = config_lib.from_mapping(
    config_lib.SamplingConfig, stored.get('sampling', {}), 'sampling'
  )
  config = config_lib.ExperimentConfig(
    stages=('dk_dm',), model=settings, data=data, sampling=sampling, evaluation=evaluation
  )
  return resolve(config), None


def open_model(
  model: str, prompts: Sequence[str], mesh: str | None = None, /, **overrides: Any
) -> tuple[Experiment, Snapshot, pathlib.Path | None]:
  """The experiment with these prompts embedded, its base model, and its workdir.

  Args:
    model: as in `read_config`.
    prompts: prompts that will be drawn.
    mesh: as in `sharding.parse_mesh`; None copies a backbone that is small beside the memory of a
      device to all devices, and splits another one over them.
    **overrides: fields of ExperimentConfig to replace.

  Raises:
    UserError: as `read_config`, or for bad prompts or a mesh that is not there.
  """
  sizes = None if mesh is None else sharding.parse_mesh(mesh)
  with distributed.main_first():
    config, workdir = read_config(model)
  config = dataclasses.replace(config, **overrides)
  mesh_config = sizes or distributed.of_main(_mesh_for(config.model))
  config = dataclasses.replace(config, mesh=mesh_config)
  devices = sharding.make_mesh(config.mesh)
  experiment, snapshot = open_experiment(config, devices, prompts, any_size=True)
  return experiment, snapshot, workdir


def _mesh_for(settings: config_lib.ModelConfig) -> sharding.MeshConfig:
  """Where a model is drawn with if nobody says: whole on each device, or split over all."""
  # On a CPU, nobody says how much there is.
  memory = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  if jax.device_count() == 1 or memory is None or settings.source == 'scratch':
    return sharding.MeshConfig()
  count = model_directory.backbone_size(config_lib.model_path(settings.source))
  itemsize = 1 if settings.params == 'int8' else np.dtype(settings.params).itemsize
  if count * itemsize > _SHARE * memory:
    return sharding.MeshConfig(data=1, fsdp=-1)
  return sharding.MeshConfig()


def snapshots(
  experiment: Experiment, base: Snapshot, workdir: pathlib.Path | None
) -> Iterator[tuple[str, Snapshot]]:
  """(label, model) at every stage a run has reached, the base first."""
  config = experiment.config
  if config.model.source != 'scratch':
    yield 'base', dataclasses.replace(base, trainable=None)
  if base.trainable is not None:
    yield 'adapter', base
  snapshot = base
  for name in config.stages if workdir is not None else ():
    module, stage_config = STAGES[name], config.stage(name)
    stage = module.build(experiment, snapshot, stage_config)
    params = load_result(name, stage, stage_config, experiment.mesh, workdir)
    if params is None:
      return
    snapshot = module.absorb(experiment, snapshot, params)
    label = evaluated_as(name, config.model.source)
    if label:
      yield label, snapshot
