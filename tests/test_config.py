"""The config schema: strict, and every mistake answered by one sentence that names it."""

import dataclasses
import json
import pathlib

import ml_collections
import pytest

from eru_jax.config_file import load_config
from eru_jax.errors import UserError
from eru_jax.models.attention import IMPLEMENTATIONS
from eru_jax.models.flux import FluxConfig
from eru_jax.models.lora import LoraRule
from eru_jax.models.stack import REMAT_POLICIES
from eru_jax.training import config as config_lib
from eru_jax.training.config import (
  STAGE_CONFIGS,
  ExperimentConfig,
  ModelConfig,
  SamplingConfig,
  from_mapping,
  to_json,
)
from eru_jax.training.experiment import resolve, resolve_model

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


def parse(**values):
  return from_mapping(ExperimentConfig, {'stages': ('dk_dm', 'no_rl'), **values})


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'sed': 1}, r'unknown key `sed`; did you mean `seed`\?'),
    ({'xyz': 1}, r'unknown key `xyz`; known: adapter, autoencoder, data, dk_dm'),
    ({'dk_dm': {'num_step': 1}}, r'unknown key `dk_dm.num_step`; did you mean `dk_dm.num_steps`\?'),
    (
      {'no_rl': {'optimizer': {'learning_rat': 1.0}}},
      r'unknown key `no_rl.optimizer.learning_rat`; did you mean `no_rl.optimizer.learning_rate`',
    ),
    ({'lora': [{'pattern': 'x', 'rank': 1, 'alpha': 1.0, 'beta': 2}]}, r'unknown key `lora\[0\].b'),
    ({'lora': [{'pattern': 'x', 'rank': 1}]}, r'`lora\[0\].alpha` is missing'),
    ({'lora': {'pattern': 'x'}}, r'`lora` is .* must be a list'),
    ({'seed': 'one'}, r"`seed` is 'one' but must be an int"),
    ({'seed': 1.0}, r'`seed` is 1.0 but must be an int'),
    ({'seed': True}, r'`seed` is True but must be an int'),
    ({'title': 3}, r'`title` is 3 but must be a str'),
    ({'model': {'scan': 1}}, r'`model.scan` is 1 but must be a bool'),
    ({'model': 3}, r'`model` is 3 but must be a mapping'),
    ({'model': {'architecture': [1]}}, r'`model.architecture` is \[1\] but must be a mapping'),
    ({'dk_dm': {'mixture': 'half'}}, r"`dk_dm.mixture` is 'half' but must be a float"),
    ({'dk_dm': {'mixture': None}}, r'`dk_dm.mixture` is None but must be a float'),
    ({'stages': 'dk_dm'}, r"`stages` is 'dk_dm' but must be a list"),
    ({'stages': ('dk_dm', 3)}, r'`stages\[1\]` is 3 but must be a str'),
    ({'stages': ('dk_md',)}, r"`stages` is \['dk_md'\] but must name different stages out of \["),
    ({'stages': ()}, r'`stages` is \[\]'),
    ({'stages': ('dk_dm', 'dk_dm')}, r'must name different stages'),
    ({'dk_dm': {3: 1}}, 'the key 3 in `dk_dm` must be a str'),
    ({'model': {'architecture': {3: 1}}}, 'the key 3 in `model.architecture` must be a str'),
  ],
)
def test_bad_keys_and_types(values, message):
  with pytest.raises(UserError, match=message) as caught:
    parse(**values)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('stages', 'message'),
  [
    (('dk_dm', 'flow_matching'), r"must be in the order \['flow_matching', 'dk_dm'\]"),
    (('no_rl', 'dk_dm'), r"must be in the order \['dk_dm', 'no_rl'\]"),
    (('dk_dm', 'autoencoder'), r"must be in the order \['autoencoder', 'dk_dm'\]"),
    (('autoencoder', 'no_rl'), 'between autoencoder and no_rl there must be flow_matching'),
  ],
)
def test_stages_that_do_not_build_on_each_other(stages, message):
  with pytest.raises(UserError, match=message) as caught:
    parse(stages=stages)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('stages', 'message'),
  [
    (('dk_dm',), 'from scratch dk_dm needs autoencoder and flow_matching before it'),
    (('autoencoder', 'dk_dm'), 'from scratch dk_dm needs flow_matching before it'),
    (('flow_matching',), 'from scratch flow_matching needs autoencoder before it'),
    (('autoencoder', 'flow_matching', 'no_rl'), 'from scratch no_rl needs reward before it'),
  ],
)
def test_stages_from_scratch_need_what_a_model_would_bring(stages, message):
  with pytest.raises(UserError, match=message) as caught:
    parse(stages=stages, model={'source': 'scratch'})
  assert '\n' not in str(caught.value)
  pretrained = tuple(STAGE_CONFIGS)
  assert parse(stages=pretrained, model={'source': 'scratch'}).stages == pretrained
  for some in (('autoencoder',), ('reward',), ('autoencoder', 'flow_matching', 'dk_dm')):
    assert parse(stages=some, model={'source': 'scratch'}).stages == some
  for some in (('flow_matching',), ('no_rl',), ('flow_matching', 'no_rl')):
    assert parse(stages=some).stages == some


