"""A whole experiment, told from config to report."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import sys
import time
from typing import Any

import jax

from eru_jax import sharding
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError
from eru_jax.files import cache_directory, replace_file
from eru_jax.models import lora
from eru_jax.training import config as config_lib
from eru_jax.training import experiment as experiment_lib
from eru_jax.training import workdir as workdir_lib
from eru_jax.training.diagnosis import diagnose, pairs_to_compare
from eru_jax.training.evaluation import Evaluation, evaluate, judge_of
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.gallery import gallery_rows, save_grids
from eru_jax.training.loop import run_stage
from eru_jax.training.metrics import MetricWriter, read_metrics
from eru_jax.training.report import ReportData, write_report
from eru_jax.training.stages import PRETRAINING, STAGES, evaluated_as, no_rl
from eru_jax.weights import model_directory
from eru_jax.weights.conversion import carry_over
from eru_jax.weights.lora_io import export_lora

_NOTES = {
  'emoji': (
    'The judge compares with blurred pictures and errs on some drawings that are half right: '
    'docs/benchmarks.md has its error rates.',
    'Pictures: Twemoji, graphics by Twitter, Inc. and other contributors, CC-BY 4.0.',
  ),
  'prompts': (
    'No judge looked at these pictures: how far they are from the anchors’ says how much of what '
    'was to be learnt has been, not whether it is right.',
  ),
}


def train(config_values: Any, workdir: str) -> None:
  """Runs, or continues, the experiment of a config in a workdir.

  Raises:
    UserError: for whatever the user can mend.
  """
  began = time.monotonic()
  config = config_lib.from_mapping(config_lib.ExperimentConfig, config_values)
  config = experiment_lib.resolve(config)
  directory = pathlib.Path(workdir).expanduser().absolute()
  workdir_lib.claim(directory, config_lib.to_json(config))
  summary_path = directory / 'summary.json'
  if summary_path.is_file():
    print(f'This run is finished: {directory / "report.html"}')
    return

  seconds = _Stopwatch(directory / 'seconds.json')
  enable_compilation_cache()
  mesh = sharding.make_mesh(config.mesh)
  print_plan(config, mesh)
  if 'no_rl' in config.stages:
    no_rl.check_reward(config.no_rl)

  with seconds('load'):
    experiment, snapshot = experiment_lib.open_experiment(config, mesh)
  judge = judge_of(experiment)
  evaluations: dict[str, Evaluation] = {}
  snapshots: dict[str, Snapshot] = {}

  def measure(label: str, snapshot: Snapshot) -> None:
    found = workdir_lib.load_evaluation(directory, label)
    if found is None:
      with seconds(f'evaluate {label}'):
        found = evaluate(experiment, snapshot, judge, evaluations.get('base'))
      workdir_lib.save_evaluation(directory, label, found)
    evaluations[label], snapshots[label] = found, snapshot
    print(f'{label:>10}: ' + describe(found.scores), flush=True)

  with MetricWriter(directory, config.wandb_project or None) as writer, sharding.use_mesh(mesh):
    if config.model.source != 'scratch':
      measure('base', dataclasses.replace(snapshot, trainable=None))
    if snapshot.trainable is not None:
      measure('adapter', snapshot)
    for name in config.stages:
      module = STAGES[name]
      stage_config = config.stage(name)
      with seconds(name):
        stage = module.build(experiment, snapshot, stage_config)
        key = experiment.key(f'stage {name}')
        params = run_stage(name, stage, stage_config, key, mesh, directory, writer, config.stages)
        snapshot = module.absorb(experiment, snapshot, params)
        export_adapter(directory / 'adapters', name, snapshot)
      label = evaluated_as(name, config.model.source)
      if label:
        measure(label, snapshot)
    if set(config.stages) & set(PRETRAINING) and not _trains_adapters(config):
      save_model(directory / 'model', experiment.config, snapshot)
    diagnosis = None
    groups = _pairs_to_compare(experiment) if snapshots else {}
    if groups:
      with seconds('knowledge structure'):
        seed = config.evaluation.seed
        diagnosis = diagnose(experiment, snapshots.items(), groups, seed=seed, judge=judge)
      values = json.dumps(diagnosis.to_json(), indent=1) + '\n'
      replace_file(directory / 'diagnosis.json', values.encode())

  summary = {
    'stages': {label: found.scores for label, found in evaluations.items()},
    'seconds': {**seconds.total, 'this start': time.monotonic() - began},
    'peak_memory_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT / 1e9,
    'versions': versions(),
  }
  rows = gallery_rows(experiment, evaluations)
  save_grids(directory / 'samples', rows)
  report = write_report(
    directory,
    ReportData(
      config.title,
      summary,
      rows,
      read_metrics(directory / 'metrics.jsonl'),
      json.dumps(config_lib.to_json(config), indent=2),
      _NOTES[config.data.world],
      diagnosis,
    ),
  )
  replace_file(summary_path, (json.dumps(summary, indent=2) + '\n').encode())
  print(f'Report: {report}')


def _trains_adapters(config: config_lib.ExperimentConfig) -> bool:
  """Whether the backbone stays as it was; pretraining in the emoji world takes no adapters."""
  return config.data.world == 'prompts' and bool(config.lora or config.adapter)


def _pairs_to_compare(experiment: Experiment) -> dict[str, list[KnowledgePair]]:
  """What the diagnosis is made of; nothing if it is not wanted, or one anchor is all there is."""
  limit = experiment.config.evaluation.diagnosis
  splits = {name: table.pairs for name, table in experiment.world.splits.items()}
  groups = pairs_to_compare(splits, limit) if limit else {}
  anchors = {pair.explicit for group in groups.values() for pair in group}
  return groups if len(anchors) > 1 else {}


def save_model(
  directory: pathlib.Path, config: config_lib.ExperimentConfig, snapshot: Snapshot
) -> None:
  """Writes a pretrained model, with the text encoders and tokenisers of the one it came from."""
  if config.model.text_encoder == 'flux':
    carry_over(config_lib.model_path(config.model.source), directory)
  model_directory.save(directory, stored_model(config, snapshot))


def stored_model(
  config: config_lib.ExperimentConfig, snapshot: Snapshot
) -> model_directory.StoredModel:
  """What a pretraining run hands on as a model directory."""
  settings = {
    'text_encoder': config.model.text_encoder,
    'text_length': config.model.text_length,
    'resolution': config.model.resolution,
    'sampling': dataclasses.asdict(config.sampling),
  }
  return model_directory.StoredModel(
    snapshot.model.family,
    snapshot.model.backbone.config,
    jax.device_get(snapshot.backbone),
    snapshot.model.autoencoder.config,
    jax.device_get(snapshot.autoencoder),
    settings,
    None if snapshot.reward is None else jax.device_get(snapshot.reward),
  )


def export_adapter(directory: pathlib.Path, name: str, snapshot: Snapshot) -> None:
  """Writes a trained adapter as diffusers and as ComfyUI read it, if it is not all zero."""
  model = snapshot.model
  if snapshot.trainable is None or not model.lora:
    return
  adapter = jax.device_get(snapshot.trainable)
  if not lora.is_zero(adapter):
    for form, suffix in (('diffusers', ''), ('kohya', '_kohya')):
      path = directory / f'{name}{suffix}.safetensors'
      export_lora(path, adapter, model.lora, model.backbone.config, form)


def describe(scores: dict[str, Any]) -> str:
  """One line of an evaluation: every split's accuracy or distance, and the drift."""
  parts = []
  for split, value in scores.items():
    if isinstance(value, dict) and 'accuracy' in value:
      parts.append(f'{split} {100 * value["accuracy"]:.1f} %')
    elif isinstance(value, dict):
      parts.append(f'{split} {value["anchor_distance"]:.3f} from its anchors')
  if 'unrelated_drift' in scores:
    parts.append(f'drift {scores["unrelated_drift"]:.3f}')
  return ', '.join(parts)


