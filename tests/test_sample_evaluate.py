"""`sample` and `evaluate`: what they draw, what they count, and how they refuse."""

import dataclasses
import functools
import json
import logging
import shutil
import types

import numpy as np
import pytest
from PIL import Image
from test_commands import refusal

from eru_jax.errors import UserError
from eru_jax.evaluating import drawing, models
from eru_jax.evaluating.evaluator import evaluate as run_evaluation
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.training import evaluation, experiment, gallery, sampling
from eru_jax.training.sampling import SampleRequest, sample

STAGES = ['base', 'dk_dm', 'no_rl']


def draw(model, output, *prompts, **options):
  return sample(SampleRequest(str(model), str(output), prompts=prompts, **options))


def score_prompt_file(model, prompts, output, seed, **options):
  """What --prompts does."""
  return run_evaluation(EvaluationRequest((model,), output, data=prompts, seed=seed, **options))


def pictures(directory):
  return [np.asarray(Image.open(p)) for p in sorted(directory.glob('[0-9]*.png'))]


def records(directory):
  return json.loads((directory / 'samples.json').read_text())


@pytest.fixture(scope='module', autouse=True)
def opened_once():
  """World, text encoder and embeddings are those of every test here: they are read once."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ('load_emoji_world', 'load_minilm', 'EmbeddingCache'):
      patch.setattr(experiment, name, functools.cache(getattr(experiment, name)))
    yield


@pytest.fixture(scope='module')
def drawn(tiny_run, tmp_path_factory):
  """Output of a run's last stage: prompts from flags and from a file, two pictures of each."""
  directory = tmp_path_factory.mktemp('drawn')
  prompts = directory / 'prompts.txt'
  # As editors leave it: a byte order mark, blank lines, spaces, no newline at the end.
  prompts.write_text('\ufeffbutterfly\n\n  \n  what bees make ', encoding='utf-8')
  return draw(
    tiny_run, directory / 'out', 'red apple', prompt_file=str(prompts), num_images=2,
    save_latents=True,
  )  # fmt: skip


def test_sample_writes_what_it_promises(drawn):
  prompts = [p for p in ('red apple', 'butterfly', 'what bees make') for _ in range(2)]
  found = records(drawn)
  assert [record['prompt'] for record in found] == prompts
  assert [record['file'] for record in found] == [f'{index:04d}.png' for index in range(6)]
  assert {(record['stage'], record['seed']) for record in found} == {('no_rl', 0)}
  assert all(record['judge_sees'] for record in found)
  images = pictures(drawn)
  assert [image.shape for image in images] == [(64, 64, 3)] * 6
  # Every picture has noise of its own, those of one prompt too.
  assert len({image.tobytes() for image in images}) == 6
  assert np.load(drawn / 'latents_final.npy').shape == (6, 16, 64)
  width, height = Image.open(drawn / 'grid.png').size
  assert width > 2 * 128 and height > 3 * 128
  assert not list(drawn.glob('*.tmp'))


def test_the_same_seed_draws_the_same_pictures(drawn, tiny_run, tmp_path):
  prompts = ['red apple', 'red apple', 'butterfly', 'butterfly', 'what bees make', 'what bees make']
  again = draw(tiny_run, tmp_path / 'again', *prompts)
  for one, other in zip(pictures(again), pictures(drawn), strict=True):
    np.testing.assert_array_equal(one, other)
  other = draw(tiny_run, tmp_path / 'other', *prompts, seed=1)
  for one, two in zip(pictures(other), pictures(drawn), strict=True):
    assert (one != two).any()


def test_every_stage_of_a_run(drawn, tiny_run, tiny_model_dir, tmp_path):
  prompts = ('red apple', 'butterfly')
  images = {
    stage: pictures(draw(tiny_run, tmp_path / stage, *prompts, stage=stage)) for stage in STAGES
  }
  assert records(tmp_path / 'base')[0]['stage'] == 'base'
  # The base of the run is the model it started from; the run's config gave steps and guidance.
  model = pictures(draw(tiny_model_dir, tmp_path / 'model', *prompts, steps=2, cfg_scale=2.0))
  np.testing.assert_array_equal(images['base'], model)
  for before, after in (('base', 'dk_dm'), ('dk_dm', 'no_rl')):
    assert (np.array(images[before]) != np.array(images[after])).any()
  # Row 0 of the default draw is this prompt at the last stage, from the same noise; its batch was
  # larger, which may turn the last bit of a pixel.
  assert np.abs(images['no_rl'][0].astype(int) - pictures(drawn)[0]).max() <= 1


