"""The way of a token through the house does not grow longer."""
import pathlib

import jax
import pytest

from tests import forward_files

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
MOST_FILES = 46  # of a forward pass of configs/mixtral_chitchat.py


@pytest.fixture(scope='module')
def stops():
  jax.clear_caches()  # a function that another test had traced would not run
  return forward_files.stops(str(CONFIGS / 'mixtral_chitchat.py'))


def test_a_forward_pass_runs_at_most_so_many_files(stops):
  forward, _ = stops
  assert len(forward) <= MOST_FILES, forward_files.table('forward pass', forward)


def test_files_come_in_the_order_of_the_house(stops):
  """The model is called before its blocks, and these before the routing, dispatch and kernels within them."""
  forward, _ = stops
  house = ['models/decoder.py', 'layers/transformer.py', 'layers/block.py', 'layers/feed_forwards/moe.py',
           'routing/router.py', 'dispatch/dispatcher.py', 'experts/feed_forward.py', 'kernels/expert_block.py']
  assert [file.path for file in forward if file.path in house] == house


def test_what_runs_is_listed_with_its_functions_and_lines(tmp_path, monkeypatch):
  source = 'class A:\n  x = 1\n\n  def f(self):\n    return (lambda: 0)()\n\n\ndef unused():\n  pass\n'
  path = tmp_path / 'room/file.py'
  path.parent.mkdir()
  path.write_text(source)
  monkeypatch.setattr(forward_files, 'PACKAGE', tmp_path)
  scope = {}
  with forward_files.called() as codes:
    exec(compile(source, path, 'exec'), scope)  # the bodies of the module and of A are not functions
    scope['A']().f()
  assert forward_files.files(codes) == [forward_files.File('room/file.py', ('A.f', 'A.f.<locals>.<lambda>'), 2, 9)]


def test_the_build_alone_has_what_the_forward_pass_does_not_run(stops):
  forward, build = stops
  assert 'ranges.py' in {file.path for file in build}
  assert not {file.path for file in forward} & {file.path for file in build}
