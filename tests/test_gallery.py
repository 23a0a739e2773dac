"""The gallery: what is in it, and how it behaves in a real browser, from a file, by keyboard."""

import json
import re

import numpy as np
import pytest
from browser import Browser, installed

from eru_jax.benchmarks.base import Benchmark, Protocol, Question, single
from eru_jax.evaluating import drawing, results
from eru_jax.evaluating.evaluator import Evaluated
from eru_jax.evaluating.gallery import page, write_gallery
from eru_jax.evaluating.scorers import Scorer
from eru_jax.training.pictures import save_png

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror=document.title=1>'
COUNT = 40


def questions():
  found = [
    Question(
      id=f'{index:02d}',
      category=('physics', 'biology')[index % 2],
      prompts={'implicit': f'riddle {index}', 'explicit': f'answer {index}'},
      subcategory=('gravity', 'melting', 'ripeness')[index % 3],
      explanation=f'It shows thing {index}.',
    )
    for index in range(COUNT)
  ]
  prompts = {'implicit': HOSTILE, 'explicit': f'{HOSTILE} \u2028 \ud800'}
  found[7] = Question('07', 'physics', prompts, 'gravity', explanation=HOSTILE)
  return found


def evaluated(directory, protocol=None, values=None, edge=120, images=1):
  """Three models' pictures, a colour each; by default, question i is worth i under the base."""
  asked = questions()
  models = ['base', 'dk_dm', 'no_rl']
  values = values or (lambda model, row: row + 10 * models.index(model))
  pictures = {m: drawing.wanted(asked, ['implicit', 'explicit'], images) for m in models}
  scores = {}
  for number, model in enumerate(models):
    for picture in pictures[model]:
      image = np.full((edge, edge, 3), 60, np.uint8)
      image[..., number] = 60 + 3 * picture.row
      save_png(drawing.directory_of(directory, model) / picture.file, image)
    found = [values(model, picture.row) for picture in pictures[model]]
    scores[model] = [None if value is None else {'x': value} for value in found]
  protocol = protocol or single('x', digits=1)
  benchmark = Benchmark('made_up', 'Made up & <tested>', lambda data: asked, {'x': protocol})
  scorer = Scorer('x', 'x/1', lambda images, questions: [None] * len(images))
  return Evaluated(
    benchmark, protocol, scorer, asked, {'': COUNT}, ['implicit', 'explicit'], pictures, scores,
    directory, 0,
  )  # fmt: skip


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Under NO-RL all questions are worth 20, but the one that nobody scored."""

  def value(model, row):
    if model == 'no_rl':
      return None if row == 3 else 20
    return row + 10 * (model == 'dk_dm')

  return evaluated(tmp_path_factory.mktemp('gallery'), values=value)


@pytest.fixture(scope='module')
def gallery(made):
  return write_gallery(made, results.collect(made))


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  installed()
  with Browser(tmp_path_factory.mktemp('profile')) as started:
    yield started


def shown(browser, expected, part='slice(0)'):
  """Waits until the prompts on the page, or a part of them, are these."""
  headings = "[...document.querySelectorAll('.question h3')].map((e) => e.textContent)"
  browser.expect(f'{headings}.{part}', expected)


# Without a browser


def test_nothing_in_the_page_comes_from_elsewhere_or_is_taken_for_html(gallery):
  html = gallery.read_text(encoding='utf-8')
  assert HOSTILE not in html and '<img src=x' not in html and html.count('\\u003cimg src=x') == 3
  assert not re.findall(r'(?:src|href)="(?!#)[^"]', html)
  assert 'http' not in re.sub(r'content="width|http-equiv', '', html)
  # As many scripts as the page is made of: data, pictures of each question, and its own.
  assert len(re.findall(r'<script\b', html)) == COUNT + 2
  assert html.count('</script>') == COUNT + 2
  policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
  assert 'default-src &#x27;none&#x27;' in policy and 'unsafe' not in policy
  assert 'Made up &amp; &lt;tested&gt;' in html


def test_data_of_the_page(gallery):
  html = gallery.read_text(encoding='utf-8')
  data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
  assert [(c['model'], c['condition']) for c in data['columns']] == [
    ('Base', 'implicit'), ('DK-DM', 'implicit'), ('NO-RL', 'implicit'),
    ('Base', 'explicit'), ('DK-DM', 'explicit'), ('NO-RL', 'explicit'),
  ]  # fmt: skip
  assert data['questions'][3]['values'] == [[3], [13], [None], [3], [13], [None]]
  shown = json.loads(re.search(r'id="pictures-3">(.*?)</script>', html, re.DOTALL)[1])
  assert shown['files'][4] == ['pictures/dk_dm/explicit/03.png']
  assert all(column[0][0] == '0' for column in shown['shown'])


def test_large_evaluations_have_smaller_pictures(made, monkeypatch):
  from eru_jax.evaluating import gallery as module

  result = results.collect(made)
  whole = len(page(made, result))
  monkeypatch.setattr(module, '_LARGEST', 2 * COUNT * 3 * 100 * 100 * module._BYTES_PER_PIXEL)
  assert len(page(made, result)) < whole


def test_a_page_without_scores(made):
  bare = Evaluated(**{**made.__dict__, 'protocol': None, 'scorer': None, 'scores': {}})
  html = page(bare, results.collect(bare))
  assert 'Nobody has scored these pictures' in html and 'Worst first' not in html


# In a browser


def test_the_worst_come_first_and_filters_combine(gallery, browser):
  browser.open(gallery)
  # By the last model's implicit prompts: all 20 but question 3, which nobody scored.
  shown(browser, ['riddle 0', 'riddle 1', 'riddle 2', 'riddle 4'], 'slice(0, 4)')
  browser.open(gallery, '#by=0&sort=worst')
  shown(browser, ['riddle 0', 'riddle 1', 'riddle 2'], 'slice(0, 3)')
  browser.open(gallery, '#by=0&sort=best&category=physics')
  shown(browser, ['riddle 38', 'riddle 36', 'riddle 34'], 'slice(0, 3)')
  browser.expect("document.getElementById('count').textContent", '21 of 40 prompts')
  browser.open(gallery, '#by=2&sort=loss&show=lost&subcategory=gravity')
  shown(browser, ['riddle 39', 'riddle 36', 'riddle 33'], 'slice(0, 3)')
  browser.open(gallery, '#show=unscored')
  shown(browser, ['riddle 3'])
  browser.open(gallery, '#search=thing+ANSWER+12')
  shown(browser, ['riddle 12'])
  browser.open(gallery, '#search=no+such+words')
  shown(browser, [])
  browser.expect("document.getElementById('nothing').hidden", False)
  # An unscored question is the end of every ranking, not its beginning.
  for order in ('worst', 'best', 'gain', 'loss'):
    browser.open(gallery, f'#by=2&sort={order}&search=riddle+3')
    shown(browser, ['riddle 3'], 'slice(-1)')


def test_filters_can_be_used_and_are_kept_in_the_address(gallery, browser):
  browser.open(gallery)
  browser.run(
    "(() => { const e = document.getElementById('category'); e.value = 'biology';"
    " e.dispatchEvent(new Event('input', {bubbles: true})); })()"
  )
  browser.expect('location.hash', '#category=biology')
  shown(browser, ['riddle 1', 'riddle 5'], 'slice(0, 2)')
  browser.run('document.querySelector(\'#columns input[value="4"]\').click()')
  browser.until("location.hash.includes('columns=0.1.2.3.4')")
  first = "[...document.querySelector('.question').querySelectorAll('figcaption .name')]"
  names = ['Base1.0', 'DK-DM11.0', 'NO-RL20.0', 'Base1.0', 'DK-DM11.0']
  browser.expect(f'{first}.map((e) => e.textContent)', names)
  browser.run("document.getElementById('reset').click()")
  browser.expect('location.hash', '')


def test_pictures_are_made_when_they_come_near(gallery, browser):
  browser.open(gallery, '#sort=order')
  made = "document.querySelectorAll('.question').length"
  assert browser.run(made) == 24
  assert browser.run("document.querySelectorAll('.question:last-child img[src]').length") == 0
  browser.until("document.querySelector('.question img').naturalWidth === 120")
  # Red of the base's picture of question 0, where the browser has decoded it.
  colour = browser.run(
    """(() => {
      const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
      pen.drawImage(document.querySelector('.question img'), 0, 0, 1, 1);
      return [...pen.getImageData(0, 0, 1, 1).data];
    })()"""
  )
  np.testing.assert_allclose(colour, [60, 60, 60, 255], atol=6)
  browser.until(f'(window.scrollTo(0, document.body.scrollHeight), {made} === {COUNT})')
  browser.until("document.querySelector('.question:last-child img').naturalWidth === 120")


def test_what_others_wrote_stays_text(gallery, browser):
  browser.open(gallery, '#search=script')
  shown(browser, [HOSTILE])
  browser.run("document.querySelector('.view').click()")
  browser.until("document.getElementById('picture').open")
  assert browser.run('document.title').startswith('Made up & <tested>')
  browser.expect("document.querySelector('#facts h3').textContent", HOSTILE)
  assert browser.run('document.querySelectorAll(\'img[src="x"]\').length') == 0


def test_everything_works_by_keyboard(gallery, browser):
  browser.open(gallery, '#sort=order')
  active = 'document.activeElement'
  browser.press('/')
  browser.expect(f'{active}.id', 'search')
  for letter in 'riddle 5':
    browser.press(letter)
  shown(browser, ['riddle 5', 'riddle 15'], 'slice(0, 2)')
  browser.press('Escape')
  browser.until(f'{active} === document.body')
  browser.press('j')
  browser.press('j')
  browser.press('k')
  browser.expect(f"{active}.querySelector('h3').textContent", 'riddle 5')
  browser.press('Tab')  # the explanation
  browser.press('Tab')
  browser.until(f"{active}.ariaLabel?.includes('Base, implicit prompt, 5.0: enlarge')")
  browser.press('Enter')
  browser.until("document.getElementById('picture').open")
  current = "document.querySelector('.strip [aria-current=true]').textContent"
  browser.expect(current, 'Base, implicit5.0')
  browser.press('ArrowRight')
  browser.expect(current, 'DK-DM, implicit15.0')
  browser.press('ArrowLeft')
  browser.press('ArrowLeft')
  browser.expect(current, 'NO-RL, explicit20.0')
  browser.press('ArrowDown')
  browser.expect("document.querySelector('#facts h3').textContent", 'riddle 15')
  file = "document.querySelector('#facts a').getAttribute('href')"
  browser.expect(file, 'pictures/no_rl/explicit/15.png')
  browser.press('Escape')
  browser.until("!document.getElementById('picture').open")
  # The dialog first gives the focus back to where it was opened, and is told of its end later.
  browser.expect(f"{active}.closest('.question').querySelector('h3').textContent", 'riddle 15')


def test_right_and_wrong_are_marked_without_colour(tmp_path, browser):
  protocol = Protocol(('x',), lambda s: s['x'], span=(0, 1), percent=True, proportion=True)
  made = evaluated(
    tmp_path, protocol, lambda m, r: float(m != 'base' or r % 2 == 0), edge=16, images=2
  )
  path = write_gallery(made, results.collect(made))
  browser.open(path, '#by=0')
  shown(browser, ['riddle 1', 'riddle 3'], 'slice(0, 2)')
  marks = (
    "[...document.querySelector('.question').querySelectorAll('.value')].map((e) => e.textContent)"
  )
  browser.expect(marks, ['✗', '✓', '✓', '✗'])
  browser.until("document.querySelector('.question img').classList.contains('small')")
  browser.open(path, '#k=1')
  browser.run("document.querySelector('.view').click()")
  browser.until("document.querySelector('#facts a')?.getAttribute('href').endsWith('_1.png')")


def test_it_asks_the_network_for_nothing_and_has_no_errors(gallery, browser):
  browser.open(gallery)
  assert browser.complaints() == []
  pages = {url.partition('#')[0] for url in browser.requests()}
  assert pages and all(url.startswith(('file:', 'about:')) for url in pages), pages
  assert not [url for url in pages if not url.endswith(('gallery.html', 'about:blank'))]