def test_missing_stages():
  with pytest.raises(UserError, match='the key None in `config` must be a str'):
    from_mapping(ExperimentConfig, {None: 1})
  with pytest.raises(UserError, match='`stages` is missing'):
    from_mapping(ExperimentConfig, {})


COMMON = [
  ('num_steps', 0),
  ('accumulation', 0),
  ('save_every', 0),
  ('log_every', -1),
]
OUT_OF_RANGE = {
  'autoencoder': [('batch_size', 0), ('kl_weight', -1.0)],
  'reward': [('batch_size', 0), ('label_smoothing', 1.0)],
  'flow_matching': [
    ('batch_size', 0),
    ('pooled_only', 0.9),
    ('pooled_only', -0.1),
    ('text_noise', -0.1),
    ('time_std', 0.0),
  ],
  'dk_dm': [
    ('teacher_batch', 0),
    ('states_per_rollout', 0),
    ('states_per_rollout', 99),
    ('mixture', 1.5),
    ('mixture_ramp', -0.5),
    ('preservation_weight', -1.0),
    ('preserved_names', -1),
    ('teacher_seeds', 0),
    ('text_noise', -0.1),
    ('pooled_only', 1.1),
    ('time_std', -1.0),
  ],
  'no_rl': [
    ('prompts_per_step', 0),
    ('prompts_per_step', -2),
    ('images_per_prompt', 0),
    ('rollout_steps', 0),
    ('timesteps_per_image', 0),
    ('updates_per_step', 0),
    ('explicit_share', 1.1),
    ('text_noise', -0.1),
    ('beta', 0.0),
    ('beta', 1.1),
    ('reference_weight', -1.0),
    ('reward_high', 0.0),
    ('behaviour_inertia', -0.1),
    ('behaviour_cap', 1.1),
    ('time_min', 1.0),
  ],
}


@pytest.mark.parametrize(
  ('stage', 'key', 'value'),
  [(stage, *case) for stage, cases in OUT_OF_RANGE.items() for case in (*COMMON, *cases)]
  + [(stage, 'optimizer', {'learning_rate': -1.0}) for stage in STAGE_CONFIGS],
)
def test_out_of_range(stage, key, value):
  with pytest.raises(UserError, match=rf'{key}.* is .* but must be') as caught:
    parse(**{stage: {key: value}})
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('stage', 'key'),
  [('autoencoder', 'batch_size'), ('reward', 'batch_size'), ('flow_matching', 'batch_size'),
   ('dk_dm', 'teacher_batch'), ('no_rl', 'prompts_per_step')],
)  # fmt: skip
def test_batches_divide_by_accumulation(stage, key):
  with pytest.raises(UserError, match=f'`{key}` is .* multiple of'):
    parse(**{stage: {'accumulation': 7}})


def test_rollouts_divide_by_updates():
  with pytest.raises(UserError, match='`prompts_per_step` is 16 .* multiple of updates_per_step'):
    parse(no_rl={'updates_per_step': 3})


