"""The evaluator: drawing that goes on, scores that are kept, tables, and how models are compared.

Models are stood in for: what a picture shows is made of its prompt, its noise and its model.
"""

import csv
import dataclasses
import datetime
import json
import os
import shutil
import types
import zlib

import numpy as np
import pytest
from benchmark_files import science_row, training_row, wise_row, write_lines, write_wise
from PIL import Image

import eru_jax
from eru_jax.benchmarks.base import Question
from eru_jax.benchmarks.conversion import convert
from eru_jax.data.pairs import read_prompt_file
from eru_jax.errors import UserError
from eru_jax.evaluating import drawing, evaluator, models
from eru_jax.evaluating.evaluator import evaluate
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.evaluating.scorers import Scorer
from eru_jax.training.config import SamplingConfig
from eru_jax.training.evaluation import Generated


class Studio:
  """Stands in for models: opens any name, whose stages are base, dk_dm and no_rl."""

  def __init__(self, monkeypatch, tmp_path):
    self.opened, self.drawn, self.stop_after = [], [], None
    self.files = tmp_path / 'models'
    self.stages = {'base': 0.0, 'dk_dm': 1.0, 'no_rl': 2.0}
    self.size = (16, 16)
    self.batch = 4
    monkeypatch.setattr(models, 'read_config', self.read_config)
    monkeypatch.setattr(models, 'open_model', self.open_model)
    monkeypatch.setattr(models, 'overridden', self.overridden)
    monkeypatch.setattr(models, 'snapshots', self.snapshots)
    monkeypatch.setattr(models, 'model_path', lambda source: self.files / source)
    monkeypatch.setattr(drawing, 'model_path', lambda source: self.files / source)
    monkeypatch.setattr(drawing, 'draw', self.draw)
    monkeypatch.setattr(evaluator, 'enable_compilation_cache', lambda: None)

  def read_config(self, model):
    name = model.rpartition('/')[2]
    (self.files / name).mkdir(parents=True, exist_ok=True)
    if not (self.files / name / 'weights').exists():
      (self.files / name / 'weights').write_text(name)
    config = types.SimpleNamespace(
      model=types.SimpleNamespace(source=name, dtype='float32', params='float32'),
      sampling=SamplingConfig(),
      evaluation=types.SimpleNamespace(batch_size=self.batch),
      adapter='',
    )
    return config, self.files / name / 'run'

  def overridden(self, request, config):
    sampling = dataclasses.replace(config.sampling, num_steps=request.steps or 3)
    return {'sampling': sampling}, types.SimpleNamespace(height=self.size[0], width=self.size[1])

  def open_model(self, model, prompts, mesh, **overrides):
    self.opened.append(model)
    config = self.read_config(model)[0]
    config.sampling = overrides['sampling']
    experiment = types.SimpleNamespace(config=config, prompts=set(prompts), name=model)
    return experiment, None, 'workdir'

  def snapshots(self, experiment, base, workdir):
    for stage, shift in self.stages.items():
      trained = None if stage == 'base' else {'a': np.full(3, shift, np.float32)}
      model = Model(*self.size)
      yield stage, Snapshot(model, trained, stage)

  def draw(self, experiment, snapshot, judge, prompts, noise):
    assert judge is None and len(prompts) == len(noise) and set(prompts) <= experiment.prompts
    images = np.zeros((len(prompts), *self.size, 3), np.uint8)
    for row, prompt in enumerate(prompts):
      if self.stop_after is not None and len(self.drawn) >= self.stop_after:
        raise KeyboardInterrupt
      self.drawn.append((experiment.name, snapshot.stage, prompt))
      images[row, ..., 0] = zlib.crc32(prompt.encode()) % 251
      images[row, ..., 1] = int(abs(float(np.asarray(noise)[row].sum())) * 1e4) % 251
      images[row, ..., 2] = list(self.stages).index(snapshot.stage)
    return Generated(images, np.zeros(len(prompts), np.int32), np.zeros((len(prompts), 2, 2)))


@dataclasses.dataclass(frozen=True)
class Model:
  height: int
  width: int
  latent_shape: tuple[int, int] = (4, 3)


@dataclasses.dataclass(frozen=True)
class Snapshot:
  model: Model
  trainable: dict | None
  stage: str


@pytest.fixture
def studio(monkeypatch, tmp_path):
  return Studio(monkeypatch, tmp_path)


