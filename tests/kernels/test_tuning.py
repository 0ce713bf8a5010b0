"""Tile sizes: lookup in the tables, and that the fastest candidate wins.

Time is never measured here: a module of two-line kernels stands in for real ones, and an injected clock reads from a
kernel's output which tiles made it.
"""
import collections
import dataclasses
import itertools
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.kernels import triton, tuning
from moejax.kernels.choice import Implementation, Shape
from moejax.kernels.target import interpreted

LAYER = tuning.SparseLayer(rows=60, experts=4, dim=16, hidden=32)
SHAPE = Shape(1024, 8, 64, 96, 'bfloat16')
KIND = 'NVIDIA H100 80GB HBM3'


@dataclasses.dataclass(frozen=True)
class Size:
  size: int


@pytest.fixture
def table(tmp_path, monkeypatch):
  """The path of the user's table, which does not exist."""
  path = tmp_path / 'folder' / 'tuning.json'
  monkeypatch.setenv('MOEJAX_TUNING_CACHE', str(path))
  tuning._read.cache_clear()
  yield path
  tuning._read.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
  """A module whose kernels return the size of their tiles, in place of 'triton'; of size 0, they do not compile."""
  def kernel(*arguments, tiles, **_):
    if not tiles.size:
      raise ValueError('tiles of nothing')
    return jnp.full((), tiles.size)

  module = types.ModuleType('moejax.kernels.made_up')
  module.candidates = lambda kernel, shape: [Size(size) for size in (0, 1, 2, 4, 8)]
  module.IMPLEMENTATION = Implementation(kernel, kernel, lambda target, shape: None, row_multiple=8, up=kernel)
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setitem(tuning.MODULES, 'triton', module.__name__)
  return module


def clock(fastest, turns=None):
  """Seconds grow with the distance between a kernel's tiles and the fastest ones."""
  def measure(run):
    size = int(run())
    if turns is not None:
      turns.append(size)
    return 1e-3 + 1e-6 * abs(size - fastest)
  return measure


# ---- Measuring.


@pytest.mark.parametrize('fastest', [1, 4, 8])
def test_the_fastest_candidate_wins_at_any_position(kernels, fastest):
  up, down = tuning.tune('triton', LAYER, kernels=['matmul'], measure=clock(fastest)).values()
  assert up == down == {'tiles': {'size': fastest}, 'measured': True, 'microseconds': 1000.}


def test_both_matmuls_are_tuned_and_the_first_one_fused_with_its_activation(kernels):
  # 60 rows hold 7 blocks of 8; of all powers of two, 64 is nearest to 56.
  names = [name.split(' | ')[2:] for name in tuning.tune('triton', LAYER, measure=clock(1))]
  up, down = ['64x16x32 in 4', 'bfloat16'], ['64x32x16 in 4', 'bfloat16']
  assert names == [['matmul', *up], ['transposed', *up], ['weight_gradient', *up], ['up', *up],
                   ['matmul', *down], ['transposed', *down], ['weight_gradient', *down]]


def test_candidates_take_turns_and_skip_candidates_that_do_not_compile(kernels):
  turns = []
  tuning.tune('triton', LAYER, kernels=['matmul'], measure=clock(1, turns))
  assert turns[:8] == [1, 2, 4, 8, 1, 2, 4, 8] and set(collections.Counter(turns).values()) == {2 * 9}


def test_one_slow_turn_decides_nothing(kernels):
  calls = collections.Counter()

  def measure(run):
    size = int(run())
    calls[size] += 1
    return 1. if size == 2 and calls[size] == 1 else clock(2)(run)

  entries = tuning.tune('triton', LAYER, kernels=['matmul'], measure=measure)
  assert {entry['tiles']['size'] for entry in entries.values()} == {2}


def test_a_module_of_which_nothing_compiles_is_refused(kernels):
  kernels.candidates = lambda kernel, shape: [Size(0)]
  with pytest.raises(ConfigError, match='None of 1 candidates of triton for matmul 16x32 runs'):
    tuning.tune('triton', LAYER, measure=clock(1))


def test_a_module_without_candidates_is_refused(kernels):
  del kernels.candidates
  with pytest.raises(ConfigError, match=r'triton has no tile sizes to choose from: .* candidates\(kernel, shape\)'):
    tuning.tune('triton', LAYER)
  with pytest.raises(ConfigError, match='xla has no tile sizes .* is one of pallas_gpu, pallas_tpu, triton'):
    tuning.tune('xla', LAYER)


