"""Evaluation of a run in a bucket: followers see only whole checkpoints, and several may append their results.

Oracle: what the run itself measures.
"""
import threading

import pytest
from bucket_runs import PARTS
from training_fakes import make_setup

from moejax import buckets, evaluate
from moejax.evaluation import log
from moejax.training import follow, metrics, setup, workdir
from moejax.training.durability import retention

pytestmark = [pytest.mark.gcs, pytest.mark.usefixtures('emulated_bucket')]


def test_a_follower_measures_what_the_run_does_and_changes_nothing_but_its_own_file(run, folder, monkeypatch):
  run(folder)
  before = {name: blob.generation for name, blob in buckets.objects(folder).items()}
  monkeypatch.setattr(setup, 'prepare', lambda config: make_setup(**PARTS))
  said = []
  evaluate.follow(str(folder), say=said.append)
  by_the_run = {row['step']: {'test/accuracy': row['eval/test/accuracy']} for row in metrics.read(folder)
                if 'eval/test/accuracy' in row}
  assert {row['step']: row['metrics'] for row in log.read(folder)} == by_the_run and list(by_the_run) == [4, 8]
  after = {name: blob.generation for name, blob in buckets.objects(folder).items()}
  assert after.pop(log.FILE) and after == before
  assert f'written to {folder}/evaluations.jsonl' in said[2 + 2]
  again = []
  evaluate.follow(str(folder), say=again.append)
  assert len(again) == 1  # that all are evaluated


def test_a_follower_waits_for_a_run_and_never_takes_a_checkpoint_before_it_is_whole(folder, monkeypatch):
  def write(name):
    buckets.write(folder / 'checkpoints' / name, b'x', 0)
  events = [lambda: workdir.claim(folder, make_setup().config), lambda: write('8/params/a'),
            lambda: write(f'8/{retention.COMMITTED}')]
  monkeypatch.setattr(follow, '_sleep', lambda seconds, interruption: events.pop(0)())
  evaluated = []
  follow.run(folder, evaluated.append, (), 30., lambda sentence: None)
  assert evaluated == [8] and not events


def test_lines_of_several_that_append_at_once_are_all_there(folder):
  threads = [threading.Thread(target=log.append, args=(folder, number, {}, {'loss': 0.})) for number in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert {row['step'] for row in log.read(folder)} == set(range(8))
