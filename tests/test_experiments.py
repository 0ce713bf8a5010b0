"""Studies and docs: sweeps name configs that exist, and all tables of README and docs are made of committed results."""
import importlib
import json
import subprocess
import sys

import pytest

from experiments import runner, tables

# Studies that have run; the docs say of others that they have not.
STUDIES = sorted(path.parent.name for path in runner.ROOT.glob('experiments/*/sweep.py')
                 if 'def sweep(' in path.read_text() and (path.parent / 'results.json').exists())


@pytest.mark.parametrize('study', STUDIES)
def test_the_results_are_those_of_the_sweep(study):
  runs = list(importlib.import_module(f'experiments.{study}.sweep').sweep())
  assert all((runner.ROOT / run.config.partition(':')[0]).exists() for run in runs)
  done = [run['key'] for run in runner.load(study)['runs']]
  # Effects of papers are measured one by one; docs/systems.md says which are not yet.
  assert done == [run.key for run in runs if study != 'paper_effects' or run.key in done]


def test_every_table_is_what_the_results_give():
  text = ''.join(page.read_text() for page in tables.PAGES)
  assert tables.fill(text) == text
  assert all(f'<!-- table:{name} -->' in text for name in tables.TABLES)


def test_the_newest_value_of_each_metric_counts(tmp_path):
  rows = [{'step': 1, 'train/loss': 3., 'eval/test/accuracy': .5}, {'step': 2, 'train/loss': 2., 'load': [1, 2]}]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert runner.last_metrics(tmp_path) == {'step': 2, 'train/loss': 2., 'eval/test/accuracy': .5}


@pytest.mark.slow
def test_runs_that_are_killed_and_damaged_end_as_if_they_had_not_been(tmp_path):
  command = [sys.executable, '-m', 'experiments.faults.sweep', '--kills=6', '--kinds=kill,kill_while_saving,corrupt,stall',
             f'--out={tmp_path}/results.json']
  ended = subprocess.run(command, cwd=runner.ROOT, capture_output=True, text=True)
  assert ended.returncode == 0, ended.stdout + ended.stderr
  runs = json.loads((tmp_path / 'results.json').read_text())['runs']
  assert sum(run['injected'] for run in runs if run['kind'].startswith('kill')) == 6
  assert all(run['identical'] and not run['problems'] for run in runs)