def print_plan(config: config_lib.ExperimentConfig, mesh: jax.sharding.Mesh) -> None:
  """Prints the batch arithmetic, which is what users of RL code misread most."""
  devices = mesh.devices.size
  share = mesh.shape['data'] * mesh.shape['fsdp']
  kind = mesh.devices.flat[0].device_kind
  print(f'{devices} device(s) of kind {kind}, mesh {dict(mesh.shape)}')
  for name in config.stages:
    stage = config.stage(name)
    if name == 'dk_dm':
      kept = stage.rollouts * stage.states_per_rollout
      sizes = {
        'teacher states': stage.teacher_batch,
        f'rollout states ({stage.rollouts} rollouts x {stage.states_per_rollout})': kept,
        'preservation states': stage.preservation_batch,
      }
    elif name == 'no_rl':
      images = stage.prompts_per_step * stage.images_per_prompt
      states = images * stage.timesteps_per_image
      updates = stage.updates_per_step
      sizes = {
        f'rollouts ({stage.prompts_per_step} prompts x {stage.images_per_prompt} images)': images,
        f'states ({stage.timesteps_per_image} timesteps each) in {updates} updates': states,
      }
    else:
      sizes = {'examples': stage.batch_size}
    text = ' + '.join(f'{size} {what}' for what, size in sizes.items())
    print(f'{name}: {stage.num_steps} steps of {text}, accumulation {stage.accumulation}')
    for what, size in sizes.items():
      if size % (share * stage.accumulation):
        raise UserError(
          f'{name}: {size} {what} cannot be split over {share} devices (data x fsdp) x '
          f'{stage.accumulation} accumulation steps: choose a multiple.'
        )
  sys.stdout.flush()


def enable_compilation_cache() -> None:
  """Compiled programs outlive the process: a second start compiles (almost) nothing."""
  directory = cache_directory() / 'xla'
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def versions() -> dict[str, str]:
  names = ('eru_jax', 'jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  found = {'python': platform.python_version()}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {**found, 'device': jax.devices()[0].device_kind, 'cores': str(os.cpu_count())}


# getrusage counts in kilobytes on Linux, in bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == 'darwin' else 1024


class _Stopwatch:
  """Seconds by phase, over all starts of a run."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      self.total = json.loads(path.read_text())
    except (OSError, ValueError):
      self.total = {}

  def __call__(self, phase: str) -> '_Stopwatch':
    self._phase, self._began = phase, time.monotonic()
    return self

  def __enter__(self) -> None:
    return None

  def __exit__(self, failure: type[BaseException] | None, *unused) -> None:
    spent = time.monotonic() - self._began
    self.total[self._phase] = self.total.get(self._phase, 0.0) + spent
    # On a full disk, what failed before says more than that this fails too.
    with contextlib.suppress(*([UserError] if failure else [])):
      replace_file(self._path, json.dumps(self.total).encode())