def test_steps_guidance_and_size(tiny_model_dir, tmp_path):
  out = draw(
    tiny_model_dir, tmp_path / 'small', 'red apple', steps=1, cfg_scale=2.0, height=32, width=48
  )
  assert pictures(out)[0].shape == (32, 48, 3)
  # The judge knows pictures of 64 x 64 only, and does not guess at others.
  assert 'judge_sees' not in records(out)[0]
  with pytest.raises(UserError, match='Pictures of 40 x 64 pixels: this model needs multiples of'):
    draw(tiny_model_dir, tmp_path / 'odd', 'red apple', steps=1, height=40)


def test_guidance_is_classifier_free_where_the_model_is_sampled_so(tiny_run):
  config, _ = sampling.read_config(str(tiny_run))

  def sampler(**flags):
    return sampling._sampler(SampleRequest('run', 'out', **flags), config.sampling, False)

  assert sampler().cfg_scale == 2.0
  assert sampler(guidance=3.0).cfg_scale == sampler(cfg_scale=3.0).cfg_scale == 3.0
  with pytest.raises(UserError, match='--guidance and --cfg_scale are the same scale'):
    sampler(guidance=3.0, cfg_scale=1.0)


def test_start_noise_of_ones_own(tiny_model_dir, tmp_path):
  from eru_jax.training.restore import open_model

  _, snapshot, _ = open_model(str(tiny_model_dir), ['red apple'])
  noise = np.asarray(evaluation.start_noise(snapshot.model, 5, 'sample', np.arange(2)))
  np.save(tmp_path / 'noise.npy', noise)
  prompts = ('red apple', 'butterfly')
  given = draw(
    tiny_model_dir, tmp_path / 'a', *prompts, steps=1, latents=str(tmp_path / 'noise.npy')
  )
  seeded = draw(tiny_model_dir, tmp_path / 'b', *prompts, steps=1, seed=5)
  np.testing.assert_array_equal(pictures(given), pictures(seeded))

  for name, content, words in (
    ('nosuch.npy', None, 'not a readable .npy file'),
    ('empty.npy', b'', 'not a readable .npy file'),
    ('text.npy', b'0 1 2', 'not a readable .npy file'),
    ('zip.npy', b'PK\x03\x04', 'not a readable .npy file'),
  ):
    if content is not None:
      (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
      draw(tiny_model_dir, tmp_path / 'c', *prompts, latents=str(tmp_path / name))
  np.savez(tmp_path / 'many.npz', noise)
  np.save(tmp_path / 'double.npy', noise.astype(np.float64))
  np.save(tmp_path / 'three.npy', np.zeros((3, 16, 64), np.float32))
  for name, words in (
    ('many.npz', 'is an archive'),
    ('double.npy', 'holds float64: store it as float32'),
    ('three.npy', r'has shape \(3, 16, 64\), but these prompts need \(2, 16, 64\)'),
  ):
    with pytest.raises(UserError, match=words):
      draw(tiny_model_dir, tmp_path / 'c', *prompts, latents=str(tmp_path / name))
  assert not (tmp_path / 'c').exists()


def test_over_long_prompts_are_cut_with_a_warning(tiny_model_dir, tmp_path, caplog, monkeypatch):
  # A cache of its own, so that the prompts are new to it the first time, and known the second.
  from eru_jax.data.embeddings import EmbeddingCache

  monkeypatch.setattr(
    experiment, 'EmbeddingCache', lambda _, encoder: EmbeddingCache(tmp_path / 'text', encoder)
  )
  monkeypatch.setattr(experiment, 'load_emoji_world', lambda *_: _small_world())
  long = 'a very ' * 2000 + 'red apple'
  for name in ('encoded', 'cached'):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger='absl'):
      out = draw(tiny_model_dir, tmp_path / name, long, 'red apple', steps=1)
    (warning,) = [r.getMessage() for r in caplog.records if 'longer than' in r.getMessage()]
    assert 'prompts are longer than 24 tokens and lose their end' in warning
    assert len(warning) < 500
    assert len(pictures(out)) == 2 and records(out)[0]['prompt'] == long