@pytest.mark.parametrize(
  ('section', 'key', 'value'),
  [
    ('model', 'resolution', 40),
    ('model', 'text_encoder', 't6'),
    ('model', 'text_length', 2),
    ('model', 'dtype', 'float16'),
    ('model', 'remat', 'atn'),
    ('model', 'attention', 'flash'),
    ('sampling', 'num_steps', 0),
    ('sampling', 'shift_mu', 1000.0),
    ('sampling', 'shift_mu', -20.5),
    ('sampling', 'guidance', -1.0),
    ('sampling', 'cfg_scale', -1.0),
    ('no_rl', 'cfg_scale', -1.0),
    ('data', 'wordings_per_fact', 13),
    ('data', 'max_facts', -1),
    ('evaluation', 'max_prompts', 0),
    ('evaluation', 'batch_size', 0),
    ('evaluation', 'gallery', -1),
    ('evaluation', 'seed', -1),
    ('evaluation', 'seed', 2**32),
  ],
)
def test_sections_out_of_range(section, key, value):
  with pytest.raises(UserError, match=f'`{key}` is {value!r} but must be'):
    parse(**{section: {key: value}})


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_seeds_are_what_a_jax_key_tells_apart(seed):
  with pytest.raises(UserError, match=f'`seed` is {seed} but must be from 0 to 4294967295'):
    parse(seed=seed)
  assert parse(seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 10**400])
@pytest.mark.parametrize(
  ('where', 'section'),
  [
    ('dk_dm.time_mean', lambda value: {'dk_dm': {'time_mean': value}}),
    (
      'no_rl.optimizer.learning_rate',
      lambda value: {'no_rl': {'optimizer': {'learning_rate': value}}},
    ),
    ('sampling.shift_mu', lambda value: {'sampling': {'shift_mu': value}}),
    (r'lora\[0\].alpha', lambda value: {'lora': [{'pattern': '.', 'rank': 1, 'alpha': value}]}),
  ],
)
def test_floats_are_finite(where, section, value):
  with pytest.raises(UserError, match=f'`{where}` is {value!r} but must be finite'):
    parse(**section(value))


def test_floats_of_an_architecture_are_finite():
  with pytest.raises(UserError, match='`model.autoencoder.scaling_factor` is nan but must be fin'):
    parse(model={'autoencoder': {'scaling_factor': float('nan')}})


def test_what_models_can_do_is_what_configs_may_ask_for():
  for name in REMAT_POLICIES:
    assert parse(model={'remat': name}).model.remat == name
  for name in IMPLEMENTATIONS:
    assert parse(model={'attention': name}).model.attention == name


@pytest.mark.parametrize(
  ('key', 'hint'),
  [
    ('num_layer', r'did you mean `num_layers`\?'),
    ('head_dim', r'did you mean `attention_head_dim`\?'),
    ('xyz', 'known: in_channels, num_layers, .*, axes_dims_rope'),
  ],
)
def test_architecture_with_an_unknown_key(key, hint):
  with pytest.raises(UserError, match=rf'unknown key `{key}`; {hint}') as caught:
    FluxConfig.from_dict({key: 2})
  assert '\n' not in str(caught.value)


def test_architecture_as_diffusers_writes_it():
  written = FluxConfig(num_layers=2).to_dict()
  records = {'_diffusers_version': '0.30.0', '_name_or_path': 'x', 'out_channels': None}
  assert FluxConfig.from_dict(written | records) == FluxConfig(num_layers=2)


def model_directory(path, **settings):
  path.mkdir()
  (path / 'eru_jax.json').write_text(json.dumps({'family': 'flux', **settings}))
  return str(path)


def test_a_model_from_scratch_has_the_usual_text_and_size():
  found = resolve_model(ModelConfig(source='scratch'))
  assert (found.text_encoder, found.text_length, found.resolution) == ('minilm', 24, 64)
  given = ModelConfig(
    source='scratch', text_encoder='minilm_sentence', text_length=9, resolution=32
  )
  assert resolve_model(given) == given
  assert given.num_text_tokens == 1