class Judge:
  """Scores a picture by its model: base 0, dk_dm 1, no_rl 2 marks, and calls `silent` unscored."""

  def __init__(self, name, make, silent=()):
    self.seen, self.make, self.silent = [], make, silent
    self.scorer = Scorer(name, f'{name}/test', self.score)

  def score(self, images, questions):
    assert images.dtype == np.uint8 and len(images) == len(questions)
    self.seen += [question.id for question in questions]
    return [
      None if question.id in self.silent else self.make(int(image[0, 0, 2]))
      for image, question in zip(images, questions, strict=True)
    ]


def wise_judge(silent=()):
  keys = ('consistency', 'realism', 'aesthetics')
  return Judge('wise', lambda stage: dict.fromkeys(keys, stage), silent)


def run(data, output, judge=None, models=('m',), benchmark='wise', **options):
  request = EvaluationRequest(models, str(output), benchmark, str(data), **options)
  return evaluate(request, judge.scorer if judge else None)


def test_a_benchmark_from_files_to_tables(studio, tmp_path, capsys):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  result = run(data, out, wise_judge(silent=('2',)))
  assert json.loads((out / 'evaluation.json').read_text()) == result
  implicit = {stage: found['implicit'] for stage, found in result['stages'].items()}
  assert list(implicit) == ['base', 'dk_dm', 'no_rl']
  # Marks of 0, 1 and 2 are WiScores of 0, 0.5 and 1, in every category.
  assert [round(told['score'], 9) for told in implicit.values()] == [0, 0.5, 1]
  assert [(told['n'], told['unscored']) for told in implicit.values()] == [(12, 1)] * 3
  assert implicit['dk_dm']['categories']['culture']['n'] == 2
  against = {
    (one['model'], one['condition'], one['against']['condition']): one['difference']
    for one in result['comparisons']
  }
  assert against['no_rl', 'implicit', 'implicit'] == pytest.approx(1)
  assert against['no_rl', 'explicit', 'explicit'] == pytest.approx(1)
  assert against['base', 'implicit', 'explicit'] == pytest.approx(0)
  # Pictures are named as WISE's own scripts want them.
  assert {path.name for path in (out / 'pictures' / 'no_rl' / 'implicit').iterdir()} == {
    f'{number}.png' for number in (1, 2, 400, 401, 567, 568, 700, 701, 800, 801, 900, 901, 1000)
  }
  rows = list(csv.DictReader((out / 'summary.csv').open()))
  overall = [row for row in rows if row['group'] == 'overall' and row['condition'] == 'implicit']
  assert [(row['model'], row['pictures'], row['unscored']) for row in overall] == [
    ('base', '12', '1'), ('dk_dm', '12', '1'), ('no_rl', '12', '1')
  ]  # fmt: skip
  pictures = list(csv.DictReader((out / 'pictures.csv').open()))
  assert len(pictures) == 13 * 2 * 3
  unscored = [row for row in pictures if row['id'] == '2']
  assert {row['value'] for row in unscored} == {''}
  assert all((out / row['file']).is_file() for row in pictures)
  told = capsys.readouterr().out
  assert '12 pictures, 1 unscored and left out' in told
  assert (out / 'gallery.html').is_file()


def test_evaluation_json_tells_how_to_do_it_again(studio, tmp_path, monkeypatch):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  (tmp_path / 'run').mkdir()
  monkeypatch.chdir(tmp_path)
  began = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
  settings = run('WISE', out, wise_judge(), models=('run', 'b'), limit=7, steps=5, seed=3)[
    'settings'
  ]
  ended = datetime.datetime.fromisoformat(settings.pop('date'))
  assert began <= ended <= datetime.datetime.now(datetime.UTC)
  drawn = settings.pop('drawn')
  assert settings == {
    'models': [str(tmp_path / 'run'), 'b'], 'stages': [], 'benchmark': 'wise', 'data': str(data),
    'questions': 'WISE', 'limit': 7, 'conditions': ['implicit', 'explicit'],
    'images_per_prompt': 1, 'seed': 3,
    'scorer': {'name': 'wise', 'model': None, 'identity': 'wise/test'},
    'eru_jax': eru_jax.__version__,
  }  # fmt: skip
  assert list(drawn) == [f'{model} {stage}' for model in ('run', 'b') for stage in studio.stages]
  for stage, told in drawn.items():
    record = out / 'pictures' / drawing.file_name(stage) / 'drawn.json'
    assert told == json.loads(record.read_text())['settings']
    assert told['sampling']['num_steps'] == 5 and (told['height'], told['width']) == (16, 16)
    assert {'guidance', 'cfg_scale'} <= told['sampling'].keys() and told['dtype'] == 'float32'
  assert len({told['base'] for told in drawn.values()}) == 2