def _small_world():
  """A world of three noisy pictures without pairs."""
  from eru_jax.data.emoji_knowledge import PictureTable
  from eru_jax.data.world import World

  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
  names = ('red apple', 'butterfly', 'cat')
  fields = {'images': images, 'names': names}
  for field in dataclasses.fields(PictureTable):
    fields.setdefault(field.name, ())
  pictures = PictureTable(**fields)
  return World({}, pictures.names, pictures)


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({}, 'nothing to draw: give --prompt'),
    ({'prompts': ('a cat', '')}, r"Prompt 1 \(''\) is empty"),
    ({'prompts': ('a cat', '\u200b \n')}, 'Prompt 1 .* is empty'),
    ({'prompts': ('\udcff',)}, 'Prompt 0 .* half a surrogate pair'),
    ({'prompt_file': 'nosuch.txt'}, 'no prompt file nosuch.txt'),
    ({'prompt_file': 'nosuch.jsonl'}, 'no prompt file nosuch.jsonl'),
    ({'prompt_file': 'latin.txt'}, 'latin.txt, line 1: not UTF-8'),
    ({'prompt_file': 'blank.txt'}, 'blank.txt holds no prompts: write one a line'),
    ({'prompt_file': 'blank.txt', 'prompts': ('a cat',)}, 'blank.txt holds no prompts'),
    ({'prompt_file': 'half.jsonl'}, 'half.jsonl, line 2: malformed JSON'),
    ({'prompt_file': 'half.json'}, 'half.json, line 2: malformed JSON'),
    ({'prompt_file': 'half.JSONL'}, 'half.JSONL, line 2: malformed JSON'),
    ({'prompt_file': 'array.json'}, 'array.json, line 1: this is a JSON array'),
    ({'prompt_file': '~/nosuch.txt'}, 'no prompt file .*/home/nosuch.txt'),
    ({'prompts': ('a cat',), 'latents': '~/noise.npy'}, '~/noise.npy holds float64'),
    ({'prompts': ('a cat',), 'output': 'latin.txt'}, 'written to .*/latin.txt: Not a directory'),
    ({'prompts': ('a cat',), 'output': 'latin.txt/a/b'}, 'written to .*/a/b: Not a directory'),
    ({'prompts': ('a cat',), 'model': 'nosuch'}, '--model=nosuch is neither the workdir'),
    ({'prompts': ('a cat',), 'model': '.'}, 'is neither the workdir'),
    ({'prompts': ('a cat',), 'model': 'damaged'}, 'damaged/config.json cannot be read'),
    ({'prompts': ('a cat',), 'model': 'list'}, 'must be a mapping'),
    ({'prompts': ('a cat',), 'steps': 0}, '`num_steps` is 0 but must be at least 1'),
    ({'prompts': ('a cat',), 'guidance': float('nan')}, '--guidance=nan: give a finite number'),
  ],
)
def test_mistakes_that_are_found_before_anything_is_loaded(options, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'latin.txt').write_bytes('café'.encode('latin-1'))
  (tmp_path / 'blank.txt').write_text('\n  \n')
  for name in ('half.jsonl', 'half.json', 'half.JSONL'):
    (tmp_path / name).write_text('{"implicit": "a", "explicit": "b"}\n{"implicit": \n')
  (tmp_path / 'array.json').write_text('[{"implicit": "a", "explicit": "b"}]')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  (tmp_path / 'home').mkdir()
  np.save(tmp_path / 'home' / 'noise.npy', np.zeros(3))
  for name, text in (('damaged', '{'), ('list', '[]')):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'config.json').write_text(text)
  monkeypatch.setattr(sampling, 'open_model', lambda *_, **__: pytest.fail('loaded'))
  with pytest.raises(UserError, match=words) as caught:
    sample(SampleRequest(**{'model': 'emoji_base', 'output': 'out'} | options))
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'out').exists()


def test_stages_that_are_not_there(tiny_run, tiny_model_dir, tmp_path):
  with pytest.raises(UserError, match='--stage=dk_dm: this model has base, give'):
    draw(tiny_model_dir, tmp_path / 'out', 'red apple', stage='dk_dm')
  unfinished = tmp_path / 'unfinished'
  shutil.copytree(tiny_run, unfinished)
  shutil.rmtree(unfinished / 'checkpoints' / 'no_rl')
  with pytest.raises(
    UserError, match='--stage=no_rl: this run has only reached base and dk_dm yet'
  ):
    draw(unfinished, tmp_path / 'out', 'red apple', stage='no_rl')
  # Without --stage, the last one that was reached.
  out = draw(unfinished, tmp_path / 'out', 'red apple')
  assert records(out)[0]['stage'] == 'dk_dm'


