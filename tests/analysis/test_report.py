"""The report: one self-contained HTML file, for any model and however little was logged."""
import html.parser
import json
import re
import shutil

import matplotlib
import numpy as np
import pytest

import analysis_fakes as fakes
from moejax.analysis import history, page, plots, report, specialisation_report, style
from moejax.evaluation import log

VOID = {'meta', 'link', 'img', 'source', 'br'}


class Document(html.parser.HTMLParser):
  """Tags with their attributes, headings, and whether all tags are closed in order."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.headings, self._open = [], [], []
    self.feed(text)
    assert not self._open, f'not closed: {self._open}'

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open and self._open.pop() == tag, f'</{tag}> closes nothing'

  def handle_data(self, data):
    if self._open and self._open[-1] in ('h1', 'h2'):
      self.headings.append(data)

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


def rows(layers=('block_01',), experts=4, steps=(1, 2, 3)):
  """A hand-written metrics.jsonl of a run."""
  for step in steps:
    row = {'step': step, 'train/loss': 2. / step, 'train/cross_entropy': 1.9 / step, 'train/accuracy': step / 4}
    for layer in layers:
      load = np.arange(1, experts + 1) / np.arange(1, experts + 1).sum()
      row |= {f'router/{layer}/load': load.tolist(), f'router/{layer}/dropped': 0.3 / step,
              f'router/{layer}/confidence': 0.5, f'router/{layer}/importance_loss': 0.1}
    if step % 2:
      row |= {'eval/test/accuracy': step / 5, 'eval/test/loss': 2. / step, 'eval/test/examples': 10.}
    yield row


def write(workdir, lines=(), **routers):
  if lines:
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return report.write(workdir, fakes.setup(**routers), {}, {})


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with one token-choice layer and one later evaluation."""
  workdir = tmp_path_factory.mktemp('run') / 'digits <b>'
  workdir.mkdir()
  log.append(workdir, 3, {'model.moe.router.select.k': 1}, {'test/accuracy': 0.55, 'test/loss': float('inf')})
  path = write(workdir, list(rows()), block_01=fakes.by_class(fakes.CLASSES))
  return path, path.read_text(encoding='utf-8')


def test_every_picture_is_embedded_and_described(run):
  path, text = run
  images = Document(text).all('img')
  names = {'learning', 'load', 'load_over_time', 'routing_over_time', 'class_information', 'class_by_expert', 'patches'}
  assert len(images) == len(names)
  for image in images:
    assert image['src'].startswith('data:image/png;base64,')
    assert len(image['alt']) > 20
  assert {file.name for file in path.parent.glob('*.png')} == {f'{n}{t}.png' for n in names for t in ('', '_dark')}


def test_nothing_is_loaded_from_anywhere(run):
  _, text = run
  document = Document(text)
  for _, attributes in document.tags:
    for name in ('src', 'srcset', 'href', 'data', 'poster', 'action'):
      assert re.match('data:|#', attributes.get(name, '#')), attributes
  assert not document.all('script') and not document.all('iframe')
  assert not re.search(r'https?://|@import|url\(', text)


def test_every_picture_has_a_caption_and_the_page_its_sections(run):
  _, text = run
  document = Document(text)
  assert document.headings == ['moejax run: digits <b>', 'Learning', 'Trouble', 'Balance', 'Specialisation', 'Evaluation',
                               'Model', 'Config']
  assert len(document.all('figcaption')) == len(document.all('figure')) == len(document.all('img'))
  assert document.all('html')[0]['lang'] == 'en'
  sections = {attributes['id'] for attributes in document.all('section')}
  assert {a['href'].removeprefix('#') for a in document.all('a')} == sections


def test_numbers_come_from_the_run(run):
  _, text = run
  assert '<b>3</b><span>training steps' in text
  assert '<b>0.6</b><span>test accuracy' in text      # the last evaluation, 3/5
  assert 'model.moe.router.select.k=1' in text and '0.55' in text and 'not finite' in text
  assert 'python -m moejax.evaluate --workdir=' in text
  assert 'block_01: 25% of the choices are dropped' in text
  # The class determines the expert, except for the dropped patch: full information.
  assert 'the highest is 1.000 in block_01' in text


def test_a_dense_model_says_that_there_is_no_routing(tmp_path):
  text = write(tmp_path, list(rows(layers=()))).read_text(encoding='utf-8')
  assert 'no sparse layers' in text
  assert len(Document(text).all('img')) == 1  # learning


def test_a_run_without_metrics_still_has_a_report_of_its_model(tmp_path):
  text = write(tmp_path, block_01=fakes.by_class(fakes.CLASSES)).read_text(encoding='utf-8')
  assert 'There are no metrics yet' in text
  assert len(Document(text).all('img')) == 4  # load, information, classes by expert, patches


def test_a_soft_model_shows_what_experts_read_and_what_they_write(tmp_path):
  write(tmp_path, list(rows(steps=(1,))), block_01=fakes.soft(4))
  assert (tmp_path / 'report' / 'class_read_by_expert.png').exists()


