"""The diagnosis: its measures against closed forms, its features against diffusers, its report."""

import dataclasses
import functools
import itertools
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_flux
from test_commands import refusal

from eru_jax import similarity
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError
from eru_jax.models import flux, layers, lora
from eru_jax.training import diagnosing, diagnosis
from eru_jax.training import experiment as experiment_lib
from eru_jax.training.diagnosing import diagnose_model
from eru_jax.training.report import ReportData, write_diagnosis, write_report
from eru_jax.training.report_structure import undefined
from eru_jax.training.restore import open_model
from eru_jax.training.run import train


@pytest.fixture
def rng():
  return np.random.default_rng(0)


# Measures.


def test_distances_are_exact_far_from_the_origin(rng):
  x, y = rng.normal(size=(5, 7)), rng.normal(size=(4, 7))
  wanted = np.linalg.norm(x[:, None] - y[None], axis=-1)
  np.testing.assert_allclose(similarity.distances(x + 1e6, y + 1e6), wanted, rtol=1e-6)


def test_distances_in_units_of_the_anchors():
  # The corners of a square: sides 1 (four) and diagonals sqrt(2) (two).
  square = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
  unit = similarity.typical_distance(square)
  assert unit == pytest.approx((4 + 2 * np.sqrt(2)) / 6)
  assert similarity.central_distance(square, unit) == pytest.approx(np.sqrt(0.5) / unit)
  own = square[[0, 0, 3]]
  assert similarity.relative_distance(own, own, unit) == 0
  moved = own + [[3, 4], [0, 0], [0, 1]]
  assert similarity.relative_distance(moved, own, unit) == pytest.approx(2 / unit)
  # In many directions alike, a feature that says nothing is sqrt(1/2) away.
  cloud = np.random.default_rng(1).normal(size=(200, 2000))
  unit = similarity.typical_distance(cloud)
  assert similarity.central_distance(cloud, unit) == pytest.approx(np.sqrt(0.5), abs=0.01)


def test_retrieval_of_planted_anchors(rng):
  anchors = rng.normal(size=(20, 8))
  own = np.repeat(np.arange(20), 3)
  features = anchors[own] + 0.01 * rng.normal(size=(60, 8))
  assert similarity.retrieval(features, anchors, own).all()
  lost = np.arange(60) % 5 == 0
  features[lost] = anchors[(own[lost] + 1) % 20]
  np.testing.assert_array_equal(similarity.retrieval(features, anchors, own), ~lost)
  # What says nothing finds nothing, and neither does anything among anchors that coincide.
  assert not similarity.retrieval(features, np.ones((20, 8)), own).any()


def test_cka_sees_structure_and_neither_rotation_nor_scale_nor_offset(rng):
  x = rng.normal(size=(40, 6))
  rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  assert similarity.linear_cka(x, x) == pytest.approx(1)
  assert similarity.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
  # Its form for two channels' worth of kernels: half of one structure, half of another.
  y = rng.normal(size=(40, 6))
  mixed = similarity.linear_cka(np.hstack([x, y]), x)
  assert 0.5 < mixed < 0.9


def test_cka_has_no_bias_where_channels_are_many(rng):
  found = [
    similarity.linear_cka(rng.normal(size=(32, 400)), rng.normal(size=(32, 300)))
    for _ in range(100)
  ]
  # The usual estimator says 0.9 here.
  assert abs(np.mean(found)) < 0.02 and min(found) < 0


def test_cka_is_the_formula_of_song_et_al(rng):
  x, y = rng.normal(size=(9, 3)), rng.normal(size=(9, 4))
  x, y = x - x.mean(0), y - y.mean(0)

  def hsic(a, b):
    # Over all four different rows: the definition that the closed form sums up.
    k, l_ = a @ a.T, b @ b.T
    values = [
      k[i, j] * (l_[i, j] + l_[q, r] - 2 * l_[i, q])
      for i, j, q, r in itertools.permutations(range(9), 4)
    ]
    return np.mean(values)

  wanted = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
  assert similarity.linear_cka(x, y) == pytest.approx(wanted)


def test_cka_is_undefined_for_few_or_equal_rows():
  assert np.isnan(similarity.linear_cka(np.eye(3), np.eye(3)))
  assert np.isnan(similarity.linear_cka(np.ones((5, 2)), np.eye(5)))