def emoji_questions():
  """Of split 'wording' two, of 'train' eight: enough for the latter to decide any common mean."""
  return [
    Question(f'{split}{i}', 'food', {'implicit': f'{split} {i}'}, split=split)
    for split, count in (('wording', 2), ('train', 8))
    for i in range(count)
  ]


def test_the_headline_of_emoji_is_of_unseen_wordings(studio, tmp_path, capsys):
  def score(images, questions):
    return [
      {'right': float(q.split == 'train' or i[0, 0, 2] == 2)}
      for i, q in zip(images, questions, strict=True)
    ]

  request = EvaluationRequest(('m',), str(tmp_path / 'out'))
  scorer = Scorer('emoji', 'test', score)
  result = evaluate(request, scorer, emoji_questions())
  assert result['headline'] == 'wording'
  told = [result['stages'][stage]['implicit'] for stage in studio.stages]
  assert [(one['score'], one['n']) for one in told] == [(0, 2), (0, 2), (1, 2)]
  assert [(one['difference'], one['n']) for one in result['comparisons']] == [(0, 2), (1, 2)]
  assert result['splits']['wording'] == result['stages']
  assert result['splits']['train']['base']['implicit']['score'] == 1
  rows = list(csv.DictReader((tmp_path / 'out' / 'summary.csv').open()))
  assert {row['split'] for row in rows} == {'wording', 'train'}
  printed = capsys.readouterr().out
  assert "Overall scores and differences are of 'wording'" in printed
  assert 'base, wording, implicit: 0.0 %' in printed and 'base, train, implicit: 100.0 %' in printed
  page = (tmp_path / 'out' / 'gallery.html').read_text()
  assert 'Base, implicit prompts, set wording</h3><div class="big">0.0 %' in page
  # Without such questions all are asked together, as those of a file without splits.
  request = EvaluationRequest(('m',), str(tmp_path / 'train'))
  result = evaluate(request, scorer, emoji_questions()[2:])
  assert result['headline'] is None and result['stages']['base']['implicit']['n'] == 8


def test_colours_of_the_gallery_go_by_the_exact_test(studio, tmp_path):
  # Five prompts that are all won may be chance (2 of 32), six (2 of 64) are said to be none.
  def page(count):
    asked = [Question(str(i), 'food', {'implicit': f'p {i}'}) for i in range(count)]
    judge = Judge('emoji', lambda stage: {'right': float(stage == 2)})
    request = EvaluationRequest(('m',), str(tmp_path / str(count)), stages=('base', 'no_rl'))
    result = evaluate(request, judge.scorer, asked)
    (told,) = result['comparisons']
    assert told['p'] == 2 / 2**count and told['ci95'] is None
    return (tmp_path / str(count) / 'gallery.html').read_text()

  assert '<span class="up" title="p = 0.031, 6 prompts">+100.0 %<small></small>' in page(6)
  assert '<span class="" title="p = 0.062, 5 prompts">+100.0 %<small></small>' in page(5)


def kept_ids(out):
  return {path.name.partition('_')[0] for path in (out / 'pictures/base/implicit').iterdir()}


def test_raising_the_limit_draws_the_rest_only(studio, tmp_path):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  run(data, out, wise_judge(), limit=4)
  first, studio.drawn = set(studio.drawn), []
  run(data, out, wise_judge(), limit=9)
  # Two conditions and three stages.
  assert len(first) == 4 * 6 and len(set(studio.drawn)) == 5 * 6
  assert not first & set(studio.drawn)


