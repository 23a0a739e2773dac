"""report.html: well-formed, escaped, complete in itself, and honest about what it shows."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from eru_jax.errors import UserError
from eru_jax.training import curves
from eru_jax.training.report import GalleryRow, ReportData, write_report

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}
EVIL = '<script>alert("x")</script> & \'a\' $x_$'


def picture(value, size=8):
  image = np.full((size, size, 3), value, np.uint8)
  image[0, 0] = (1, 2, 3)
  return image


def score(share, n):
  return {'accuracy': share, 'n': n, 'ci95': [share / 2, (1 + share) / 2]}


def row(split, prompt='what a caterpillar becomes', anchor='butterfly', target=True):
  columns = [
    ('Base, explicit prompt', picture(10), True),
    ('Base, implicit prompt', picture(20), False),
    ('After DK-DM', picture(30), None),
  ]
  return GalleryRow(prompt, anchor, split, picture(40) if target else None, columns)


def full_report():
  stages = {
    'base': {'explicit': score(0.95, 100), 'wording': score(0.04, 50), 'unrelated_drift': 0.0},
    'dk_dm': {
      'explicit': score(0.94, 100),
      'wording': score(0.625, 50),
      'unrelated': score(0.9, 10),
      'unrelated_drift': 0.0412,
    },
  }
  metrics = [
    {'stage': 'dk_dm', 'step': s, 'time': 0.0, 'loss': 1 / s if s != 5 else float('nan')}
    for s in range(1, 900)
  ]
  metrics += [
    {
      'stage': 'no_rl',
      'step': 1,
      'time': 0.0,
      'loss': 0.1,
      'reward': 0.5,
      'negative_fraction': 0.25,
    }
  ]
  summary = {
    'stages': stages,
    'seconds': {'dk_dm': 3725.0, 'load': 4.25},
    'peak_memory_gb': 2.345,
    'versions': {'jax': '0.10.2', EVIL: EVIL},
  }
  gallery = [row('unrelated'), row('train'), row('wording'), row('wording', EVIL, EVIL)]
  return ReportData(EVIL, summary, gallery, metrics, f'a = {EVIL}', [EVIL])


class Page(html.parser.HTMLParser):
  """Checks that tags are balanced and collects what matters."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.words, self.table = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f'not closed: {self.open}'

  def handle_starttag(self, tag, attributes):
    names = [name for name, _ in attributes]
    assert len(names) == len(set(names)), f'an attribute twice in {tag}'
    self.tags.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f'</{tag}> closes nothing'

  def handle_data(self, data):
    if 'style' not in self.open:
      self.words.append(data)

  @property
  def text(self):
    return ' '.join(' '.join(self.words).split())

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def write(tmp_path, report):
  text = write_report(tmp_path, report).read_text(encoding='utf-8')
  assert [p.name for p in tmp_path.iterdir()] == ['report.html']
  return text, Page(text)


def test_full_report_is_well_formed_and_escaped(tmp_path):
  text, page = write(tmp_path, full_report())
  assert text.startswith('<!doctype html>')
  assert not page.all('script')
  # Title, heading, explanation or not, prompt, anchor, config, notes, a version's name and value.
  assert page.text.count('<script>alert("x")</script>') >= 7
  assert EVIL in {page_image['alt'][len('After DK-DM: ') :] for page_image in page.all('img')}
  ids = [a['id'] for _, a in page.tags if 'id' in a]
  assert len(ids) == len(set(ids))
  for attributes in page.all('a') + page.all('use'):
    target = attributes.get('href') or attributes['xlink:href']
    assert target[0] == '#' and target[1:] in ids
  assert set(re.findall(r'url\(#([^)]*)\)', text)) <= set(ids)


def test_nothing_is_loaded(tmp_path):
  text, page = write(tmp_path, full_report())
  assert not re.search(r'(https?:)?//', text)
  assert not {'link', 'iframe', 'object', 'embed', 'video', 'form'} & {t for t, _ in page.tags}
  assert not re.search(r'@import|url\((?!#)', text)
  policy = [m for m in page.all('meta') if m.get('http-equiv') == 'Content-Security-Policy']
  assert policy and policy[0]['content'].startswith("default-src 'none'")


def test_every_picture_decodes_and_is_described(tmp_path):
  _, page = write(tmp_path, full_report())
  images = page.all('img')
  assert len(images) == 4 * 4
  seen = set()
  for attributes in images:
    kind, data = attributes['src'].split(',')
    assert kind == 'data:image/png;base64'
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
    assert decoded.shape == (8, 8, 3) and tuple(decoded[0, 0]) == (1, 2, 3)
    seen.add((attributes['alt'], int(decoded[1, 1, 0])))
  assert ('Base, explicit prompt: what a caterpillar becomes (judged right)', 10) in seen
  assert ('Base, implicit prompt: what a caterpillar becomes (judged wrong)', 20) in seen
  assert ('After DK-DM: what a caterpillar becomes', 30) in seen
  assert ('Target: butterfly', 40) in seen
  cells = [cell.get('class') for cell in page.all('td')]
  assert cells.count('right') == cells.count('wrong') == 4