def test_principal_plane_is_that_of_the_covariance(rng):
  x = rng.normal(size=(50, 5)) * [1, 5, 0.1, 3, 0.2] + 9
  plane = similarity.principal_plane(x)
  variances, axes = np.linalg.eigh(np.cov(x.T))
  np.testing.assert_allclose(plane.explained, variances[:-3:-1] / variances.sum())
  np.testing.assert_allclose(np.abs(plane.axes.T @ axes[:, :-3:-1]), np.eye(2), atol=1e-9)
  assert (plane.axes[np.abs(plane.axes).argmax(0), [0, 1]] > 0).all()
  np.testing.assert_allclose(plane.project(x).mean(0), 0, atol=1e-9)
  # One row, or rows that are all equal, have a plane too: everything lies in its middle.
  np.testing.assert_allclose(similarity.principal_plane(x[:1]).project(x[:1]), 0)
  assert (similarity.principal_plane(np.ones((4, 3))).explained == 0).all()


@pytest.mark.parametrize(
  ('call', 'words'),
  [
    (lambda: similarity.distances(np.zeros(3), np.zeros((2, 3))), r'shape \(3,\), but must be'),
    (lambda: similarity.linear_cka(np.zeros((0, 3)), np.zeros((2, 3))), r'shape \(0, 3\)'),
    (lambda: similarity.typical_distance(np.zeros((1, 3))), 'one anchor only'),
    (lambda: similarity.linear_cka(np.eye(4), np.eye(5)), 'not of 4 and 5'),
    (lambda: similarity.relative_distance(np.eye(4), np.eye(5), 1), 'not row by row'),
    (lambda: similarity.retrieval(np.eye(3), np.eye(3), [0, 1, 3]), 'rows below 3'),
    (lambda: similarity.retrieval(np.eye(3), np.eye(3), [0, 1]), 'Anchors of 3 features'),
    (lambda: similarity.principal_plane(np.eye(4)[:, :1]), 'no plane to show'),
  ],
)
def test_measures_refuse(call, words):
  with pytest.raises(UserError, match=words):
    call()


# Features.


@functools.cache
def _program(collections, **options):
  model = flux.FluxTransformer(test_flux._config(True), **options)
  return jax.jit(functools.partial(model.apply, mutable=collections))


def _features(variables, inputs, collections=('features',), **options):
  *inputs, _ = inputs
  return _program(collections, **options)(variables, *inputs)[1]


@pytest.mark.parametrize('options', [{}, {'scan': False}, {'remat': 'full'}])
def test_features_equal_those_that_hooks_record_in_diffusers(options):
  reference, inputs = test_flux._reference(True), test_flux._inputs()
  torch = pytest.importorskip('torch')
  x, t, conditioning, ids, scale, _ = inputs
  recorded = {'transformer_blocks': [], 'single_transformer_blocks': []}
  hooks = [
    block.register_forward_hook(lambda *call, to=recorded[name]: to.append(call[-1]))
    for name in recorded
    for block in getattr(reference, name)
  ]
  with torch.no_grad():
    reference(
      hidden_states=torch.from_numpy(x),
      encoder_hidden_states=torch.from_numpy(conditioning.tokens),
      pooled_projections=torch.from_numpy(conditioning.pooled),
      timestep=torch.from_numpy(t),
      img_ids=torch.from_numpy(ids).float(),
      txt_ids=torch.zeros(conditioning.tokens.shape[1], 3),
      guidance=torch.from_numpy(scale),
    )
  for hook in hooks:
    hook.remove()
  ours = _features({'params': test_flux._params(True)}, inputs, **options)['features']
  assert set(ours) == set(recorded)
  for stack, outputs in recorded.items():
    # Both kinds of block return (text, image).
    for place, stream in enumerate(('text', 'image')):
      wanted = np.stack([output[place].mean(1).numpy() for output in outputs])
      assert wanted.shape == (len(outputs), 2, 32)
      assert test_flux._distance(ours[stack][stream], wanted) <= test_flux.TOLERANCE


def test_features_of_masked_text_are_of_its_real_tokens():
  variables = {'params': test_flux._params(True)}
  x, t, text, ids, guidance, direction = test_flux._inputs(length=4)
  mask = np.arange(4)[None].repeat(2, 0) < np.array([[3], [0]])
  inputs = (x, t, text.replace(mask=mask), ids, guidance, direction)
  found = _features(variables, inputs, ('features', 'intermediates'))
  features, full = found['features'], found['intermediates']
  for stack, tokens in (
    ('transformer_blocks', full['transformer_blocks']['text']),
    ('single_transformer_blocks', full['single_transformer_blocks']['joint'][:, :, :4]),
  ):
    np.testing.assert_allclose(features[stack]['text'][:, 0], tokens[:, 0, :3].mean(1), rtol=1e-5)
    assert (np.asarray(features[stack]['text'][:, 1]) == 0).all()