def test_a_model_directory_says_what_it_was_made_with(tmp_path):
  own = {'text_encoder': 'minilm_sentence', 'text_length': 30, 'resolution': 128}
  source = model_directory(tmp_path / 'model', **own)
  found = resolve_model(ModelConfig(source=source))
  assert {name: getattr(found, name) for name in own} == own
  # What is resolved stays as it is, and saying what is so anyway does no harm.
  assert resolve_model(found) == found
  assert resolve_model(ModelConfig(source=source, resolution=64)).resolution == 64
  for name, value in (('text_encoder', 'minilm'), ('text_length', 24)):
    with pytest.raises(UserError, match=f'model.{name} is {value!r}, but the model in .* was mad'):
      resolve_model(ModelConfig(source=source, **{name: value}))


def test_a_model_directory_that_says_nothing_of_its_text(tmp_path):
  source = model_directory(tmp_path / 'model')
  found = resolve_model(ModelConfig(source=source, text_length=9))
  assert (found.text_encoder, found.text_length, found.resolution) == ('minilm', 9, 64)


@pytest.mark.parametrize(
  ('name', 'value'),
  [('text_encoder', ['minilm']), ('text_length', '24'), ('text_length', 2), ('resolution', None)],
)
def test_a_model_directory_that_says_what_cannot_be(name, value, tmp_path):
  source = model_directory(tmp_path / 'model', **{name: value})
  with pytest.raises(UserError, match=rf'eru_jax.json: {name} is .* but must be '):
    resolve_model(ModelConfig(source=source))


def test_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  model_directory(tmp_path / 'model')
  config = resolve(parse(model={'source': 'model'}, data={'pairs': 'my/pairs.jsonl'}))
  assert config.model.source == str(tmp_path / 'model')
  assert config.data.pairs == str(tmp_path / 'my' / 'pairs.jsonl')
  assert resolve(parse()).model.source == 'emoji_base'
  assert resolve(parse()).data.pairs == 'emoji_knowledge'
  assert resolve(parse(data={'pairs': '~/x'})).data.pairs == str(pathlib.Path.home() / 'x')
  with pytest.raises(UserError, match='There is no model directory nosuch: '):
    resolve(parse(model={'source': 'nosuch'}))


def test_bad_lora_rules():
  with pytest.raises(UserError, match='rank'):
    parse(lora=[{'pattern': 'x', 'rank': 0, 'alpha': 1.0}])
  with pytest.raises(UserError, match='no regular expression'):
    parse(lora=[{'pattern': '(', 'rank': 1, 'alpha': 1.0}])


def test_config_dicts_and_dicts_are_the_same():
  values = {'stages': ('dk_dm',), 'dk_dm': {'optimizer': {'learning_rate': 1}}, 'lora': ()}
  config = from_mapping(ExperimentConfig, ml_collections.ConfigDict(values))
  assert config == from_mapping(ExperimentConfig, values)
  # A whole number is as good as a float.
  assert config.dk_dm.optimizer.learning_rate == 1.0
  assert isinstance(config.dk_dm.optimizer.learning_rate, float)


def test_json_round_trip():
  config = parse(
    seed=3,
    lora=[{'pattern': 'attn', 'rank': 2, 'alpha': 4}],
    dk_dm={'num_steps': 7, 'optimizer': {'decay': 'cosine'}},
    model={'architecture': {'axes': (1, 2)}},
  )
  stored = json.loads(json.dumps(to_json(config)))
  assert from_mapping(ExperimentConfig, stored) == config
  assert 'autoencoder' not in stored and stored['dk_dm']['num_steps'] == 7


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_parse(path):
  config = from_mapping(ExperimentConfig, load_config(str(path), {}))
  stored = json.loads(json.dumps(to_json(config)))
  assert from_mapping(ExperimentConfig, stored) == config


def test_there_are_configs():
  assert CONFIGS


def test_every_field_is_documented():
  for cls in (ExperimentConfig, *STAGE_CONFIGS.values(), config_lib.ModelConfig):
    own = vars(cls).get('__annotations__', {})
    for field in dataclasses.fields(cls):
      assert field.name not in own or field.name in cls.__doc__, f'{cls.__name__}.{field.name}'


FILE = """
import ml_collections
def get_config(arg='none'):
  config = ml_collections.ConfigDict({'stages': ('dk_dm',), 'dk_dm': {'num_steps': 5}})
  config.title = arg
  return config
"""