def test_a_device_that_the_kernels_are_not_for_is_refused_with_their_own_sentence():
  with pytest.raises(ConfigError, match="triton cannot be tuned here. Triton kernels are for NVIDIA GPUs .*'cpu'"):
    tuning.tune('triton', LAYER)


def test_the_program_explains_its_limits_in_a_sentence():
  command = [sys.executable, '-m', 'moejax.kernels.tuning', '--implementation=triton', '--rows=64', '--experts=2',
             '--dim=16', '--hidden=16']
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 2 and 'Traceback' not in result.stderr
  assert result.stderr.splitlines()[-1].startswith('triton cannot be tuned here.')


def test_triton_kernels_can_be_tuned(table, monkeypatch):
  """Through the real kernels, interpreted: they choose the fastest measured tiles, and compute the same with them."""
  first, second = triton.TritonTiles(32, 32, 4, 2), triton.TritonTiles(32, 16, 4, 2)
  monkeypatch.setattr(triton, 'candidates', lambda kernel, shape: [first, second])
  layer = tuning.SparseLayer(rows=60, experts=2, dim=32, hidden=64, dtype='float32')
  used, call = [], triton._call
  monkeypatch.setattr(triton, '_call', lambda *arguments: used.append(arguments[3]) or call(*arguments))
  x, w, sizes = jnp.ones((256, 32)), jnp.ones((2, 32, 64)), jnp.full(2, 128)
  with interpreted('gpu'):
    before = triton.matmul(x, w, sizes)
    seconds = itertools.cycle([2., 1.])
    tuning.save(tuning.tune('triton', layer, kernels=['matmul'], measure=lambda run: next(seconds)))
    np.testing.assert_array_equal(triton.matmul(x, w, sizes), before)
  assert used[0] == first and used[-1] == second


def test_a_measured_second_is_the_mean_of_calls_that_were_all_made(monkeypatch):
  now = iter([100., 130.])
  monkeypatch.setattr(tuning.time, 'perf_counter', lambda: next(now))
  calls = []
  assert tuning.measure(lambda: calls.append(1)) == 30. / len(calls)


# ---- The table.


def entry(size, **more):
  return {'tiles': {'size': size}, 'measured': True, **more}


def test_what_was_saved_is_found_again_and_what_was_not_is_not(table):
  assert tuning.best(KIND, 'triton', 'matmul', SHAPE) is None and not table.exists()
  tuning.save({tuning.key(KIND, 'triton', 'matmul', SHAPE): entry(3)})
  assert tuning.best(KIND, 'triton', 'matmul', SHAPE) == {'size': 3}
  for kind, implementation, kernel in [('NVIDIA A100', 'triton', 'matmul'), (KIND, 'pallas_gpu', 'matmul'),
                                       (KIND, 'triton', 'up')]:
    assert tuning.best(kind, implementation, kernel, SHAPE) is None
  for change in [dict(dtype='float32'), dict(inner=128), dict(outer=128), dict(rows=4096), dict(groups=64)]:
    assert tuning.best(KIND, 'triton', 'matmul', SHAPE._replace(**change)) is None


def test_numbers_of_rows_and_groups_that_are_nearly_the_same_share_an_entry(table):
  tuning.save({tuning.key(KIND, 'triton', 'matmul', SHAPE): entry(3)})
  # 1024 / sqrt(2) = 724.1 and 1024 * sqrt(2) = 1448.2.
  for rows, found in [(725, True), (1448, True), (724, False), (1449, False)]:
    assert (tuning.best(KIND, 'triton', 'matmul', SHAPE._replace(rows=rows)) is not None) == found
  assert tuning.best(KIND, 'triton', 'matmul', SHAPE._replace(groups=7, dtype=jnp.bfloat16)) == {'size': 3}


def test_saving_keeps_other_entries_and_leaves_one_readable_file(table):
  tuning.save({'b': entry(1), 'a': entry(2)})
  tuning.save({'b': entry(5)})
  assert json.loads(table.read_text()) == {'a': entry(2), 'b': entry(5)}
  assert [path.name for path in table.parent.iterdir()] == ['tuning.json']