def test_a_run_from_scratch_that_draws_nothing_yet(tiny_model_dir, tmp_path):
  from eru_jax.training import config as config_lib

  architecture, autoencoder = (
    json.loads((tiny_model_dir / part / 'config.json').read_text())
    for part in ('transformer', 'vae')
  )
  values = dict(
    stages=('autoencoder', 'flow_matching'),
    model=dict(source='scratch', architecture=architecture, autoencoder=autoencoder, scan=False),
  )
  config = config_lib.from_mapping(config_lib.ExperimentConfig, values)
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config_lib.to_json(config)))
  with pytest.raises(UserError, match='has not finished a stage that draws pictures yet'):
    draw(tmp_path / 'run', tmp_path / 'out', 'red apple')


@pytest.mark.parametrize(
  ('module', 'flag', 'words'),
  [
    ('sample', '--steps=0', '--steps=0'),
    ('sample', '--steps=many', '--steps'),
    ('sample', '--seed=-1', '--seed=-1'),
    ('sample', f'--seed={2**64}', '--seed'),
    ('sample', '--height=0', '--height=0'),
    ('sample', '--guidance=-1', '--guidance=-1'),
    ('sample', '--num_images=0', '--num_images=0'),
    ('evaluate', f'--seed={2**64}', '--seed'),
  ],
)
def test_bad_flags(module, flag, words, tmp_path):
  needed = ['--model=emoji_base', '--output=out', '--prompts=p.jsonl']
  line = refusal(*needed, flag, directory=tmp_path, module=f'eru_jax.{module}')
  assert words in line, line


def test_mistakes_at_the_command_line_are_one_line(tmp_path):
  line = refusal(
    '--model=nosuch', '--output=out', '--prompt=a cat', directory=tmp_path, module='eru_jax.sample'
  )
  assert '--model=nosuch is neither the workdir of a run' in line
  (tmp_path / 'mine.jsonl').write_text('{"implicit": "a", "explicit": "b"}\n\nnot json\n')
  line = refusal(
    '--model=nosuch', '--output=out', '--prompts=mine.jsonl',
    directory=tmp_path, module='eru_jax.evaluate',
  )  # fmt: skip
  assert 'mine.jsonl, line 3: malformed JSON' in line
  assert not (tmp_path / 'out').exists()


# evaluate


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
  path = tmp_path_factory.mktemp('mine') / 'mine.jsonl'
  pairs = [
    ('the animal that purrs', 'cat'),
    ('what hatches from a chrysalis', 'a Butterfly'),
    ('the animal that purrs when stroked', 'cat'),
  ]
  path.write_text(''.join(json.dumps({'implicit': i, 'explicit': e}) + '\n' for i, e in pairs))
  return path


def test_evaluate_counts_every_stage_from_the_same_noise(tiny_run, mine, tmp_path, monkeypatch):
  noises = []

  def spy(experiment, snapshot, judge, prompts, noise, draw=drawing.draw):
    noises.append((list(prompts), np.asarray(noise)))
    return draw(experiment, snapshot, judge, prompts, noise)

  monkeypatch.setattr(drawing, 'draw', spy)
  result = score_prompt_file(str(tiny_run), str(mine), str(tmp_path / 'out'), seed=3)
  assert json.loads((tmp_path / 'out' / 'evaluation.json').read_text()) == result
  assert list(result['stages']) == STAGES
  # Both forms of a prompt, at every stage, begin with one and the same noise; in batches of four,
  # of which the last is filled up.
  assert len(noises) == 6 and noises[0][1].shape == (4, 16, 64)
  asked = [(p['implicit'], p['explicit']) for p in result['pairs']]
  for first, second in zip(noises[::2], noises[1::2], strict=True):
    assert first[0] == [i for i, _ in asked] + [asked[0][1]]
    assert second[0] == [asked[1][1], asked[2][1]] * 2
    for noise, same in ((first[1][:3], noises[0][1][:3]), (first[1][3], noises[0][1][0])):
      assert (noise == same).all()
    assert (second[1][:2] == noises[0][1][1:3]).all()
  names = ['cat', 'butterfly', 'cat']
  assert [pair['id'] for pair in result['pairs']] == ['mine:1', 'mine:2', 'mine:3']
  for stage in STAGES:
    for form in ('implicit', 'explicit'):
      seen = [pair[f'{stage} {form}'] for pair in result['pairs']]
      right = sum(s == name for s, name in zip(seen, names, strict=True))
      score = result['stages'][stage][form]
      assert score['accuracy'] == right / 3 and score['n'] == 3
      assert 0 <= score['ci95'][0] <= right / 3 <= score['ci95'][1] <= 1
  assert Image.open(tmp_path / 'out' / 'grid.png').size[0] > 7 * 112


