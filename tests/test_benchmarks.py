"""Benchmarks as data: readers of their files, and the filter for training sets."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from benchmark_files import (
  science_row,
  training_row,
  wise_row,
  write_lines,
  write_parquet,
  write_wise,
)

from eru_jax.benchmarks import base, contamination, files, science_t2i, wise
from eru_jax.benchmarks.base import Question, as_pairs, fewer
from eru_jax.benchmarks.conversion import convert
from eru_jax.benchmarks.files import read_rows
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError
from eru_jax.evaluating.questions import read_questions
from eru_jax.evaluating.request import EvaluationRequest


def refusal(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  told = str(caught.value)
  assert '\n' not in told and told.endswith('.'), told
  return told


# WISE


@pytest.mark.parametrize('below', ['', 'WISE_legacy/data'])
def test_wise_goes_by_ids_and_takes_rewrites_as_explicit_prompts(below, tmp_path):
  questions = wise.read_legacy(str(write_wise(tmp_path) / below))
  assert [int(question.id) for question in questions] == [
    1, 2, 400, 401, 567, 568, 700, 701, 800, 801, 900, 901, 1000
  ]  # fmt: skip
  # The first and last id of every category, as the published script has them.
  assert [question.category for question in questions] == [
    'culture', 'culture', 'culture', 'time', 'time', 'space', 'space', 'biology', 'biology',
    'physics', 'physics', 'chemistry', 'chemistry',
  ]  # fmt: skip
  first = questions[0]
  assert first.prompts == {'implicit': 'riddle number 1', 'explicit': 'Answer1.'}
  assert first.subcategory == 'odd' and first.explanation.startswith('This refers to answer1,')


def test_wise_verified_has_other_ranges_and_no_rewrites(tmp_path):
  root = write_wise(tmp_path)
  questions = wise.read_verified(str(root))
  assert [(question.id, question.category) for question in questions] == [
    ('1', 'culture'), ('400', 'culture'), ('401', 'time'), ('520', 'time'), ('521', 'space'),
    ('640', 'space'), ('641', 'biology'), ('760', 'biology'), ('761', 'physics'),
    ('880', 'physics'), ('881', 'chemistry'), ('1000', 'chemistry'),
  ]  # fmt: skip
  assert all(list(question.prompts) == ['implicit'] for question in questions)
  # The merged copy says the same, and is not counted again.
  rows = [json.loads(p.read_text()) for p in sorted((root / 'data_verified').iterdir())]
  (root / 'data_verified' / 'merge.json').write_text(json.dumps(sum(rows, [])))
  assert wise.read_verified(str(root / 'data_verified')) == questions


def test_wise_without_rewrites_has_no_explicit_prompts(tmp_path):
  questions = wise.read_legacy(str(write_wise(tmp_path, rewrites=False)))
  assert len(questions) == 13 and as_pairs(questions) == []


@pytest.mark.parametrize(
  ('rows', 'words'),
  [
    ([wise_row(1), wise_row(2, Prompt=' \u200b')], r"row 2: 'Prompt' is ' .u200b', but must"),
    ([wise_row(1, Explanation=None)], "row 1: 'Explanation' is missing, but must be a text"),
    ([wise_row(1), wise_row('2')], "row 2: 'prompt_id' is '2', but must be a whole number"),
    ([wise_row(True)], "row 1: 'prompt_id' is True"),
    ([wise_row(1001)], "row 1: 'prompt_id' is 1001, but must be a whole number from 1 to 1000"),
    ([wise_row(1), wise_row(1)], "row 2: 'prompt_id' 1 is that of .*row 1 too"),
    ([wise_row(1), ['a']], r"row 2: \['a'\] is no JSON object"),
    ([wise_row(1, Subcategory='\ud800')], "row 1: 'Subcategory' holds half a surrogate pair"),
    ([wise_row(1, Explanation=['y' * 500])], 'y{60,78}.{3}, but must'),
  ],
)
def test_malformed_wise_rows_name_file_and_row(rows, words, tmp_path):
  path = tmp_path / 'natural_science.json'
  path.write_text(json.dumps(rows))
  told = refusal(wise.read_legacy, str(tmp_path))

  assert told.startswith(str(path)) and re.search(words, told), told


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    (b'[{"Prompt": "a",\n "Explanation": }]', r'natural_science.json, line 2: malformed JSON'),
    (b'[{"Prompt":\n "caf\xe9"}]', 'natural_science.json, line 2: not UTF-8'),
    (b'[' * 200000, 'nested too deeply|malformed'),
    (b'{"Prompt": "a"}\n{"Prompt": "b"', r'natural_science.json, line 1: .prompt_id. is missing'),
    (b'[' + b'1' * 5000 + b']', 'huge number|no JSON object'),
  ],
)
def test_damaged_files_are_one_sentence(text, words, tmp_path):

  (tmp_path / 'natural_science.json').write_bytes(text)
  assert re.search(words, refusal(wise.read_legacy, str(tmp_path)))


def test_rewrites_of_nothing_are_refused(tmp_path):
  data = write_wise(tmp_path) / 'WISE_legacy' / 'data'
  path = data / 'natural_science_rewrite.json'
  path.write_text(json.dumps([wise_row(702)]))
  assert "_rewrite.json, row 1: 'prompt_id' 702 is that of no prompt" in refusal(
    wise.read_legacy, str(tmp_path)
  )
  path.write_text(json.dumps([wise_row(701), wise_row(701)]))
  assert "row 2: 'prompt_id' 701 occurs twice" in refusal(wise.read_legacy, str(tmp_path))


def test_how_to_get_the_files_is_told(tmp_path):
  for read in (wise.read_legacy, wise.read_verified):
    assert 'git clone https://github.com/PKU-YuanGroup/WISE' in refusal(read, str(tmp_path))
    assert 'needs --data=DIR' in refusal(read, None)
  assert 'give --data=Jialuo21/Science-T2I-S, or a' in refusal(science_t2i.read_questions, None)
  assert 'no such directory' in refusal(science_t2i.read_questions, '/nosuch')


# Science-T2I


def write_set(root, kind, count, name='test'):
  rows = [science_row(index) for index in range(count)]
  if kind == 'parquet':
    half = count // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
      write_parquet(root / 'data' / f'{name}-0000{shard}-of-00002-1a2b.parquet', part)
  else:
    write_lines(root / f'{name}.{kind}', rows)
  (root / '.cache').mkdir(exist_ok=True)
  (root / '.cache' / 'junk.json').write_text('{')
  (root / 'dataset_infos.json').write_text('{"not": "rows"}')
  return root


@pytest.mark.parametrize('kind', ['parquet', 'jsonl', 'json'])
@pytest.mark.parametrize('letter', ['S', 'C'])
def test_science_t2i_as_the_hub_lays_it_out(kind, letter, tmp_path):
  if kind == 'parquet':
    pytest.importorskip('pyarrow')
  root = write_set(tmp_path / f'Science-T2I-{letter}', kind, 5)
  questions = science_t2i.read_questions(str(root))
  assert [question.id for question in questions] == [f'{letter}-{i:04d}' for i in range(1, 6)]
  assert {question.split for question in questions} == {letter}
  third = questions[2]
  assert third.prompts == {
    'implicit': 'object 2 left to itself',
    'explicit': 'object 2 lying on the floor',
    'superficial': 'object 2 floating in the air',
  }
  assert (third.category, third.subcategory) == ('biology', 'seasonal change')
  assert third.rubric == {'scene': '1 if object 2 is there', 'reality': 'marks from 0 to 3'}
  assert as_pairs(questions)[2] == KnowledgePair(
    'object 2 left to itself', 'object 2 lying on the floor', 'seasonal change', letter,
    f'{letter}-0003',
  )  # fmt: skip


_READ = """
import sys
from eru_jax.benchmarks.science_t2i import read_questions
from eru_jax.errors import UserError
try:
  print([question.id for question in read_questions(sys.argv[1])])