def test_a_write_that_fails_leaves_the_old_table(table, monkeypatch):
  tuning.save({'a': entry(1)})

  def full(*_):
    raise OSError('disk full')

  monkeypatch.setattr(tuning.os, 'replace', full)
  with pytest.raises(OSError, match='disk full'):
    tuning.save({'a': entry(2)})
  assert json.loads(table.read_text()) == {'a': entry(1)}


def test_the_users_table_goes_before_the_shipped_one(table, tmp_path, monkeypatch):
  monkeypatch.setattr(tuning, 'SHIPPED', tmp_path / 'tuned.json')
  name = tuning.key(KIND, 'triton', 'matmul', SHAPE)
  tuning.save({name: entry(1)}, tuning.SHIPPED)
  assert tuning.best(KIND, 'triton', 'matmul', SHAPE) == {'size': 1}
  tuning.save({name: entry(2)})
  assert tuning.best(KIND, 'triton', 'matmul', SHAPE) == {'size': 2}


def test_tabulated_tiles_that_are_no_longer_candidates_are_ignored(table):
  options = [Size(1), Size(2)]
  for size, chosen in [(2, 2), (64, 1)]:
    with interpreted('gpu'):
      tuning.save({tuning.key('interpreted', 'triton', 'matmul', SHAPE): entry(size)})
      assert tuning.choose('triton', 'matmul', SHAPE, options) == Size(chosen)


def test_tiles_may_be_named_tuples(table):
  options = [collections.namedtuple('Tiles', 'inner outer')(1, n) for n in (1, 2)]
  with interpreted('tpu'):
    tuning.save({tuning.key('interpreted', 'pallas_tpu', 'up', SHAPE): {'tiles': {'inner': 1, 'outer': 2}}})
    assert tuning.choose('pallas_tpu', 'up', SHAPE, options) == (1, 2)


@pytest.mark.parametrize('content', ['', '{"a": ', '[]', '{"a": 3}', '{"a": {"tiles": 3}}', '{"a": {"b": 3}}'])
def test_a_damaged_table_is_named(table, content):
  table.parent.mkdir()
  table.write_text(content)
  with pytest.raises(ConfigError, match=f'{table} is not a valid table of tile sizes .* Delete it'):
    tuning.best(KIND, 'triton', 'matmul', SHAPE)


def test_the_table_is_in_the_users_cache_unless_the_environment_says_where(monkeypatch):
  monkeypatch.setenv('HOME', '/home/someone')
  for value in '', None:
    monkeypatch.setenv('MOEJAX_TUNING_CACHE', value) if value is not None else monkeypatch.delenv('MOEJAX_TUNING_CACHE')
    assert str(tuning.user_table()) == '/home/someone/.cache/moejax/tuning.json'
  monkeypatch.setenv('MOEJAX_TUNING_CACHE', '/tables/mine.json')
  assert str(tuning.user_table()) == '/tables/mine.json'


def test_kernels_measure_nothing_and_write_nothing_unasked(table, monkeypatch):
  def fail(*_, **__):
    raise AssertionError('measured')

  for name in 'measure', '_race', '_runs', 'save', 'tune':
    monkeypatch.setattr(tuning, name, fail)
  with interpreted('gpu'):
    jax.eval_shape(lambda x, w, sizes: triton.matmul(x, w, sizes), jnp.ones((512, 16)), jnp.ones((4, 16, 32)),
                   jnp.full(4, 128))
  assert not table.parent.exists()


def test_a_table_is_read_once(table):
  tuning.save({tuning.key(KIND, 'triton', 'matmul', SHAPE): entry(3)})
  assert tuning.best(KIND, 'triton', 'matmul', SHAPE) == {'size': 3}
  table.unlink()
  assert tuning.best(KIND, 'triton', 'matmul', SHAPE) == {'size': 3}


def test_unmeasured_shipped_entries_are_marked_and_equal_the_default_choice():
  shipped = json.loads(tuning.SHIPPED.read_text())
  guesses = {name: entry for name, entry in shipped.items() if not entry['measured']}
  made_for = {tuple(name.split(' | ')[i] for i in (1, 0, 4)) for name in guesses}
  assert guesses and guesses.items() <= {name: entry for each in made_for
                                         for name, entry in tuning.untuned(*each).items()}.items()


def test_measured_shipped_entries_say_how_long_they_took():
  for entry in json.loads(tuning.SHIPPED.read_text()).values():
    assert entry['measured'] == ('microseconds' in entry)
