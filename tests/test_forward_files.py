"""The way of a token through the house does not grow longer."""
import pathlib

import jax
import pytest

from tests import forward_files

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
# Of a forward pass of configs/mixtral_chitchat.py.
MOST_COMPUTING = 22
MOST_CALLED = 39


@pytest.fixture(scope='module')
def stops():
  jax.clear_caches()  # a function that another test had traced would not run
  return forward_files.stops(str(CONFIGS / 'mixtral_chitchat.py'))


def test_a_forward_pass_is_computed_in_at_most_so_many_files(stops):
  forward, _ = stops
  computing = [file for file in forward if file.equations]
  assert len(computing) <= MOST_COMPUTING, forward_files.table('computes', computing)


def test_a_forward_pass_calls_at_most_so_many_files(stops):
  forward, _ = stops
  assert len(forward) <= MOST_CALLED, forward_files.table('forward pass', forward)


def test_equations_belong_to_the_innermost_file_that_calls_jax(tmp_path, monkeypatch):
  """A loop's body is counted as the loop is: the double is `inner`'s, the sum `outer`'s, and the loop `outer`'s."""
  monkeypatch.setattr(forward_files, 'PACKAGE', tmp_path)
  inner, outer = {'lax': jax.lax}, {'lax': jax.lax}
  (tmp_path / 'inner.py').write_text('def double(x):\n  return lax.mul(x, x)\n')
  exec(compile((tmp_path / 'inner.py').read_text(), tmp_path / 'inner.py', 'exec'), inner)
  source = 'def outer(x):\n  return lax.fori_loop(0, 3, lambda _, y: lax.add(y, double(y)), x)\n'
  outer['double'] = inner['double']
  exec(compile(source, tmp_path / 'outer.py', 'exec'), outer)
  program = jax.make_jaxpr(outer['outer'])(1.)
  found = list(forward_files.sources(program.jaxpr))
  assert found.count('inner.py') == 1 and found.count('outer.py') >= 2 and set(found) == {'inner.py', 'outer.py'}


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
