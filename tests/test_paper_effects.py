"""Effects of papers: how a claim is judged, by hand, and that every effect can run."""
import functools
import importlib
import json
import operator
import pathlib

import pytest

from experiments import runner
from experiments.paper_effects import effect, sweep
from experiments.paper_effects.claims import CLAIMS
from experiments.paper_effects.effect import Effect


def make(**changes):
  return Effect(**{**dict(system='S', claim='c', metric='m', larger='a', smaller='b', variants=dict(a={}, b={}),
                          config='configs/vmoe_digits.py'), **changes})


@pytest.mark.parametrize('larger, smaller, at_least, verdict', [
    ([2, 3, 4], [1, 2, 3], 1., 'shown'),
    ([2, 3, 4], [1, 2, 3], 1.5, 'shown'),  # 3 on average, 1.5 times 2
    ([2, 3, 4], [1, 2, 3], 1.6, 'not shown'),
    ([2, 3, 1], [1, 2, 3], 1., 'not shown'),  # not in every seed
    ([1, 2, 3], [2, 3, 4], 1., 'opposite'),
    ([1, 1, 1], [1, 1, 1], 1., 'not shown'),
])
def test_a_claim_is_judged_by_every_seed_and_by_its_factor(larger, smaller, at_least, verdict):
  found = make(at_least=at_least).measured(dict(a=larger, b=smaller))
  assert found['verdict'] == verdict
  assert found['values']['a'] == dict(mean=sum(larger) / 3, deviation=1 if len(set(larger)) > 1 else 0)


def test_an_effect_is_judged_once_all_its_runs_are_there():
  known = dict(it=make(seeds=(0, 1)))
  runs = [dict(key=run.key, name=run.name, metrics=dict(m=value))
          for run, value in zip(known['it'].runs('it'), (5., 6., 1., 2.))]
  assert [run['key'] for run in runs] == ['it.a-0', 'it.a-1', 'it.b-0', 'it.b-1']
  assert effect.summary(known, dict(runs=runs[:3])) == {}
  assert effect.summary(known, dict(runs=runs))['it']['verdict'] == 'shown'


def test_a_run_trains_with_the_keys_of_its_variant():
  run = next(iter(make(common={'training.steps': 9}, variants=dict(a={'seedling': 1}, b={})).runs('it')))
  assert run.command(pathlib.Path('runs/x'))[-3:] == [
      '--config.training.steps=9', '--config.seedling=1', '--config.report.at=never']


def test_what_two_effects_read_from_one_run_is_run_once(monkeypatch):
  both = {'file': make(metric='m'), 'file/other': make(metric='n', variants=dict(b={}, a={}, c={}))}
  monkeypatch.setattr(sweep, 'CLAIMS', both)
  runs = {run.key: set(run.wanted) for run in sweep.sweep()}
  assert len(runs) == 9 and runs['file.a-1'] == {'m', 'n'} and runs['file.c-1'] == {'n'}
  both['file/other'] = make(variants=dict(b={}, a={'seedling': 1}))
  with pytest.raises(ValueError, match='file.a-0.*in the same way'):
    list(sweep.sweep())


def test_effects_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='no variant'):
    make(larger='c')
  with pytest.raises(ValueError, match='one of them'):
    make(program='x')


@pytest.mark.parametrize('name', CLAIMS)
def test_every_effect_names_a_config_whose_keys_exist_or_a_program(name):
  known = CLAIMS[name]
  if known.program:
    assert (sweep.FOLDER / f'programs/{known.program}.py').is_file()
    return
  file, _, argument = known.config.partition(':')
  get_config = importlib.import_module(file.removesuffix('.py').replace('/', '.')).get_config
  config = get_config(argument) if argument else get_config()
  for key in {*known.common, *(key for keys in known.variants.values() for key in keys)}:
    *parents, last = key.split('.')
    assert last in functools.reduce(operator.getitem, parents, config), f'{known.config} has no {key}'


def test_the_committed_verdicts_are_those_of_the_committed_results(tmp_path):
  effect.write(tmp_path / 'summary.json', effect.summary(CLAIMS, runner.load('paper_effects')))
  assert json.loads((tmp_path / 'summary.json').read_text()) == json.loads(
      (sweep.FOLDER / 'summary.json').read_text())


def test_the_results_page_says_how_many_claims_were_shown():
  verdicts = [found['verdict'] for found in json.loads((sweep.FOLDER / 'summary.json').read_text()).values()]
  shown, not_shown, opposite = (verdicts.count(verdict) for verdict in ('shown', 'not shown', 'opposite'))
  assert (f'Of {len(verdicts)} claims {shown} show at that size, {not_shown} do not show, and {opposite} are the other '
          'way round') in (runner.ROOT / 'docs/results.md').read_text().replace('\n', ' ')