def test_unasked_features_are_not_even_traced(monkeypatch):
  x, t, text, ids, guidance, _ = test_flux._inputs()
  init = functools.partial(test_flux._init, flux.FluxTransformer(test_flux._config()))
  params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))

  def trace(scan):
    model = flux.FluxTransformer(test_flux._config(), scan=scan)
    return str(jax.make_jaxpr(model.apply)({'params': params}, x, t, text, ids, guidance))

  with_features = [trace(scan) for scan in (True, False)]
  monkeypatch.setattr(flux, 'feature', lambda *_: None)
  assert with_features == [trace(scan) for scan in (True, False)]


def test_features_of_an_adapter():
  params, inputs = test_flux._params(True), test_flux._inputs()
  rules = (lora.LoraRule('.*', 2, 2.0),)
  adapter = jax.jit(lambda: lora.init(jax.random.key(0), params, rules))()
  base = _features({'params': params}, inputs)

  def adapted(adapter):
    return _features({'params': params, 'lora': lora.variables(adapter, rules)}, inputs)

  fresh = adapted(adapter)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), fresh, base)
  trained = jax.tree.map(lambda z: np.asarray(z) + 0.1, adapter)
  merged = _features({'params': jax.jit(lambda: lora.merge(params, trained, rules))()}, inputs)
  moved = adapted(trained)
  for one, two, still in zip(*map(jax.tree.leaves, (moved, merged, base)), strict=True):
    assert test_flux._distance(one, two) <= 1e-4
    assert test_flux._distance(one, still) > 1e-2


def test_a_feature_is_one_vector_an_example():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      layers.feature(self, 'image', x)
      return x

  x = jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4)
  _, found = Block().apply({}, x, mutable=['features'])
  np.testing.assert_array_equal(found['features']['image'], x.astype(jnp.float32).mean(1))
  assert found['features']['image'].dtype == jnp.float32


# The diagnosis.


@pytest.fixture(scope='module', autouse=True)
def opened_once():
  """World, text encoder and embeddings are those of every test here: they are read once."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ('load_emoji_world', 'load_minilm', 'EmbeddingCache'):
      patch.setattr(experiment_lib, name, functools.cache(getattr(experiment_lib, name)))
    yield


SPLITS = ('train', 'wording')
PAIRS = [
  KnowledgePair('the fruit that keeps the doctor away', 'red apple', split='train'),
  KnowledgePair('what a caterpillar becomes', 'butterfly', split='train'),
  KnowledgePair('what bees make', 'honey pot', split='train'),
  KnowledgePair('the animal that gives us wool', 'ewe', split='train'),
  KnowledgePair('the insect that was once a caterpillar', 'butterfly', split='wording'),
]


@pytest.fixture(scope='module')
def opened(tiny_model_dir):
  """Experiment, base, and a student whose backbone is the base's, moved a little."""
  experiment, base, _ = open_model(
    str(tiny_model_dir), [text for p in PAIRS for text in (p.implicit, p.explicit)]
  )
  moved = jax.tree.map(lambda x: 1.05 * x, base.backbone)
  return experiment, base, dataclasses.replace(base, trainable=moved)


def groups():
  return diagnosis.pairs_to_compare({s: [p for p in PAIRS if p.split == s] for s in SPLITS}, 8)


@pytest.fixture(scope='module')
def found(opened):
  experiment, base, student = opened
  stages = [('base', base), ('dk_dm', student)]
  return diagnosis.diagnose(experiment, stages, groups(), (0.3, 0.9))


def test_the_base_is_at_its_own_anchors(found):
  assert found.timesteps == (0.9, 0.3)
  assert found.blocks == ('double 1', 'single 1') and found.stages == ('base', 'dk_dm')
  assert found.anchors == 4
  assert found.prompts == {'train': 4, 'wording': 1, diagnosis.ANCHORS: 4}
  for stream in diagnosis.STREAMS:
    same = found.values[diagnosis.ANCHORS]['base'][stream]
    np.testing.assert_allclose(same['distance'], 0, atol=1e-6)
    np.testing.assert_allclose(same['cka'], 1)
    assert (same['retrieval'] == 1).all()
    assert (found.values[diagnosis.ANCHORS]['dk_dm'][stream]['distance'] > 1e-3).all()
    assert (found.values['train']['base'][stream]['distance'] > 1e-3).all()
    # One prompt has no structure.
    assert np.isnan(found.values['wording']['base'][stream]['cka']).all()
  picture = found.picture
  assert (picture.split, picture.timestep, picture.block) == ('wording', 0.9, 1)
  assert picture.names == ['the insect that was once a caterpillar → butterfly']
  assert picture.own.tolist() == [1] and picture.anchors.shape == (4, 2)
  np.testing.assert_allclose(picture.anchors.mean(0), 0, atol=1e-6)