def test_noise_is_that_of_the_question_alone(studio, tmp_path):
  data = write_wise(tmp_path / 'WISE')
  run(data, tmp_path / 'all', wise_judge(), images_per_prompt=2)
  studio.batch = 3
  run(data, tmp_path / 'some', wise_judge(), limit=6, images_per_prompt=2)

  def pixels(out, stage, condition, name):
    return np.asarray(Image.open(tmp_path / out / 'pictures' / stage / condition / name))[0, 0]

  name, other = (f'{i}_1.png' for i in sorted(kept_ids(tmp_path / 'some'))[:2])
  first = pixels('all', 'base', 'implicit', name)
  # Every model and both forms of a prompt begin with the same noise, which is the green here.
  for stage in ('base', 'dk_dm', 'no_rl'):
    for condition in ('implicit', 'explicit'):
      assert pixels('all', stage, condition, name)[1] == first[1]
  assert (pixels('some', 'base', 'implicit', name) == first).all()
  assert pixels('all', 'base', 'implicit', name.replace('_1', '_0'))[1] != first[1]
  assert pixels('all', 'base', 'implicit', other)[1] != first[1]


def test_a_killed_evaluation_goes_on_where_it_was(studio, tmp_path):
  data = write_wise(tmp_path / 'WISE')
  run(data, tmp_path / 'whole', wise_judge())
  whole = list(studio.drawn)
  studio.drawn, studio.stop_after = [], 18
  with pytest.raises(KeyboardInterrupt):
    run(data, tmp_path / 'out', wise_judge())
  # Four batches of four were finished, the fifth was not.
  kept = sorted((tmp_path / 'out' / 'pictures').rglob('*.png'))
  assert len(kept) == 16
  times = [path.stat().st_mtime_ns for path in kept]
  assert not list(tmp_path.rglob('*.tmp'))
  studio.drawn, studio.stop_after = [], None
  half = tmp_path / 'out' / 'pictures' / 'base' / 'implicit' / '1.png.77-ab.tmp'
  half.touch()
  os.utime(half, (0, 0))
  result = run(data, tmp_path / 'out', wise_judge())
  assert not half.exists()
  assert [path.stat().st_mtime_ns for path in kept] == times
  assert {d[1:] for d in studio.drawn if d[1] == 'base'} == {
    d[1:] for d in whole if d[1] == 'base' and d[2] not in
    {json.loads((tmp_path / 'out/pictures/base/drawn.json').read_text())['prompts'][
      f'{p.parent.name}/{p.name}'] for p in kept}
  }  # fmt: skip
  whole = json.loads((tmp_path / 'whole' / 'evaluation.json').read_text())
  assert result['settings'].pop('date') >= whole['settings'].pop('date')
  assert result == whole
  for path in (tmp_path / 'whole' / 'pictures').rglob('*.png'):
    other = tmp_path / 'out' / path.relative_to(tmp_path / 'whole')
    assert other.read_bytes() == path.read_bytes()


def test_another_scorer_looks_at_the_same_pictures(studio, tmp_path):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  run(data, out, scorer='none')
  assert 'scorer": null' in (out / 'evaluation.json').read_text()
  assert studio.opened == ['m']
  judge = wise_judge(silent=('2', '700'))
  run(data, out, judge)
  assert studio.opened == ['m']
  # What has been scored is not asked again; what has not, is.
  assert len(judge.seen) == 13 * 2 * 3
  judge.seen, judge.silent = [], ('700',)
  result = run(data, out, judge)
  assert sorted(judge.seen) == ['2'] * 6 + ['700'] * 6
  assert result['stages']['base']['implicit']['unscored'] == 1
  # A torn line, as a killed run leaves one, costs one picture.
  scores = (out / 'scores.jsonl').read_text()
  (out / 'scores.jsonl').write_text(scores[:-20])
  judge.seen = []
  run(data, out, judge)
  assert len(judge.seen) == 1 + 6
  judge.seen = []
  run(data, out, judge)
  assert judge.seen == ['700'] * 6
  # A changed model is opened and, being another one, refused beside the old pictures.
  (studio.files / 'm' / 'weights').write_text('other')
  with pytest.raises(UserError, match='were drawn with base .* choose another --output'):
    run(data, out, judge)


@pytest.mark.parametrize(
  ('option', 'words'), [({'seed': 1}, 'seed 0, and now it is 1'), ({'steps': 9}, 'sampling')]
)
def test_pictures_drawn_otherwise_are_not_mixed_in(option, words, studio, tmp_path):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  run(data, out, wise_judge(), limit=3)
  with pytest.raises(UserError, match=f'pictures/base were drawn with {words}'):
    run(data, out, wise_judge(), limit=3, **option)


