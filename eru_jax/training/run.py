"""A whole experiment, told from config to report."""

import collections
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
from collections.abc import Iterator
from typing import Any

import jax

from eru_jax import distributed, sharding
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError
from eru_jax.files import cache_directory, replace_file
from eru_jax.leaving import at_leave
from eru_jax.models import lora
from eru_jax.rewards.judge import describe_spending, judge_spending
from eru_jax.training import config as config_lib
from eru_jax.training import experiment as experiment_lib
from eru_jax.training import modules
from eru_jax.training import workdir as workdir_lib
from eru_jax.training.diagnosis import diagnose, pairs_to_compare
from eru_jax.training.evaluation import Evaluation, evaluate, judge_of, scored
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.gallery import gallery_rows, save_grids
from eru_jax.training.loop import run_stage
from eru_jax.training.metrics import MetricWriter, read_metrics
from eru_jax.training.mirror import Workdir
from eru_jax.training.report import ReportData, write_report
from eru_jax.training.stages import PRETRAINING, STAGES, evaluated_as, flow_matching, no_rl
from eru_jax.training.watch import mark, watching
from eru_jax.weights import model_directory
from eru_jax.weights.conversion import MODEL, carry_over
from eru_jax.weights.lora_io import export_lora
from eru_jax.weights.lora_layers import layers

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
  config = config_lib.from_mapping(config_lib.ExperimentConfig, config_values)
  with watching(config.watch):
    _train(config, workdir)