def test_features_are_those_of_the_states_and_of_the_model(opened, rng):
  experiment, base, student = opened
  prompts = ['red apple', 'what bees make', 'ewe']
  timesteps = (0.9, 0.3)
  states = rng.normal(size=(2, *base.model.latent_shape)).astype(np.float32)
  small = dataclasses.replace(
    experiment,
    config=dataclasses.replace(
      experiment.config,
      evaluation=dataclasses.replace(experiment.config.evaluation, batch_size=2),
    ),
  )
  blocks, features = diagnosis.prompt_features(small, student, prompts, states, timesteps)
  assert blocks == ['double 1', 'single 1']
  assert {s: x.shape for s, x in features.items()} == dict.fromkeys(
    diagnosis.STREAMS, (2, 2, 3, 32)
  )
  direct = jax.jit(diagnosis._forward, static_argnums=0)(
    student.model, student.trainable, None, np.stack([states[1]] * 2), np.float32([0.3, 0.3]),
    experiment.conditioning(['ewe', 'cat']),
  )  # fmt: skip
  for stream in diagnosis.STREAMS:
    wanted = np.concatenate([direct[stack][stream][:, 0] for stack in student.model.family.stacks])
    assert test_flux._distance(features[stream][1, :, 2], wanted) <= 1e-5


def test_json_has_no_nan_and_names_everything(found):
  text = json.dumps(found.to_json(), allow_nan=False)
  values = json.loads(text)
  assert values['chance'] == 0.25 and values['stages'] == ['base', 'dk_dm']
  assert values['values']['wording']['base']['image']['cka'] == [[None, None], [None, None]]
  assert values['values']['train']['dk_dm']['text']['distance'][0][1] > 0
  assert values['picture']['prompts'].keys() == {'base', 'dk_dm'}


def test_page_and_report(found, tmp_path):
  from test_report import Page

  page = write_diagnosis(tmp_path / 'diagnosis.html', 'A <run>', found).read_text()
  words = Page(page).text
  lacking = 'A dash is what is not defined: CKA needs at least 4 prompts, and wording has 1.'
  for expected in (
    'A <run>', 'Knowledge structure', 'DK-DM', 'unseen wordings, as a map', 'CKA –', lacking,
  ):  # fmt: skip
    assert expected in words.replace('\xa0', ' ')
  assert page.count('<svg') == 5 and '<script' not in page
  # Neither in words nor in what charts are described by.
  assert re.search(r'\bnan\b', page, re.IGNORECASE) is None
  assert 'Base not defined; DK-DM not defined.' in page
  report = write_report(tmp_path, ReportData('t', {}, diagnosis=found)).read_text()
  assert 'href="#structure"' in report and report.count('<svg') == 5
  ids = [a['id'] for _, a in Page(report).tags if 'id' in a]
  assert len(ids) == len(set(ids))
  without = write_report(tmp_path, ReportData('t', {})).read_text()
  assert 'Knowledge structure' not in without


def test_table_shows_a_dash_and_why(found):
  lines = diagnosing.describe(found).splitlines()
  assert 'nan' not in '\n'.join(lines)
  wording = next(i for i, line in enumerate(lines) if line.startswith('wording'))
  assert lines[wording + 2].split() == ['cka', '–', '–']
  assert lines[-1].endswith('CKA needs at least 4 prompts, and wording has 1.')
  enough = dataclasses.replace(
    found, prompts={s: n for s, n in found.prompts.items() if s != 'wording'}
  )
  assert '–' not in diagnosing.describe(enough) and not undefined(enough)
  # Four prompts whose features are equal: another reason.
  many = dataclasses.replace(found, prompts={**found.prompts, 'wording': 4})
  assert 'equal for all prompts' in undefined(many) and 'CKA needs' not in undefined(many)


def test_diagnosis_says_how_far_it_is(opened, capsys):
  experiment, base, student = opened
  capsys.readouterr()
  diagnosis.diagnose(experiment, [('base', base), ('dk_dm', student)], groups(), (0.9, 0.3))
  told = capsys.readouterr().err.splitlines()
  # Nine prompts at two timesteps.
  for name, total in (('anchors', 4), ('base', 18), ('dk_dm', 18)):
    last = [line for line in told if line.startswith(f'diagnosis: {name} ')][-1]
    assert f'{total}/{total}' in last