def test_evaluate_refuses_names_the_judge_does_not_know(tiny_run, tmp_path):
  path = tmp_path / 'mine.jsonl'
  path.write_text('{"implicit": "what purrs", "explicit": "cta"}\n')
  with pytest.raises(UserError, match=r"mine.jsonl: .*'cta' of 'mine:1' .* Near ones: .*cat"):
    score_prompt_file(str(tiny_run), str(path), str(tmp_path / 'out'), seed=0)
  path.write_text('{"implicit": "\u200b", "explicit": "cat"}\n', encoding='utf-8')
  with pytest.raises(UserError, match="mine.jsonl, line 1: the field 'implicit' is empty"):
    score_prompt_file(str(tiny_run), str(path), str(tmp_path / 'out'), seed=0)
  assert not (tmp_path / 'out').exists()


def test_evaluate_refuses_what_it_cannot_score_before_it_draws(
  tiny_model_dir, mine, tmp_path, monkeypatch
):
  monkeypatch.setattr(drawing, 'draw', lambda *unused: pytest.fail('drawn'))
  model = tmp_path / 'model'
  shutil.copytree(tiny_model_dir, model)
  settings = json.loads((model / 'eru_jax.json').read_text())
  (model / 'eru_jax.json').write_text(json.dumps(settings | {'resolution': 32}))
  with pytest.raises(UserError, match='draws pictures of 32 x 32 .* knows those of 64 x 64 only'):
    score_prompt_file(str(model), str(mine), str(tmp_path / 'out'), seed=0)
  assert not (tmp_path / 'out').exists()
  monkeypatch.setattr(models, 'open_model', lambda *_, **__: pytest.fail('loaded'))
  for output in (mine, mine / 'out'):
    with pytest.raises(UserError, match=f'written to {output}: Not a directory. Choose another'):
      score_prompt_file('emoji_base', str(mine), str(output), seed=0)
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  with pytest.raises(UserError, match='There is no prompt file .*/home/nosuch.jsonl'):
    score_prompt_file('emoji_base', '~/nosuch.jsonl', str(tmp_path / 'out'), seed=0)


# What train and evaluate share, on a world whose pictures are known beforehand.


class Stub:
  """Stands in for `generate`: what each prompt's picture shows is written in the prompt."""

  def __init__(self, shade):
    self.shade, self.asked = shade, []

  def __call__(self, experiment, snapshot, judge, prompts, noise_name, noise_rows=None):
    self.asked.append((noise_name, None if noise_rows is None else list(noise_rows)))
    shown = np.array([int(prompt.split()[-1]) for prompt in prompts], np.int32)
    images = np.full((len(prompts), 2, 2, 3), self.shade, np.uint8)
    return evaluation.Generated(images, shown)


def stub_experiment():
  """Five classes; in each prompt, the class its picture will show."""
  from eru_jax.data.emoji_knowledge import PairTable
  from eru_jax.data.pairs import KnowledgePair

  def table(split, shown, answers):
    pairs = [KnowledgePair(f'{split} shows {s}', f'anchor {a}', split=split)
             for s, a in zip(shown, answers, strict=True)]  # fmt: skip
    return PairTable(tuple(pairs), np.array(answers, np.int32))

  splits = {
    'explicit': table('explicit', [0, 1, 2, 3], [0, 1, 2, 4]),
    'train': table('train', [0] * 7, [0, 1, 0, 1, 0, 1, 0]),
    'wording': table('wording', [1, 2], [0, 0]),
    'unrelated': table('unrelated', [4, 4], [4, 4]),
    'my own/split': table('my own/split', [3], [3]),
  }
  pictures = types.SimpleNamespace(images=np.zeros((5, 2, 2, 3), np.uint8))
  config = types.SimpleNamespace(
    evaluation=types.SimpleNamespace(max_prompts=4, gallery=2, seed=1, batch_size=4)
  )
  world = types.SimpleNamespace(splits=splits, pictures=pictures)
  return types.SimpleNamespace(world=world, config=config)


def evaluate_stub(monkeypatch, shade, base=None):
  stub = Stub(shade)
  monkeypatch.setattr(evaluation, 'generate', stub)
  return evaluation.evaluate(stub_experiment(), None, object(), base), stub


