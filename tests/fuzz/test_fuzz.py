"""A hundred mistakes in small configs: each is accepted and traced, or refused in a sentence that names the key.

`python -m tests.fuzz` draws any number more; tests/fuzz/results.md has what came of those.
"""
import collections
import math
import pathlib

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import mutants, probe, trial

LINES = pathlib.Path(__file__).with_name('fixed_mutants.txt').read_text().splitlines()


@pytest.mark.parametrize('line', LINES)
def test_it_is_accepted_or_refused_in_a_sentence(line):
  _, name, *changes = line.split(' | ')
  outcome = trial.attempt(mutants.Mutant(name, tuple(changes)).build())
  assert outcome.verdict in ('accepted', 'refused'), outcome


def test_they_are_of_all_kinds():
  kinds = collections.Counter(kind for line in LINES for kind in line.split(' | ')[0].split(', '))
  assert len(LINES) >= 100 and all(kinds[kind] >= 3 for kind in mutants.KINDS), kinds


def test_a_change_is_a_line_of_text():
  config = dict(model=dict(dim=8, heads=2), data=dict(size=4))
  others = dict(other=dict(model=dict(heads=16, width=dict(a=1))))
  for change in ('model.dim = nan', 'del model.heads', 'data.source.kind = [1, (2,)]', 'model.width <- other',
                 'data.heads <- other model.heads', 'model.dim <-> data.size'):
    mutants.apply(config, change, others.get)
  assert math.isnan(config['data'].pop('size'))
  assert config == dict(model=dict(dim=4, width=dict(a=1)), data=dict(source=dict(kind=[1, (2,)]), heads=16))


def test_the_same_number_is_the_same_mutant():
  draw = lambda number: mutants.draw(number, seed=3, names=['understanding_moe_digits'])
  assert [draw(n) for n in range(20)] == [draw(n) for n in range(20)]
  assert len({draw(n) for n in range(50)}) > 45


def test_keys_that_the_config_leaves_out_are_found():
  keys = probe.probe('understanding_moe_digits').keys
  assert {'model.moe.experts.init_scale', 'optimizer.schedule.end', 'training.average', 'mesh.expert'} <= set(keys)


@pytest.mark.parametrize('raised, verdict', [
    (trial.ConfigError('config.model.dim must be 1.'), 'refused'), (trial.ConfigError('dim must be 1.'), 'unclear'),
    (trial.DataError('config.data.source: no file.'), 'refused'), (trial.ConfigError('config.a is\nwrong.'), 'unclear'),
    (ValueError('config.a is wrong.'), 'traceback'), (MemoryError(), 'memory')])
def test_what_counts_as_a_fault(raised, verdict, monkeypatch):
  def prepare(config):
    raise raised
  monkeypatch.setattr(trial.setup, 'prepare', prepare)
  assert trial.attempt({}).verdict == verdict
  assert (verdict in command.FAULTS) == (verdict != 'refused')


def test_what_does_not_end_is_a_hang(monkeypatch):
  def prepare(config):
    while True:
      pass
  monkeypatch.setattr(trial, 'SECONDS', 0.05)
  monkeypatch.setattr(trial.setup, 'prepare', prepare)
  assert trial.attempt({}).verdict == 'hang'


def test_the_summary_counts_by_kind_and_config():
  line = dict(number=0, config='a:b', changes=['x = 1'], kinds=['huge'], seconds=1., message='', place='')
  found = command.summary([line | dict(verdict='accepted'), line | dict(verdict='hang', config='a'),
                           line | dict(verdict='refused', kinds=['name', 'huge'])])
  assert found['by_config'] == {'a': dict(accepted=1, faults=1, refused=1)}
  assert found['by_kind'] == dict(huge=dict(accepted=1, faults=1, refused=1), name=dict(refused=1))
  assert [fault['verdict'] for fault in found['faults']] == ['hang']