def test_the_story_is_told_in_order(tmp_path):
  _, page = write(tmp_path, full_report())
  wanted = [
    'DK-DM trains the model',
    'DK-DM and NO-RL here are reconstructions; see docs/method.md',
    'Known facts, unseen wordings',
    'Base 4.0\u202f%',
    'DK-DM 62.5\u202f%',
    'of 50 pictures are right',
    'means butterfly',
    'Training prompts',
    'Unrelated prompts',
    'DK-DM: loss',
    'NO-RL: reward of its pictures',
    'NO-RL: share of negatives',
    'Share of right pictures',
    '62.5\u202f% 31.2 to 81.2\u202f%, n\u00a0=\u00a050',
    '0.041',
    '1 h 2 min',
    '2.35 GB',
  ]
  text = page.text.replace('\u202f', ' ').replace('\u00a0', ' ')
  place = 0
  for words in wanted:
    words = words.replace('\u202f', ' ').replace('\u00a0', ' ')
    assert words in text[place:], f'{words!r} is missing, or in the wrong place'
    place = text.index(words, place)


def test_many_rows_are_folded_and_large_pictures_shrunk(tmp_path):
  big = GalleryRow('p', '', 'mine', None, [('Only', picture(9, 600), None)])
  _, page = write(tmp_path, ReportData('t', {}, [big] * 11))
  assert '3 more' in page.text and 'mine' in page.text and 'judge' not in page.text
  sizes = [
    Image.open(io.BytesIO(base64.b64decode(a['src'].split(',')[1]))).size for a in page.all('img')
  ]
  assert sizes == [(256, 256)] * 11
  assert 'Target' not in page.text


@pytest.mark.parametrize(
  'summary, metrics, expected, absent',
  [
    ({}, [], 'This run trained', 'Curves'),
    (
      {'stages': {'pretrain <1>': {'explicit': {'accuracy': 0.5, 'n': 10}}}, 'seconds': {'a': 1}},
      [{'stage': 'pretrain <1>', 'step': 1, 'time': 0.0, 'loss': float('inf')}],
      # No interval is given: Wilson's, as in test_metrics.
      '23.7 to 76.3 %',
      'Pictures',
    ),
    ({'stages': {'base': {}, 'x': {'unrelated_drift': 0.5}}}, [], '0.500', 'Pictures'),
    ({'stages': {'no_rl': {}}}, [], 'NO-RL here is a reconstruction', 'DK-DM'),
  ],
)
def test_partial_runs(tmp_path, summary, metrics, expected, absent):
  _, page = write(tmp_path, ReportData('t', summary, metrics=metrics))
  assert expected in page.text.replace('\u202f', ' ')
  assert absent not in page.text


def test_missing_picture_of_a_row_leaves_a_gap(tmp_path):
  other = GalleryRow('short', '', 'train', None, [('After DK-DM', picture(1), True)])
  _, page = write(tmp_path, ReportData('t', {}, [row('train'), other]))
  assert len(page.all('img')) == 5 and page.text.count('–') == 3


def test_a_bad_picture_leaves_the_old_report(tmp_path):
  write_report(tmp_path, ReportData('old', {}))
  bad = GalleryRow('p', 'a', 'train', None, [('x', np.zeros((4, 4), np.float32), True)])
  with pytest.raises(UserError, match='uint8'):
    write_report(tmp_path, ReportData('new', {}, [bad]))
  assert 'old' in (tmp_path / 'report.html').read_text()


def test_running_mean_and_blocks_by_hand():
  y = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
  np.testing.assert_allclose(curves._running_mean(y, 2), [2, 2, 4, 6, 6])
  np.testing.assert_allclose(curves._running_mean(y, 1), y)
  long = curves._block_means(np.arange(802.0))
  assert len(long) == 268
  np.testing.assert_allclose(long[[0, 1, -1]], [1, 4, 801])


def test_charts_use_the_pages_colours_and_repeat_exactly():
  def draw(x):
    return curves.step_chart(curves.Series('loss', x, [3.0, 2.0, 1.0]), 'falls "fast"')

  first = draw([1, 2, 3])
  assert first == draw([1, 2, 3])
  assert 'var(--series-0)' in first and 'var(--ink)' in first and '#00f' not in first
  assert 'aria-label="falls &quot;fast&quot;"' in first


def test_stage_chart_takes_any_names_and_number_of_lines():
  series = [curves.Series(str(i), [0, 1], [0.1, 0.1 * i]) for i in range(8)]
  svg = curves.stage_chart(series, ['$x_$', '<b>'], 'x')
  assert '>$x_$<' in svg and '>&lt;b&gt;<' in svg
  assert all(f'var(--series-{i})' in svg for i in range(curves.SERIES))