def test_accuracy_and_drift_equal_a_count_by_hand(monkeypatch):
  base, stub = evaluate_stub(monkeypatch, shade=100)
  scores = base.scores
  # Of the seven training prompts four are drawn, evenly spread: rows 0, 2, 4 and 6, all class 0.
  assert {k: (v['accuracy'], v['n']) for k, v in scores.items() if k != 'unrelated_drift'} == {
    'explicit': (0.75, 4), 'train': (1.0, 4), 'wording': (0.0, 2), 'unrelated': (1.0, 2),
    'my own/split': (1.0, 1),
  }  # fmt: skip
  assert scores['unrelated_drift'] == 0
  # Wilson (1927) for 3 of 4, by hand.
  np.testing.assert_allclose(scores['explicit']['ci95'], [0.300636, 0.954413], atol=1e-5)
  later, later_stub = evaluate_stub(monkeypatch, shade=151, base=base)
  np.testing.assert_allclose(later.scores['unrelated_drift'], 51 / 255, rtol=1e-6)
  # The same noise at every stage: the same names, no stage in them; anchors are the base's alone.
  plain = [asked for asked in stub.asked if asked[1] is None]
  splits = ('explicit', 'train', 'wording', 'unrelated', 'my own/split')
  assert later_stub.asked == plain == [(split, None) for split in splits]
  # An anchor starts from the noise of its implicit prompt's row.
  assert [asked for asked in stub.asked if asked[1]] == [
    ('train', [0, 3]), ('wording', [0, 1]), ('my own/split', [0])
  ]  # fmt: skip


def test_gallery_rows_tell_right_from_wrong(monkeypatch, tmp_path):
  base, _ = evaluate_stub(monkeypatch, shade=100)
  later, _ = evaluate_stub(monkeypatch, shade=151, base=base)
  stub = stub_experiment()
  rows = gallery.gallery_rows(stub, {'base': base, 'dk_dm': later})
  shown = {}
  for row in rows:
    shown.setdefault(row.split, []).append(row)
  assert list(shown)[:5] == ['wording', 'train', 'explicit', 'unrelated', 'my own/split']
  assert [len(shown[split]) for split in list(shown)[:5]] == [2, 2, 2, 2, 1]
  gallery.save_grids(tmp_path, rows)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'explicit.png', 'explicit_mistakes.png', 'my_own_split.png', 'train.png', 'unrelated.png',
    'wording.png',
  ]  # fmt: skip
  for row in shown['wording']:
    titles = [title for title, _, _ in row.pictures]
    assert titles == ['Base, explicit prompt', 'Base', 'After DK-DM']
    # The anchor is class 0 and drawn as such; both stages draw something else.
    assert [right for _, _, right in row.pictures] == [True, False, False]
    assert [int(image.flat[0]) for _, image, _ in row.pictures] == [100, 100, 151]
  assert [[right for _, _, right in row.pictures] for row in shown['explicit']] == [
    [True, True], [False, False]
  ]  # fmt: skip
  assert gallery.gallery_rows(stub, {}) == []


def test_noise_depends_on_seed_name_and_row_only():
  model = types.SimpleNamespace(latent_shape=(3, 2))
  noise = evaluation.start_noise(model, 1, 'train', np.arange(6))
  assert noise.shape == (6, 3, 2) and len(np.unique(noise)) == 36
  alone = evaluation.start_noise(model, 1, 'train', np.array([4]))
  np.testing.assert_array_equal(alone[0], noise[4])
  for other in ((2, 'train'), (1, 'wording')):
    assert (evaluation.start_noise(model, *other, np.arange(6)) != noise).all()


def test_pictures_do_not_depend_on_the_batch_size(tiny_model_dir):
  from eru_jax.training.restore import open_model

  prompts = ['red apple', 'butterfly', 'cat', 'ewe', 'honey pot']
  drawn = []
  for size in (2, 5):
    opened, snapshot, _ = open_model(str(tiny_model_dir), prompts)
    config = dataclasses.replace(
      opened.config,
      evaluation=dataclasses.replace(opened.config.evaluation, batch_size=size),
      sampling=dataclasses.replace(opened.config.sampling, num_steps=1),
    )
    opened = dataclasses.replace(opened, config=config)
    noise = evaluation.start_noise(snapshot.model, 0, 'x', np.arange(5))
    drawn.append(evaluation.draw(opened, snapshot, None, prompts, noise))
  np.testing.assert_allclose(drawn[0].latents, drawn[1].latents, atol=1e-4)
  assert np.abs(drawn[0].images.astype(int) - drawn[1].images).max() <= 1