def test_a_changed_prompt_is_drawn_anew(studio, tmp_path):
  path = tmp_path / 'natural_science.json'
  path.write_text(json.dumps([wise_row(701), wise_row(901)]))
  run(tmp_path, tmp_path / 'out', wise_judge())
  path.write_text(json.dumps([wise_row(701, 'another riddle'), wise_row(901)]))
  studio.drawn = []
  run(tmp_path, tmp_path / 'out', wise_judge())
  assert {d[1:] for d in studio.drawn} == {(s, 'another riddle') for s in studio.stages}


def test_several_models_and_the_same_base_once(studio, tmp_path, capsys):
  studio.stages = {'base': 0.0, 'no_rl': 2.0}
  data = write_wise(tmp_path / 'WISE')
  result = run(data, tmp_path / 'out', wise_judge(), models=('runs/a', 'other/a', 'b'), limit=3)
  # Both runs that are called a have one base and, here, even one adapter.
  assert list(result['stages']) == ['a base', 'a no_rl', 'b base', 'b no_rl']
  assert 'a (2) base is the same model as a base: drawn once.' in capsys.readouterr().out
  # Killed once the first of them is done, it comes to the same.
  task, studio.drawn = dict(models=('runs/a', 'other/a', 'b'), limit=3), []
  studio.stop_after = 2 * 8  # of six in batches of four
  with pytest.raises(KeyboardInterrupt):
    run(data, tmp_path / 'killed', wise_judge(), **task)
  known = json.loads((tmp_path / 'killed' / 'models.json').read_text())
  (tmp_path / 'killed' / 'models.json').write_text(json.dumps({'runs/a': known['runs/a']}))
  studio.stop_after, studio.opened = None, []
  again = run(data, tmp_path / 'killed', wise_judge(), **task)
  assert 'runs/a' not in studio.opened and list(again['stages']) == list(result['stages'])
  assert again['comparisons'] == result['comparisons']
  only = run(data, tmp_path / 'only', wise_judge(), models=('a', 'b'), stages=('no_rl',), limit=3)
  assert list(only['stages']) == ['a no_rl', 'b no_rl']
  with pytest.raises(UserError, match='has not finished a stage of --stages=nosuch'):
    run(data, tmp_path / 'none', wise_judge(), stages=('nosuch',), limit=3)


def science_data(tmp_path, count=6):
  write_lines(tmp_path / 'data' / 'test_S.jsonl', [science_row(i) for i in range(count)])
  return tmp_path / 'data'


def test_science_t2i_has_nd_and_ri_and_tells_its_edition(studio, tmp_path, capsys):
  def score(images, questions):
    # Superficial 18, implicit 24 + 2 for each stage, explicit 34; red tells the prompt.
    kinds = {
      zlib.crc32(text.encode()) % 251: kind
      for question in questions for kind, text in question.prompts.items()
    }  # fmt: skip
    base = {'superficial': 18, 'implicit': 24, 'explicit': 34}
    return [{'sci_score': base[kinds[int(i[0, 0, 0])]] + 2.0 * i[0, 0, 2]} for i in images]

  request = EvaluationRequest(
    ('m',), str(tmp_path / 'out'), 'science_t2i', str(science_data(tmp_path))
  )
  result = evaluate(request, Scorer('sci_score', 'test', score))
  assert result['sets'] == {
    'S': {'questions': 6, 'asked': 6, 'edition': '6 rows, of no edition that is known'}
  }
  # Two pictures of each of three prompts, as in the published script.
  assert result['stages']['base']['superficial']['n'] == 12
  assert result['ratios']['base']['nd']['value'] == pytest.approx(6 / 16)
  assert result['ratios']['dk_dm']['ri']['value'] == pytest.approx(2 / 10)
  assert result['ratios']['no_rl']['ri']['value'] == pytest.approx(4 / 10)
  told = capsys.readouterr().out
  assert 'RI 40.0 %' in told and 'of no edition that is known' in told
  assert 'of the base’s gap closed</dt><dd>40 %' in (tmp_path / 'out/gallery.html').read_text()


def test_rewritten_prompts_are_a_rival_of_the_first_model_only(studio, tmp_path):
  def rewrite(prompts):
    return [None if 'riddle number 1' == p else f'{p}, told outright' for p in prompts]

  data = write_wise(tmp_path / 'WISE')
  result = run(
    data, tmp_path / 'out', wise_judge(), conditions=('implicit',), rewriters={'rewritten': rewrite}
  )
  assert list(result['stages']['base']) == ['implicit', 'rewritten']
  assert result['stages']['base']['rewritten']['n'] == 12
  assert list(result['stages']['dk_dm']) == ['implicit']
  drawn = {d[2] for d in studio.drawn if d[1] == 'base'}
  assert 'riddle number 2, told outright' in drawn and 'Answer2.' not in drawn