def _train(config: config_lib.ExperimentConfig, workdir: str) -> None:
  """The run; every process goes through all of it, and process 0 alone writes and prints."""
  began = time.monotonic()
  enable_compilation_cache()
  with distributed.main_first():
    config = experiment_lib.resolve(config)
  place = Workdir(workdir)
  workdir_lib.join(place, config_lib.to_json(config))
  directory = place.local
  summary_path = directory / 'summary.json'
  if distributed.agreed(summary_path.is_file):
    distributed.announce(f'This run is finished: {place.place / "report.html"}')
    return

  seconds = _Stopwatch(directory / 'seconds.json')
  mesh = sharding.make_mesh(config.mesh)
  config = config.on(sharding.batch_share(mesh))
  print_plan(config, mesh)
  modules.check_training(config)
  if 'no_rl' in config.stages:
    with distributed.main_first():
      no_rl.check_reward(config.no_rl)
  if 'flow_matching' in config.stages:
    flow_matching.check_pictures(config.data)

  with seconds('load'):
    experiment, snapshot = experiment_lib.open_experiment(config, mesh)
    experiment = dataclasses.replace(experiment, directory=directory)
  judge = judge_of(experiment)
  evaluations: dict[str, Evaluation] = {}
  snapshots: dict[str, Snapshot] = {}

  def measure(label: str, snapshot: Snapshot) -> None:
    found = workdir_lib.load_evaluation(directory, label)
    # A disk that is slow to show what has been written may show it to some only.
    if not distributed.all_true(found is not None):
      with seconds(f'evaluate {label}'):
        found = evaluate(experiment, snapshot, judge, evaluations.get('base'))
      if distributed.is_main():
        workdir_lib.save_evaluation(directory, label, found)
        place.push()
    else:
      # So that intervals beside each other are counted alike, whatever version had begun.
      found = scored(experiment, judge, found.generated, evaluations.get('base'))
    evaluations[label], snapshots[label] = found, snapshot
    distributed.announce(f'{label:>10}: ' + describe(found.scores))

  with contextlib.ExitStack() as stack:
    writer = None
    if distributed.is_main():
      writer = MetricWriter(directory, config.wandb_project or None, place.push)
      stack.enter_context(writer)
      stack.enter_context(at_leave(writer.close))
    stack.enter_context(sharding.use_mesh(mesh))
    if config.model.source != 'scratch':
      measure('base', dataclasses.replace(snapshot, trainable=None))
    if snapshot.trainable is not None:
      print(describe_adapter(config, snapshot), flush=True)
      measure('adapter', snapshot)
    for name in config.stages:
      module = STAGES[name]
      stage_config = config.stage(name)
      with seconds(name):
        stage = module.build(experiment, snapshot, stage_config)
        key = experiment.key(f'stage {name}')
        params = run_stage(name, stage, stage_config, key, mesh, place.place, writer, config.stages)
        snapshot = module.absorb(experiment, snapshot, params)
        export_adapter(directory / 'adapters', name, snapshot)
      label = evaluated_as(name, config.model.source)
      if label:
        measure(label, snapshot)
    if trains_whole(config, snapshot):
      with seconds('save'):
        save_model(directory / MODEL, experiment.config, snapshot)
    diagnosis = None
    groups = _pairs_to_compare(experiment) if snapshots else {}
    if groups:
      with seconds('knowledge structure'):
        seed = config.evaluation.seed
        diagnosis = diagnose(experiment, snapshots.items(), groups, seed=seed, judge=judge)
      if distributed.is_main():
        values = json.dumps(diagnosis.to_json(), indent=1) + '\n'
        replace_file(directory / 'diagnosis.json', values.encode())

  mark('the report')
  if not distributed.is_main():
    return
  summary = {
    'stages': {label: found.scores for label, found in evaluations.items()},
    'seconds': {**seconds.total, 'this start': time.monotonic() - began},
    'peak_memory_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT / 1e9,
    'versions': versions(),
  }
  if 'no_rl' in config.stages and config.no_rl.reward == 'judge':
    summary['judge'] = judge_spending(config.no_rl.judge, directory)
    print(f'no_rl: {describe_spending(summary["judge"])}')
  rows = gallery_rows(experiment, evaluations)
  save_grids(directory / 'samples', rows)
  write_report(
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
  place.push()
  print(f'Report: {place.place / "report.html"}')


def trains_whole(config: config_lib.ExperimentConfig, last: Snapshot) -> bool:
  """Whether a run has trained whole networks, so that adapters alone do not say what it came to."""
  if last.trainable is not None and not last.model.lora:
    return True
  # Pretraining in the emoji world takes no adapters.
  adapters = config.data.world == 'prompts' and bool(config.lora or config.adapter)
  return bool(set(config.stages) & set(PRETRAINING)) and not adapters


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
  """Writes the model that a run has trained, with the text encoders of the one it came from."""
  stored = stored_model(config, snapshot)
  if distributed.is_main():
    if config.model.text_encoder == 'flux':
      carry_over(config_lib.model_path(config.model.source), directory)
    model_directory.save(directory, stored)


def stored_model(
  config: config_lib.ExperimentConfig, snapshot: Snapshot
) -> model_directory.StoredModel:
  """What a run that trained whole networks hands on; of several processes, process 0 has it."""
  settings = {
    'text_encoder': config.model.text_encoder,
    'text_length': config.model.text_length,
    'resolution': config.model.resolution,
    'sampling': dataclasses.asdict(config.sampling),
  }
  whole = snapshot.trainable is not None and not snapshot.model.lora

  def to_host(tree: Any) -> Any:
    # Of arrays that this process sees whole, `save` fetches one after the other.
    several = jax.process_count() > 1
    return distributed.to_host(tree, keep=distributed.is_main()) if several else tree

  return model_directory.StoredModel(
    snapshot.model.family,
    snapshot.model.backbone.config,
    to_host(snapshot.trainable if whole else snapshot.backbone),
    snapshot.model.autoencoder.config,
    to_host(snapshot.autoencoder),
    settings,
    to_host(snapshot.reward),
  )


def export_adapter(directory: pathlib.Path, name: str, snapshot: Snapshot) -> None:
  """Writes a trained adapter as diffusers and as ComfyUI read it, if it is not all zero.

  In the dtype of the run's computation, to which its layers cast it anyway.
  """
  model = snapshot.model
  if snapshot.trainable is None or not model.lora:
    return
  adapter = distributed.to_host(snapshot.trainable)
  if distributed.is_main() and not lora.is_zero(adapter):
    for form, suffix in (('diffusers', ''), ('kohya', '_kohya')):
      path = directory / f'{name}{suffix}.safetensors'
      export_lora(path, adapter, model.lora, model.backbone.config, form, model.backbone.dtype)


def describe_adapter(config: config_lib.ExperimentConfig, snapshot: Snapshot) -> str:
  """Which ranks and alphas an adapter that a run begins with has, and whether `lora` has others."""
  found = lora.sizes(snapshot.trainable, snapshot.model.lora)
  counts = collections.Counter(found.values())
  parts = [f'rank {r} and alpha {a:g} in {n} kinds of layers' for (r, a), n in counts.items()]
  text = f'adapter: {", ".join(parts)}, from {config.adapter}'
  known = {layer.path for layer in layers(snapshot.model.backbone.config).values()}
  asked = {path: rule for path in known if (rule := lora.rule_of(path, config.lora))}
  if config.lora and {path: (rule.rank, rule.alpha) for path, rule in asked.items()} != found:
    text += '\nconfig.lora has other layers, ranks or alphas, which do not count beside an adapter'
  return text


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
  share = sharding.batch_share(mesh)
  kind = mesh.devices.flat[0].device_kind
  processes = jax.process_count()
  where = f' in {processes} processes' if processes > 1 else ''
  announce = distributed.announce
  announce(f'{devices} device(s) of kind {kind}{where}, mesh {dict(mesh.shape)}')
  for name in config.stages:
    stage = config.stage(name)
    sizes = stage.kinds
    text = ' + '.join(f'{size} {what}' for what, size in sizes.items())
    announce(f'{name}: {stage.num_steps} steps of {text}, accumulation {stage.accumulation}')
    for what, size in sizes.items():
      if size % (share * stage.accumulation):
        raise UserError(
          f'{name}: {size} {what} cannot be split over {share} devices (data x fsdp) x '
          f'{stage.accumulation} accumulation steps: choose a multiple.'
        )


def enable_compilation_cache() -> None:
  """Compiled programs outlive the process: a second start compiles nothing.

  What the user has set, JAX_COMPILATION_CACHE_DIR and its like, is left alone.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(cache_directory() / 'xla'))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # A start compiles hundreds of small programs, which together take longer than a large one.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


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

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    began = time.monotonic()

    def stop() -> None:
      self.total[phase] = self.total.get(phase, 0.0) + time.monotonic() - began
      if distributed.is_main():
        replace_file(self._path, json.dumps(self.total).encode())

    mark(phase)
    try:
      with at_leave(stop):
        yield
    except BaseException:
      # On a full disk, what failed before says more than that this fails too.
      with contextlib.suppress(UserError):
        stop()
      raise
    stop()