def test_overrides(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text(FILE)
  values = load_config(
    f'{path}:big,slow',
    {
      'dk_dm.num_steps': '7',
      'dk_dm.optimizer.learning_rate': '1e-3',
      'data.pairs': 'a/b c.jsonl',
      'model.scan': 'false',
      'stages': "('dk_dm', 'no_rl')",
    },
  )
  config = from_mapping(ExperimentConfig, values)
  assert config.title == 'big,slow'
  assert config.dk_dm.num_steps == 7
  assert config.dk_dm.optimizer.learning_rate == 1e-3
  assert config.data.pairs == 'a/b c.jsonl'
  assert config.model.scan is False
  assert config.stages == ('dk_dm', 'no_rl')


def test_override_below_a_value(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text(FILE)
  with pytest.raises(UserError, match=r'--config.dk_dm.num_steps.x: `dk_dm.num_steps` is 5'):
    load_config(str(path), {'dk_dm.num_steps.x': '1'})


LISTS = """
def get_config():
  return {'lora': ({'pattern': 'attn', 'rank': 64, 'alpha': 128.0},), 'stages': ('dk_dm',)}
"""


def test_entries_of_lists_are_overridden_by_their_places(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text(LISTS)
  values = load_config(str(path), {'lora.0.rank': '8', 'lora.0.alpha': '8.0', 'stages.0': 'no_rl'})
  config = from_mapping(ExperimentConfig, values)
  assert config.lora == (LoraRule('attn', 8, 8.0),) and config.stages == ('no_rl',)
  for key, name in (('lora.1.rank', '1'), ('lora.rank', 'rank'), ('lora.-1.rank', '-1')):
    with pytest.raises(UserError, match=f'`lora` is a list of 1, and {name!r} is no place in it'):
      load_config(str(path), {key: '8'})


def test_a_sampler_is_left_to_the_model_by_one_word():
  sampling = from_mapping(SamplingConfig, {'num_steps': 'own', 'shift_mu': 'own', 'cfg_scale': 2})
  assert sampling.of({'num_steps': 28, 'shift_mu': None}) == SamplingConfig(28, None, 3.5, 2.0)
  assert sampling.of({}) == SamplingConfig(cfg_scale=2.0)
  for name in ('num_steps', 'shift_mu', 'guidance'):
    with pytest.raises(UserError, match=f"`{name}` is 'its' but must be .*, or 'own'"):
      from_mapping(SamplingConfig, {name: 'its'})
  with pytest.raises(UserError, match='num_steps` is 2.5 but must be an int'):
    from_mapping(SamplingConfig, {'num_steps': 2.5})


@pytest.mark.parametrize(
  ('stage', 'values', 'share', 'expected'),
  [
    ('flow_matching', dict(batch_size=32, per_device=1), 4, 8),
    ('flow_matching', dict(batch_size=32, per_device=2), 4, 4),
    ('flow_matching', dict(batch_size=32, per_device=1), 64, 1),
    ('flow_matching', dict(batch_size=32, accumulation=2), 4, 2),
    # Eight rollouts of four states are split as 32 states.
    ('dk_dm', dict(teacher_batch=32, rollouts=8, preservation_batch=32, per_device=1), 1, 32),
    ('dk_dm', dict(teacher_batch=32, rollouts=8, preservation_batch=16, per_device=1), 2, 8),
    ('dk_dm', dict(variant='paired_endpoint', rollouts=8, per_device=1), 1, 8),
    ('no_rl', dict(prompts_per_step=8, images_per_prompt=4, per_device=1), 4, 4),
  ],
)
def test_microbatches_are_settled_when_the_mesh_is_known(stage, values, share, expected):
  config = getattr(parse(**{stage: values}, stages=(stage,)).on(share), stage)
  assert config.accumulation == expected
  if stage == 'no_rl':
    assert config.rollout_batch == 4


def test_microbatches_are_given_in_one_way():
  with pytest.raises(UserError, match='`per_device` is 1 but must be .* zero if accumulation'):
    parse(dk_dm={'per_device': 1, 'accumulation': 2})