def test_mistakes_are_told_before_a_model_is_opened(studio, tmp_path):
  data = write_wise(tmp_path / 'WISE')
  for options, words in (
    ({'benchmark': 'nosuch'}, '--benchmark=nosuch: there are emoji'),
    ({'scorer': 'nosuch'}, "--scorer=nosuch: benchmark 'wise' can be scored by wise, sci_score"),
    ({'scorer': 'sci_score'}, 'needs --scorer_model=DIR'),
    ({}, '--scorer=wise is a judge'),
    ({'scorer': 'none', 'conditions': ('superficial',)}, "no 'superficial' prompts, but implicit"),
    ({'scorer': 'clip_score', 'scorer_model': str(tmp_path / 'x')}, 'There is no CLIP directory'),
  ):
    with pytest.raises(UserError, match=words) as caught:
      run(data, tmp_path / 'out', **options)
    assert '\n' not in str(caught.value)
  assert studio.opened == [] and not (tmp_path / 'out').exists()


def test_hostile_ids_stay_in_their_directory(tmp_path):
  ids = ['../../up', '/etc/passwd', 'a' * 300, '.', '..', 'COM 1', 'plain', '', 'ä']
  asked = [Question(name, 'c', {'implicit': 'p'}) for name in ids]
  files = [picture.file for picture in drawing.wanted(asked, ['implicit'], 1)]
  assert len({file.casefold() for file in files}) == len(ids)
  for file in files:
    path = (tmp_path / file).resolve()
    assert path.parent == tmp_path / 'implicit' and len(path.name) < 120
  assert 'implicit/plain.png' in files
  with pytest.raises(UserError, match="Two questions have the id 'Plain'"):
    drawing.wanted([*asked, Question('Plain', 'c', {'implicit': 'p'})], ['implicit'], 1)


def test_texts_are_no_formulas_in_a_spreadsheet(studio, tmp_path):
  row = wise_row(701, '=HYPERLINK("http://x")')
  (tmp_path / 'natural_science.json').write_text(json.dumps([row]))
  run(tmp_path, tmp_path / 'out', wise_judge())
  rows = list(csv.DictReader((tmp_path / 'out' / 'pictures.csv').open()))
  assert {row['prompt'] for row in rows} == {'\'=HYPERLINK("http://x")'}


def test_damaged_files_of_an_evaluation_are_named(studio, tmp_path):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  run(data, out, wise_judge(), limit=2)
  path = next((out / 'pictures' / 'base' / 'implicit').iterdir())
  path.write_bytes(b'no picture')
  with pytest.raises(UserError, match=f'{path.name} is no readable picture .* remove it and run'):
    run(data, out, wise_judge(), limit=2)
  path.unlink()
  run(data, out, wise_judge(), limit=2)
  (out / 'pictures' / 'base' / 'drawn.json').write_text('{')
  (out / 'models.json').unlink()
  with pytest.raises(UserError, match='drawn.json cannot be read'):
    run(data, out, wise_judge(), limit=2)


# Training sets


def test_training_sets_pass_the_filter(tmp_path, capsys):
  train = write_lines(tmp_path / 'train.jsonl', [training_row(i) for i in range(3)])
  near = science_row(0, implicit_prompt='wording 0 of object 1', explicit_prompt='quite another')
  write_lines(tmp_path / 'held' / 'S.jsonl', [near])
  output = tmp_path / 'pairs.jsonl'
  with pytest.raises(UserError, match='9 of these pairs are to be trained on: name the test sets'):
    convert('science_t2i', str(train), None, [], 0.5, str(output))
  held = [f'science_t2i={tmp_path / "held"}']
  pairs = convert('science_t2i', str(train), None, held, 0.7, str(output))
  assert read_prompt_file(output) == pairs
  assert [pair.id for pair in pairs] == ['00003/0', '00003/1', '00003/2']
  told = capsys.readouterr().out
  assert '6 of 9 pairs dropped, 3 kept' in told and 'science_t2i: 6 pairs share 70% of' in told
  assert {pair.split for pair in pairs} == {'train'}