except UserError as error:
  print(error)
"""


@pytest.mark.parametrize('offline', ['1', ''])
def test_ids_of_the_hub(offline, tmp_path):
  """From the hub's own cache; where the hub is out of reach, in one sentence."""
  at = tmp_path / 'hub' / 'datasets--someone--Science-T2I-S'
  write_set(at / 'snapshots' / ('0' * 40), 'jsonl', 2)
  (at / 'refs').mkdir()
  (at / 'refs' / 'main').write_text('0' * 40)
  environment = os.environ | {'HF_HUB_CACHE': str(tmp_path / 'hub'), 'HF_HUB_OFFLINE': offline}
  environment |= {'HF_ENDPOINT': 'http://127.0.0.1:9', 'PYTHONPATH': os.pathsep.join(sys.path)}

  def told(data):
    command = [sys.executable, '-c', _READ, data]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()

  assert told('someone/Science-T2I-S') == "['S-0001', 'S-0002']"
  refused = told('someone/Science-T2I-C')
  assert 'the Hugging Face hub did not give it (' in refused and '\n' not in refused
  assert '--data=someone/Science-T2I-S@other' in told('someone/Science-T2I-S@other')


def test_several_sets_below_one_directory(tmp_path):
  pytest.importorskip('pyarrow')
  for name, count in (('train', 2), ('test_S', 3), ('test_C', 2)):
    rows = [training_row(i) if name == 'train' else science_row(i) for i in range(count)]
    write_parquet(tmp_path / 'data' / f'{name}-00000-of-00001.parquet', rows)
  questions = science_t2i.read_questions(str(tmp_path))
  assert [question.id for question in questions] == [
    'C-0001', 'C-0002', 'S-0001', 'S-0002', 'S-0003'
  ]  # fmt: skip
  assert len(science_t2i.read_training(str(tmp_path))) == 6


