"""The runner of studies: what it does with runs that end, fail, are killed or have changed, and where it puts them."""
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from experiments import checks, runner, schedule
from experiments.checks import Machine, Place
from moejax.config import ConfigError

PAGE = runner.ROOT / 'docs/comparing.md'
CPU = Machine('cpu', 'cpu', 1)
# Runs of `python -c`: `does` is their program, in which `out` is the workdir and `seed` the seed.
SWEEP = '''
from experiments.runner import Run
from moejax.config import ConfigError

METRICS = {{'score': 'score'}}

class Scripted(Run):
  def command(self, workdir):
    start = f'import json, os, pathlib, sys, time; seed = {{self.seed}}; out = pathlib.Path({{str(workdir)!r}}); '
    write = 'write = lambda **row: (out / "metrics.jsonl").write_text(json.dumps(row)); '
    return ['python', '-c', start + write + 'out.mkdir(parents=True, exist_ok=True)\\n' + self.config]

  def check(self, devices):
    if 'impossible' in self.config:
      raise ConfigError('config.it is impossible.')

def sweep():
  for name, does in {does!r}.items():
    for seed in range(2):
      yield Scripted(name, does, seed)
'''
SCORES = 'write(score=seed + 1.)'


@pytest.fixture
def write(tmp_path):
  def write(**does):
    (tmp_path / 'study').mkdir(exist_ok=True)
    (tmp_path / 'study/sweep.py').write_text(SWEEP.format(does=does))
    return runner.find(str(tmp_path / 'study'))
  return write


@pytest.fixture
def run(monkeypatch):
  monkeypatch.setattr(checks, 'check', lambda study, runs: CPU)
  return lambda study, **arguments: runner.main(str(study.folder), **arguments)


def scores(study):
  return {row['key']: row['metrics']['score'] for row in study.results()['runs']}


def test_what_fails_is_named_with_its_log_and_the_others_finish(write, run, capsys):
  study = write(bad='sys.exit("no luck" if seed else 0)', good=SCORES)
  assert sorted(run(study)) == ['bad-0', 'bad-1']
  assert scores(study) == {'good-0': 1., 'good-1': 2.}
  said = capsys.readouterr().out
  assert 'bad-0: it measured no score; there are' in said
  assert f'bad-1: no luck; log: {study.workdirs}/bad-1.log' in said


def test_what_is_done_is_not_repeated(write, run):
  study = write(a='(out.parent / "starts").open("a").write("x"); write(score=seed + 1.)')
  assert run(study) == run(study) == []
  assert (study.workdirs / 'starts').read_text() == 'xx'  # two seeds
  assert [row['key'] for row in study.results()['runs']] == ['a-0', 'a-1']
  assert all(set(row) >= {'command', 'commit', 'machine', 'jax', 'seed', 'seconds'} for row in study.results()['runs'])


def test_a_run_that_was_killed_finds_what_it_had_left_and_its_row_says_so(write, run):
  study = write(a='if (out / "state").exists(): write(score=9.); sys.exit()\n'
                  '(out / "state").touch(); os.kill(os.getpid(), 9)')
  assert run(study, starts=('a-0',)) == ['a-0']
  assert run(study, starts=('a-0',)) == []
  row, = study.results()['runs']
  assert row['metrics']['score'] == 9. and row['resumed'] == row['commit']


def test_nothing_runs_over_what_another_command_or_an_ended_run_left(write, run):
  study = write(a='sys.exit(1)')
  run(study)
  study = write(a=SCORES)
  with pytest.raises(ConfigError, match='a-0 is not of a run that could be resumed.*rm -r'):
    run(study)
  study = write(b=SCORES)
  run(study)
  (study.folder / 'results.json').unlink()
  with pytest.raises(ConfigError, match='b-0 is not of a run that could be resumed'):
    run(study)


def test_results_of_another_command_are_not_taken_for_those_of_the_sweep(write, run):
  run(write(a=SCORES))
  with pytest.raises(ConfigError, match='has a-0 by another command than sweep.py gives now'):
    run(write(a='write(score=0.)'))


def test_a_variant_that_the_sweep_has_no_more_keeps_its_results(write, run, capsys):
  run(write(gone=SCORES))
  study = write(new=SCORES)
  assert run(study) == []
  assert list(scores(study)) == ['new-0', 'new-1', 'gone-0', 'gone-1']
  assert '| gone ' not in capsys.readouterr().out.rpartition('| model')[2]