def test_what_is_for_testing_becomes_no_training_pair(tmp_path, capsys):
  output = tmp_path / 'wise.jsonl'
  pairs = convert('wise', str(write_wise(tmp_path / 'WISE')), None, [], 0.5, str(output))
  assert {pair.split for pair in read_prompt_file(output)} == {'wise'} and len(pairs) == 13
  assert 'trains on none' in capsys.readouterr().out
  with pytest.raises(UserError, match='has no explicit prompts'):
    convert('wise_verified', str(tmp_path / 'WISE'), None, [], 0.5, str(output))
  for arguments, words in (
    ((None, None, None, []), 'Give either --benchmark'),
    (('science_t2i', None, None, []), 'needs --data=DIR'),
  ):
    with pytest.raises(UserError, match=words):
      convert(*arguments, 0.5, str(output))
  mine = tmp_path / 'mine.jsonl'
  mine.write_text('{"implicit": "a", "explicit": "b"}\n')
  with pytest.raises(UserError, match='--held_out=wise: give NAME=DIR'):
    convert(None, None, str(mine), ['wise'], 0.5, str(output))


# Scorers of the package


def test_clip_scores_are_those_of_the_reward_whatever_the_batch(tmp_path, monkeypatch):
  import jax.numpy as jnp

  from eru_jax.evaluating.scorers import open_scorer
  from eru_jax.rewards.clip import load_clip_reward
  from eru_jax.training.config import model_path

  monkeypatch.setenv('ERU_JAX_CACHE', str(tmp_path))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 40, 56, 3), np.uint8)
  asked = [
    Question(str(i), 'c', {'implicit': f'prompt {i % 2}', 'explicit': 'x'}) for i in range(3)
  ]
  for name in ('sci_score', 'clip_score'):
    scorer = open_scorer(name, 'tiny_clip', asked, 'here', None)
    found = [score[name] for score in scorer.score(images, asked)]
    alone = [scorer.score(images[i : i + 1], asked[i : i + 1])[0][name] for i in range(3)]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    reward = load_clip_reward(model_path('tiny_clip'), name)
    # The text is the implicit prompt, and the picture what the file holds.
    text = reward.text_features([question.implicit for question in asked])
    expected = reward.score(reward.params, jnp.asarray(images, jnp.float32) / 255, text)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert len(set(np.round(found, 4))) == 3
  other = open_scorer('clip_score', 'tiny_clip', asked, 'here', None)
  assert (
    other.identity
    == scorer.identity
    != open_scorer('sci_score', 'tiny_clip', asked, 'here', None).identity
  )
  # Its weights tell a model, wherever it lies: another one may have files of the same sizes.
  copy = tmp_path / 'copy'
  shutil.copytree(model_path('tiny_clip'), copy)
  assert open_scorer('clip_score', str(copy), asked, 'here', None).identity == scorer.identity
  (weights,) = copy.glob('*.safetensors')
  data = bytearray(weights.read_bytes())
  data[-1] ^= 1
  weights.write_bytes(data)
  assert open_scorer('clip_score', str(copy), asked, 'here', None).identity != scorer.identity


def test_pictures_of_several_sizes_are_scored_in_calls_of_their_own(studio, tmp_path):
  data, calls = write_wise(tmp_path / 'WISE'), []
  run(data, tmp_path / 'out', scorer='none', conditions=('implicit',), stages=('base',))
  for index, path in enumerate(sorted((tmp_path / 'out').rglob('*.png'))):
    if index % 3 == 0:
      Image.new('RGB', (24, 8), (0, 0, 1)).save(path)
  marks = ('consistency', 'realism', 'aesthetics')

  def score(images, questions):
    calls.append((images.shape, [question.id for question in questions]))
    return [dict.fromkeys(marks, 2.0 * (image.shape[0] == 8)) for image in images]

  request = EvaluationRequest(
    ('m',), str(tmp_path / 'out'), 'wise', str(data), conditions=('implicit',), stages=('base',)
  )
  evaluate(request, Scorer('wise', 'sizes', score))
  assert sorted(shape for shape, _ in calls) == [(5, 8, 24, 3), (8, 16, 16, 3)]
  rows = list(csv.DictReader((tmp_path / 'out' / 'pictures.csv').open()))
  small = next(ids for shape, ids in calls if shape[1] == 8)
  assert {row['id'] for row in rows if float(row['value']) > 0.5} == set(small)