@pytest.mark.parametrize('name', ['empty.json', 'empty.jsonl', 'list.json'])
def test_files_without_rows_are_refused(name, tmp_path):
  path = tmp_path / name
  path.write_text('[]' if name == 'list.json' else ' \n')
  with pytest.raises(UserError, match='has no rows: get the file again'):
    list(read_rows(path))


def test_how_much_of_wise_there_is_is_told():
  assert wise.edition('', 1000) == '1000 prompts'
  assert wise.edition('', 49) == 'only 49 of its 1000 prompts'


def test_test_sets_that_are_not_whole_do_not_filter(tmp_path):
  pairs = tmp_path / 'pairs.jsonl'
  write_lines(pairs, [{'implicit': 'a', 'explicit': 'b', 'split': 'train'}])
  data = write_wise(tmp_path / 'WISE')
  with pytest.raises(UserError, match='has 13 of 1000 questions, so pairs near the others would'):
    convert(None, None, str(pairs), [f'wise={data}'], 0.5, str(tmp_path / 'out.jsonl'))


def test_prompts_for_anchors_are_no_pairs_to_train_on(tmp_path):
  write_lines(tmp_path / 'set' / 'train.jsonl', [training_row(0)])
  with pytest.raises(UserError, match='give --benchmark=science_t2i, which reads pairs'):
    convert('science_t2i_train', str(tmp_path / 'set'), None, [], 0.5, str(tmp_path / 'out.jsonl'))


@pytest.mark.parametrize(
  'folder', ['science-t2i-s', 'datasets--Jialuo21--Science-T2I-S/snapshots/0123abcd']
)
def test_sets_are_known_by_their_folder(folder, tmp_path):
  write_lines(tmp_path / folder / 'data' / 'test.jsonl', [science_row(0)])
  (found,) = science_t2i.read_questions(str(tmp_path / folder))
  assert found.split == 'S'


def test_editions_are_told_by_their_rows():
  assert science_t2i.edition('S', 671) == 'first edition, 671 rows'
  assert '2026' in science_t2i.edition('S', 227)
  assert science_t2i.edition('C', 227) == '227 rows'
  assert 'of no edition that is known' in science_t2i.edition('S', 670)


def test_every_wording_of_the_training_set_is_trained(tmp_path):
  rows = [training_row(0, implicit=2, explicit=3), training_row(1, implicit=3, explicit=1)]
  rows[1]['implicit_prompt'][2] = '  WORDING 0 of object 1'
  path = write_lines(tmp_path / 'train.jsonl', rows)
  pairs = science_t2i.read_training(str(path))
  assert [(pair.id, pair.implicit, pair.explicit) for pair in pairs] == [
    ('00001/0', 'wording 0 of object 0', 'object 0, told outright, 0'),
    ('00001/1', 'wording 1 of object 0', 'object 0, told outright, 1'),
    ('00001/2', 'wording 0 of object 0', 'object 0, told outright, 2'),
    ('00002/0', 'wording 0 of object 1', 'object 1, told outright, 0'),
    ('00002/1', 'wording 1 of object 1', 'object 1, told outright, 0'),
  ]
  assert {(pair.category, pair.split) for pair in pairs} == {
    ('gravity', 'train'), ('flame reaction', 'train')
  }  # fmt: skip