@pytest.mark.parametrize(
  ('stages', 'pairs', 'timesteps', 'words'),
  [
    (True, PAIRS[:1], (0.9,), 'There are 1 different explicit prompts'),
    (True, [], (0.9,), 'There are 0 different explicit prompts'),
    (True, PAIRS, (0.9, 0.0), 'Timesteps are 0.9, 0.0: give numbers above 0'),
    (True, PAIRS, (float('nan'),), 'Timesteps are nan'),
    (True, PAIRS, (), 'Timesteps are missing'),
    (False, PAIRS, (0.9,), 'has not finished a stage'),
  ],
)
def test_diagnosis_refuses(opened, stages, pairs, timesteps, words):
  experiment, base, _ = opened
  with pytest.raises(UserError, match=words):
    diagnosis.diagnose(experiment, [('base', base)] * stages, {'train': pairs}, timesteps)


def test_implicit_splits_only_evenly_spread():
  splits = {
    'mine': PAIRS, 'explicit': PAIRS, 'unrelated': PAIRS, 'fact': [], 'train': PAIRS,
  }  # fmt: skip
  found = diagnosis.pairs_to_compare(splits, 2)
  assert list(found) == ['train', 'mine']
  assert found['mine'] == [PAIRS[0], PAIRS[4]]


# The command, and the end of a run.


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'timesteps': ['x']}, '--timesteps=x: write numbers with commas between'),
    ({'timesteps': ['2']}, 'give numbers above 0'),
    ({'prompts': 'nosuch.jsonl'}, 'no prompt file nosuch.jsonl'),
    ({'model': 'tiny_flux'}, 'tiny_flux has no prompts of its own.* with --prompts=FILE'),
    ({'prompts': 'one.jsonl'}, '--prompts=one.jsonl: .* 1 different explicit prompts'),
    ({'model': 'nosuch'}, '--model=nosuch is neither the workdir'),
    ({'output': 'file'}, 'Not a directory'),
  ],
)
def test_command_refuses(options, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').touch()
  pairs = [{'implicit': i, 'explicit': 'cat', 'split': 'fact'} for i in ('it purrs', 'it mews')]
  (tmp_path / 'one.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
  options = {'model': 'emoji_base', 'output': 'out', **options}
  with pytest.raises(UserError, match=words):
    diagnose_model(**options)
  assert not (tmp_path / 'out').exists()


def test_bad_flags(tmp_path):
  line = refusal('--model=m', '--max_prompts=0', directory=tmp_path, module='eru_jax.diagnose')
  assert '--max_prompts=0' in line
  assert '--model and --output must be given' in refusal(
    directory=tmp_path, module='eru_jax.diagnose'
  )


def test_command_on_a_model_directory(tiny_model_dir, tiny_pairs, tmp_path, capsys):
  diagnose_model(str(tiny_model_dir), str(tmp_path), prompts=str(tiny_pairs), timesteps=['0.5'])
  assert {path.name for path in tmp_path.iterdir()} == {'diagnosis.json', 'diagnosis.html'}
  values = json.loads((tmp_path / 'diagnosis.json').read_text())
  assert values['stages'] == ['base'] and values['anchors'] == 5 and values['timesteps'] == [0.5]
  printed = capsys.readouterr().out
  assert 'train (4)' in printed and 'retrieval' in printed and 'chance 20.0 %' in printed


def test_the_end_of_a_run(tiny_run, tiny_config, tmp_path):
  """A run whose report was made without a diagnosis gets one, equal to the command's."""
  workdir = tmp_path / 'run'
  shutil.copytree(tiny_run, workdir)
  assert 'Knowledge structure' not in (workdir / 'report.html').read_text()
  (workdir / 'summary.json').unlink()
  tiny_config['evaluation']['diagnosis'] = 3
  train(tiny_config, str(workdir))
  assert 'Knowledge structure' in (workdir / 'report.html').read_text()
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['seconds']['knowledge structure'] > 0
  found = json.loads((workdir / 'diagnosis.json').read_text())
  assert found['stages'] == ['base', 'dk_dm', 'no_rl']
  assert found['prompts'] == {'train': 3, 'wording': 1, 'fact': 1, '(anchors)': 5}
  seed = 1234
  again = diagnose_model(str(workdir), str(tmp_path / 'out'), max_prompts=3, seed=seed).to_json()
  assert again['prompts'] == found['prompts']
  for stage in found['stages']:
    np.testing.assert_allclose(
      again['values']['train'][stage]['image']['distance'],
      found['values']['train'][stage]['image']['distance'],
      atol=2e-4,
    )