def test_a_signal_stops_the_runs_and_keeps_what_is_done(write):
  study = write(a='seed and time.sleep(60); write(score=1.)')
  results = dict(command='c', runs=[])
  timer = threading.Timer(3., os.kill, (os.getpid(), signal.SIGTERM))
  timer.start()
  with pytest.raises(schedule.Stopped) as stopped:
    schedule.Schedule(study, study.runs, results, CPU, [Place(), Place()]).run()
  assert stopped.value.code == 128 + signal.SIGTERM
  assert list(scores(study)) == ['a-0']
  assert not os.path.exists(study.workdirs / 'a-1/metrics.jsonl')


def test_the_time_left_is_what_runs_of_the_variant_took(write):
  study = write(a=SCORES, b=SCORES)
  row = lambda name, seconds, **more: dict(key=f'{name}-9', name=name, seconds=seconds, **more)
  left = lambda rows, places: schedule.Schedule(study, study.runs, dict(runs=rows), CPU, [Place()] * places).left()
  assert left([], 1) is None
  assert left([row('a', 10.)], 1) == 40.  # b as a, of which something is known
  assert left([row('a', 10.), row('b', 50.), row('b', 70.)], 1) == 2 * 10 + 2 * 60
  assert left([row('a', 10.), row('b', 50.)], 2) == 60.
  assert left([row('a', 10.), row('b', 50.)], 4) == 50.  # never less than the longest
  assert left([row('a', 10.), row('a', 1., resumed='c0ffee')], 1) == 40.  # that was not the whole of it


def test_runs_share_out_the_cores_or_have_a_gpu_each(monkeypatch):
  monkeypatch.setattr(checks, '_cores', lambda: {0, 1, 2, 3, 4})
  cores = lambda *arguments: [set(place.cores) for place in CPU.places(*arguments)]
  assert cores(None, 9) == [{0}, {1}, {2}, {3}, {4}]
  assert cores(2, 9) == [{0, 2, 4}, {1, 3}]
  assert cores(None, 1) == [{0, 1, 2, 3, 4}]  # alone
  visible = lambda *arguments: [place.environment['CUDA_VISIBLE_DEVICES']
                                for place in Machine('gpu', 'H100', 4).places(*arguments)]
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  assert visible(None, 9) == ['0', '1', '2', '3'] and visible(2, 9) == ['0', '1']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,7')
  assert visible(None, 9) == ['5', '7']
  assert Machine('tpu', 'v5e', 4).places(None, 9) == [Place()]
  with pytest.raises(ConfigError, match='--jobs=6 must be from 1 to 5'):
    CPU.places(6, 9)


def test_all_configs_are_checked_before_the_first_run(write):
  study = write(good=SCORES, bad='impossible')
  with pytest.raises(ConfigError, match='1 of 2 variants cannot run:\n  bad: config.it is impossible.\nNothing was'):
    runner.main(str(study.folder))
  assert study.results() is None and not study.workdirs.exists()


def test_a_study_that_is_not_there_is_answered_with_the_nearest():
  with pytest.raises(ConfigError, match="There is no study digit: .*Did you mean 'digits'"):
    runner.find('digit')


def test_runs_of_one_key_are_refused(write, tmp_path):
  study = write(a=SCORES)
  path = study.folder / 'sweep.py'
  path.write_text(path.read_text().replace('range(2)', '(3, 3)'))
  with pytest.raises(ConfigError, match='yields a-3 more than once'):
    runner.find(str(study.folder))


def test_the_command_ends_with_1_where_a_run_failed(write, monkeypatch):
  monkeypatch.setattr(checks, 'check', lambda study, runs: CPU)
  monkeypatch.setattr(sys, 'argv', ['runner', str(write(a='sys.exit(1)').folder), '--jobs=1'])
  assert runner.command() == 1


@pytest.mark.slow
def test_the_study_of_the_page_on_comparing_runs_as_it_stands(tmp_path):
  block, = re.findall(r"cat > runs/two_experts/sweep.py <<'END'\n(.*?)^END$", PAGE.read_text(), re.S | re.M)
  (tmp_path / 'sweep.py').write_text(block.replace("'training.steps': 60", "'training.steps': 12"))
  ended = subprocess.run([sys.executable, '-m', 'experiments.runner', str(tmp_path)], cwd=runner.ROOT, text=True,
                         capture_output=True)
  assert ended.returncode == 0, ended.stdout + ended.stderr
  assert f'6 runs, {min(6, len(os.sched_getaffinity(0)))} at a time' in ended.stdout
  assert '| two experts |' in ended.stdout and 'minus one expert (points)' in ended.stdout
  assert (tmp_path / 'figure.png').stat().st_size > 0
  assert len(json.loads((tmp_path / 'results.json').read_text())['runs']) == 6