@pytest.mark.parametrize(
  ('row', 'words'),
  [
    (science_row(0, explicit_prompt=None), "line 2: 'explicit_prompt' is missing"),
    (science_row(0, implicit_prompt=[]), "line 2: 'implicit_prompt' is an empty list"),
    (science_row(0, implicit_prompt=['a', 'b']), 'line 2: .* has 2 texts, which only the training'),
    (science_row(0, law=3), "line 2: 'law' is 3"),
    (science_row(0, scene_scoring=1.5), "line 2: 'scene_scoring' is 1.5"),
  ],
)
def test_malformed_science_rows_name_file_and_row(row, words, tmp_path):

  path = write_lines(tmp_path / 'S.jsonl', [science_row(1), row])
  told = refusal(science_t2i.read_questions, str(path))
  assert told.startswith(str(path)) and re.search(words, told), told


def test_sets_that_are_not_there(tmp_path):
  write_lines(tmp_path / 'train.jsonl', [training_row(0)])
  assert 'holds no test set of Science-T2I, but train' in refusal(
    science_t2i.read_questions, str(tmp_path)
  )
  write_lines(tmp_path / 'b' / 'S.jsonl', [science_row(0)])
  assert 'holds no training set of Science-T2I, but S' in refusal(
    science_t2i.read_training, str(tmp_path / 'b')
  )


def test_damaged_parquet_and_missing_pyarrow(tmp_path, monkeypatch):
  pytest.importorskip('pyarrow')
  path = tmp_path / 'S.parquet'
  path.write_bytes(b'PAR1 this is none')
  assert 'S.parquet is no readable parquet file' in refusal(
    science_t2i.read_questions, str(tmp_path)
  )
  write_parquet(path, [science_row(0), science_row(1, law=None)])
  assert "S.parquet, row 2: 'law' is missing" in refusal(science_t2i.read_questions, str(tmp_path))
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  told = refusal(science_t2i.read_questions, str(tmp_path))
  assert 'needs pyarrow' in told and 'JSON Lines' in told