def test_more_experts_than_colours_are_shown_as_heat_maps_only(tmp_path):
  write(tmp_path, list(rows(experts=128, steps=(1, 2))), block_01=fakes.dense(128))
  assert (tmp_path / 'report' / 'class_by_expert.png').exists()
  assert not (tmp_path / 'report' / 'patches.png').exists()


def test_markup_in_text_is_escaped():
  assert page.table(['<a>'], [['&"']]).count('&lt;a&gt;') == 1
  colours = page.coloured_tokens(['<b>', 'x'], [0, -1], 2)
  assert '<b>' not in colours and 'no expert' in colours


def test_series_keep_the_later_of_two_rows_of_a_step_and_nan_for_non_finite_values():
  series = history.series([{'step': 1, 'a': 1.}, {'step': 3, 'a': 9.}, {'step': 2, 'a': None}, {'step': 3, 'a': 5.},
                           {'step': 3, 'router/block_01/load': [0.5, 0.5]}])
  np.testing.assert_array_equal(series['a'].steps, [1, 2, 3])
  np.testing.assert_array_equal(series['a'].values, [1., np.nan, 5.])
  assert history.router_layers(series, 'load')['block_01'].values.shape == (1, 2)


@pytest.mark.parametrize('tokens, grid', [(16, (0, 4)), (17, (1, 4)), (12, None), (1, None), (2, None)])
def test_tokens_are_a_grid_of_patches_where_they_are_a_square_or_one_more(tokens, grid):
  assert specialisation_report.patch_grid(tokens) == grid


def test_colours_of_experts_are_distinct_also_without_red_green_vision():
  # Machado et al. 2009, severity 1: matrices in linear RGB.
  deuteranopia = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
  protanopia = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
  rgb = np.array([matplotlib.colors.to_rgb(c) for c in style.experts(8)])
  for matrix in (np.eye(3), np.array(deuteranopia), np.array(protanopia)):
    seen = np.clip(rgb**2.2 @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 9 * np.eye(8)
    assert distance.min() > 0.15  # black to white is 1.73


@pytest.mark.parametrize('steps', [[5], [0, 1], [1, 10, 100]])
def test_heat_maps_over_time_take_any_steps(steps):
  with style.theme('light'):
    figure = plots.load_over_time({'block_01': (np.array(steps), np.full((len(steps), 3), 1 / 3))})
  # The expected value is the middle of the scale in every figure.
  np.testing.assert_allclose(figure.axes[0].collections[0].get_array(), 0, atol=1e-12)


@pytest.mark.parametrize('name, number', [
    ('block', 2), ('block', 40), ('block_of_an_encoder', 12), ('a_sublayer_whose_name_is_wider_than_its_panel' * 2, 4)])
def test_legends_are_above_their_panels_and_no_wider_whatever_lines_are_called(name, number):
  lines = {f'{name}_{i:02d}/{sublayer}': (np.arange(9), np.full(9, i)) for i in range(number // 2)
           for sublayer in ('mixer', 'ffn')}
  few = {'training': (np.arange(9), np.ones(9))}
  with style.theme('light'):
    figure = plots.curves({'first': lines, 'second': few, 'third': few, 'fourth': lines}, {'first': ('even', 1.)})
    figure.draw_without_rendering()
  panels = [axis.get_window_extent() for axis in figure.axes]
  legends = [axis.get_legend().get_window_extent() for axis in figure.axes]
  for panel, legend in zip(panels, legends):
    assert panel.x0 <= legend.x0 and legend.x1 <= panel.x1 and panel.y1 <= legend.y0
    assert not any(legend.overlaps(other) for other in panels)
    np.testing.assert_allclose([panel.width, panel.height], [panels[0].width, panels[0].height], rtol=1e-3)
  assert panels[0].width > 0.35 * figure.bbox.width and panels[0].height > 180  # of 330 for a panel with its labels
  first = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
  assert len(first) == min(number, 12) + 1 and first[-1] == 'even'


@pytest.mark.browser
def test_a_browser_shows_the_page_without_errors_or_requests(run):
  from playwright import sync_api  # only this test needs it
  path, _ = run
  program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))))
  problems, requests = [], []
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=program, args=['--no-sandbox'])
    for theme, width in (('light', 1280), ('dark', 390)):
      tab = browser.new_page(color_scheme=theme, viewport=dict(width=width, height=900))
      tab.on('console', lambda message: problems.append(message.text))
      tab.on('pageerror', lambda error: problems.append(str(error)))
      tab.on('request', lambda request: requests.append(request.url))
      tab.goto(path.resolve().as_uri())
      widths = tab.eval_on_selector_all('img', 'images => images.map(image => image.complete && image.naturalWidth)')
      assert len(widths) == 7 and all(widths)
      assert tab.locator('h2').all_inner_texts()[:4] == ['Learning', 'Trouble', 'Balance', 'Specialisation']
      # Nothing is wider than the screen, even on a phone.
      assert tab.evaluate('document.documentElement.scrollWidth') <= width
      tab.screenshot(path=path.parent / f'page_{theme}.png', full_page=True)
    browser.close()
  assert problems == []
  assert [url for url in requests if not url.startswith(('file:', 'data:'))] == []