def test_pictures_in_parquet_are_not_read(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  path = write_parquet(tmp_path / 'S.parquet', [science_row(i) for i in range(3)])
  read = pyarrow.parquet.ParquetFile.iter_batches
  wanted = []

  def spy(self, *arguments, columns=None, **options):
    wanted.extend(columns)
    return read(self, *arguments, columns=columns, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pyarrow.parquet.ParquetFile, 'iter_batches', spy)
    assert len(list(files.read_rows(path, science_t2i._COLUMNS))) == 3
  assert 'law' in wanted and not [name for name in wanted if name.endswith('_image')]


# The registry, and taking fewer


def test_registry_finds_every_module_and_names_them_in_errors():
  assert set(base.registry()) >= {'emoji', 'science_t2i', 'wise', 'wise_verified'}
  told = refusal(base.benchmark, 'nosuch')
  assert '--benchmark=nosuch' in told and 'wise_verified' in told
  told = refusal(base.benchmark('wise').protocol, 'emoji')
  assert '--scorer=emoji' in told and 'wise, sci_score, clip_score' in told


def test_fewer_questions_are_spread_over_categories():
  sizes = {'culture': 40, 'time': 16, 'space': 4}
  questions = [
    Question(f'{name}{i}', name, {'implicit': f'{name} {i}'})
    for name, count in sizes.items()
    for i in range(count)
  ]
  for limit in (1, 2, 3, 7, 30, 59):
    some = fewer(questions, limit)
    assert len(some) == limit and some == sorted(some, key=questions.index)
  # In proportion, but that every category has two before one has three.
  for limit, counts in ((15, [9, 4, 2]), (30, [20, 8, 2]), (6, [2, 2, 2]), (3, [1, 1, 1])):
    asked = [q.category for q in fewer(questions, limit)]
    assert [asked.count(name) for name in sizes] == counts
  assert fewer(questions, 60) == fewer(questions, None) == fewer(questions, 1000) == questions


def test_a_larger_limit_has_the_questions_of_a_smaller_one():
  kinds = ('gravity', 'melting', 'rust', 'ripeness')
  questions = [
    Question(str(i), 'ab'[i % 5 > 2], {'implicit': 'x'}, kinds[i // 250], 'SC'[i % 3 > 1])
    for i in range(1000)
  ]
  before = set()
  for limit in (*range(1, 60), 120, 600, 999, 1000):
    some = {question.id for question in fewer(questions, limit)}
    assert len(some) == limit and before <= some
    before = some
  # Of one category, too, whose kinds are asked in proportion, and not in the order of its file.
  alike = [dataclasses.replace(q, category='a', split='') for q in questions]
  ten, twenty = fewer(alike, 10), fewer(alike, 20)
  assert {q.id for q in ten} <= {q.id for q in twenty}
  assert [sum(q.subcategory == kind for q in twenty) for kind in kinds] == [5] * 4
  assert len({int(q.id) % 10 for q in twenty}) > 5
  # Of splits that are never added up there are as many, whatever their sizes.
  for alike_too, counts in ((False, [40, 20]), (True, [30, 30])):
    some = fewer([dataclasses.replace(q, category='') for q in questions], 60, alike_too)
    assert [sum(q.split == split for q in some) for split in 'SC'] == counts
  # What is asked does not change with the order or the texts of the file.
  mixed = [dataclasses.replace(q, prompts={'implicit': 'y'}) for q in reversed(alike)]
  assert {q.id for q in fewer(mixed, 20)} == {q.id for q in twenty}


# The emoji world


@pytest.fixture(scope='module')
def small_run(emoji_cache, tmp_path_factory):
  """The workdir of a run that has learnt two wordings of seven facts; only its config."""
  del emoji_cache
  directory = tmp_path_factory.mktemp('run')
  config = {
    'stages': ['dk_dm'], 'model': {'source': 'emoji_base'},
    'data': {'max_facts': 7, 'wordings_per_fact': 2},
  }  # fmt: skip
  (directory / 'config.json').write_text(json.dumps(config))
  return directory


def ask(model, **options):
  return read_questions(EvaluationRequest((str(model),), 'out', **options), base.benchmark('emoji'))


def test_a_run_is_asked_what_it_was_given_to_learn(small_run):
  whole, told = ask('emoji_base')
  assert told == 'everything that the package knows'
  mine, told = ask(small_run)
  assert told == f'what --model={small_run} was given to learn'
  by_split = {
    name: [[q for q in found if q.split == name] for found in (mine, whole)]
    for name in ('wording', 'fact', 'train')
  }
  assert sum(len(ours) for ours, _ in by_split.values()) == len(mine)
  train, every = by_split['train']
  assert len(train) == 7 * 2 < len(every)
  facts = {question.prompts['explicit'] for question in train}
  assert len(facts) == 7
  # Unseen wordings are of the same facts, unseen facts are all there are.
  wording, every = by_split['wording']
  assert wording == [q for q in every if q.prompts['explicit'] in facts]
  assert by_split['fact'][0] == by_split['fact'][1]
  assert len({question.id for question in mine}) == len(mine)
  assert [question.split for question in mine][0] == 'wording'


def test_a_prompt_file_goes_before_a_run(small_run, tmp_path):
  path = tmp_path / 'mine.jsonl'
  lines = [{'implicit': 'what purrs', 'explicit': 'cat'}, {'implicit': 'b', 'explicit': 'dog'}]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  found, told = ask(small_run, data=str(path))
  assert [(q.implicit, q.split, q.category) for q in found] == [
    ('what purrs', '', 'all'), ('b', '', 'all')
  ]  # fmt: skip
  assert told == str(path)
  lines = [{**lines[0], 'split': 'wording', 'category': 'pets'}, lines[1]]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  found, _ = ask(small_run, data=str(path))
  assert [(q.split, q.category) for q in found] == [('wording', 'pets'), ('train', 'all')]


# Contamination


def question(implicit, explicit='', explanation=''):
  prompts = {'implicit': implicit} | ({'explicit': explicit} if explicit else {})
  return Question(implicit, 'c', prompts, explanation=explanation)


def test_words_and_jaccard_by_hand():
  first = contamination.words("The moon's, MOON’S glow — on ice")
  assert first == {'the', "moon's", 'glow', 'on', 'ice'}
  assert contamination.jaccard(first, contamination.words('ice on the lake')) == 3 / 6
  assert contamination.jaccard(frozenset(), frozenset()) == 0


def test_pairs_near_a_test_prompt_or_with_its_answer_are_dropped():
  held_out = {
    'one': [question('a b c d', 'Mooncakes.'), question('p q r s t u')],
    'two': [question('v w x y', explanation='This refers to the maple leaf, a symbol')],
  }
  pairs = [
    KnowledgePair('a b c e', 'something long that nobody asks for', id='3 of 5 words'),
    KnowledgePair('a b e f', 'something long that nobody asks for', id='2 of 6 words'),
    KnowledgePair('k', 'the mooncake', id='same answer, other number'),
    KnowledgePair('l', 'Maple leaves', id='another form that is not folded'),
    KnowledgePair('m', 'a maple leaf', id='answer by the explanation'),
    KnowledgePair('n', 'p q r', id='explicit near an implicit'),
    KnowledgePair('A, B! C? D.', 'mooncakes', id='for both reasons'),
  ]
  report = contamination.decontaminate(pairs, held_out)
  assert [pair.id for pair in report.kept] == ['2 of 6 words', 'another form that is not folded']
  assert dict(report.near) == {'one': 3, 'two': 0}
  assert dict(report.same) == {'one': 2, 'two': 1}
  assert (report.total, report.dropped) == (7, 5)
  assert report.example == ('A, B! C? D.', 'a b c d')
  assert report.lines() == [
    'one: 3 pairs share 50% of the words of one of its prompts, 2 ask for the same thing',
    'two: 0 pairs share 50% of the words of one of its prompts, 1 ask for the same thing',
    "such as 'A, B! C? D.', near 'a b c d'",
    '5 of 7 pairs dropped, 2 kept',
  ]


@pytest.mark.parametrize(
  'prompt, explicit, test, answer, explanation',
  [
    ('🍎 🍎', 'x', '🍎🍎', '', ''),
    ('掉在牛顿头上的那个水果', 'x', '掉在牛顿头上的水果', '', ''),
    ('p', 'the boxes', 'q', 'A box.', ''),
    ('p', 'cherries', 'q', 'cherry', ''),
    ('p', 'movies', 'q', 'The movie', ''),
    ('p', 'Eiffel Tower', 'q', '', 'It is the Eiffel Tower, of course.'),
    ('p', 'red apples', 'q', 'Some red apples that lie on the green grass', ''),
  ],
)
def test_forms_of_a_prompt_and_of_an_answer(prompt, explicit, test, answer, explanation):
  held_out = {'test': [question(test, answer, explanation)]}
  assert contamination.decontaminate([KnowledgePair(prompt, explicit)], held_out).dropped == 1


@pytest.mark.parametrize(
  'explicit, answer, explanation',
  [
    ('ice', '', 'It melts as ice does, and floats.'),  # one word is in much that is about others
    ('glass', 'glasses of another thing entirely, in a row', ''),
    ('red app', 'Some red apples that lie on the green grass', ''),
  ],
)
def test_other_answers_stay(explicit, answer, explanation):
  held_out = {'test': [question('q', answer, explanation)]}
  assert contamination.decontaminate([KnowledgePair('p', explicit)], held_out).dropped == 0


def test_a_share_of_words_that_is_just_enough():
  # 0.28 * 25 is 7.000000000000001 in floating point, whose ceiling is 8.
  nearest = contamination._Nearest([' '.join(f'w{i}' for i in range(7))])
  assert nearest(' '.join(f'w{i}' for i in range(25)), 0.28)[0] == 7 / 25


def test_the_quick_search_finds_what_trying_all_finds():
  import numpy as np

  rng = np.random.default_rng(0)
  prompts = [' '.join(f'w{i}' for i in rng.zipf(1.6, size=rng.integers(1, 9))) for _ in range(300)]
  tests, training = prompts[:150], prompts[150:]
  nearest = contamination._Nearest(tests)
  for threshold in (0.3, 0.5, 0.8, 1.0):
    hits = 0
    for prompt in training:
      mine = contamination.words(prompt)
      best = max(contamination.jaccard(mine, contamination.words(test)) for test in tests)
      found = nearest(prompt, threshold)
      assert (found is not None) == (best >= threshold)
      if found:
        hits += 1
        assert found[0] == best
    assert 0 < hits < len(training)
