"""Which steps are traced, however a run stops. Oracle: a profiler that records its calls.

The real one is in test_loop.py.
"""
import contextlib
import types

import digits_config
import jax
import pytest

from moejax.config import ConfigError, call
from moejax.training import profile, setup


@pytest.fixture
def traced(monkeypatch):
  """The calls of the profiler: 'start', the steps, 'stop'."""
  told = []

  def start(folder):
    assert told.count('start') == told.count('stop'), 'only one trace at a time'
    (folder / 'plugins/profile/2026_01_01').mkdir(parents=True)
    for kind in ('xplane.pb', 'trace.json.gz'):
      (folder / 'plugins/profile/2026_01_01' / f'host.name.{kind}').touch()
    told.append('start')

  @contextlib.contextmanager
  def annotation(name, step_num):
    assert name == 'train'
    told.append(step_num)
    yield

  monkeypatch.setattr(jax.profiler, 'start_trace', start)
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: told.append('stop'))
  monkeypatch.setattr(jax.profiler, 'StepTraceAnnotation', annotation)
  return told


def run(folder, options, start=0, total=12, fails_at=None):
  """The part of the loop that traces; returns its messages."""
  said = []
  shown = types.SimpleNamespace(say=said.append, paused=contextlib.nullcontext)
  with profile.Profile(profile.ProfileConfig(**options), folder, start, shown) as trace:
    for now in range(start + 1, total + 1):
      with trace.step(now, ()):
        if now == fails_at:
          raise RuntimeError('power failure')
      trace.after(now, ())
  return said


def files(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


@pytest.mark.parametrize('options, start, expected', [
    (dict(start=4, steps=3), 0, ['start', 4, 5, 6, 'stop']),
    (dict(start=2, steps=1), 0, ['start', 2, 'stop']),
    (dict(start=11, steps=2), 0, ['start', 11, 12, 'stop']),
    (dict(start=4, steps=3), 2, ['start', 4, 5, 6, 'stop']),
    (dict(start=4, steps=3), 3, ['start', 5, 6, 'stop']),  # step 4 is compiled in
    (dict(start=4, steps=3), 4, ['start', 6, 'stop']),
    (dict(start=4, steps=3), 5, []),
    (dict(start=4, steps=3), 6, []),
    (dict(start=4, steps=3), 12, []),
    (dict(), 0, [])])
def test_the_configured_steps_are_traced_unless_the_process_compiles_in_them(tmp_path, traced, options, start,
                                                                                expected):
  run(tmp_path, options, start)
  assert traced == expected
  steps = [step for step in expected if isinstance(step, int)]
  assert files(tmp_path) == ([f'profile/plugins/profile/steps_{steps[0]}_to_{steps[-1]}/host.name.{kind}'
                              for kind in ('trace.json.gz', 'xplane.pb')] if steps else [])


def test_a_run_that_resumes_within_the_range_says_what_it_traces(tmp_path, traced):
  assert run(tmp_path, dict(start=4, steps=3), 2) == []
  assert run(tmp_path, dict(start=4, steps=3), 3) == [
      'The profile begins with step 5, not 4: the run resumes after step 3, and compiles in the next.']
  assert run(tmp_path, dict(start=4, steps=3), 5) == [
      'The profile of steps 4 to 6 is not written: the run resumes in the last of them, and compiles in it.']
  assert run(tmp_path, dict(start=4, steps=3), 6) == []


def test_a_crash_within_the_range_leaves_no_open_or_partial_trace(tmp_path, traced):
  with pytest.raises(RuntimeError, match='power failure'):
    run(tmp_path, dict(start=4, steps=3), fails_at=5)
  assert traced == ['start', 4, 5, 'stop'] and files(tmp_path) == []
  del traced[:]
  run(tmp_path, dict(start=4, steps=3), start=3)
  assert traced == ['start', 5, 6, 'stop']


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, traced, monkeypatch):
  def no_space():
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(jax.profiler, 'stop_trace', no_space)
  said = run(tmp_path, dict(start=4, steps=3))
  assert said == ['The profile could not be written: [Errno 28] No space left on device. Training continues.']


def test_processes_of_one_host_write_beside_each_other(tmp_path, traced, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for index in (0, 1):
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    run(tmp_path, dict(start=4, steps=3))
  assert files(tmp_path / 'profile/plugins/profile/steps_4_to_6') == [
      'host.name_0.trace.json.gz', 'host.name_0.xplane.pb', 'host.name_1.trace.json.gz', 'host.name_1.xplane.pb']


# ---- the range ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('start, steps, most', [(18, 4, 17), (21, 1, 20)])
def test_steps_beyond_the_run_are_refused(start, steps, most):
  config = digits_config.get_config()  # 20 steps
  config.profile.update(dict(start=start, steps=steps))
  with pytest.raises(ConfigError, match=f'traces steps {start} to {start + steps - 1}, and the run has 20 .*'
                                        f'start to at most {most}'):
    setup.prepare(config)


def test_the_last_steps_of_a_run_can_be_traced():
  profile.ProfileConfig(start=17, steps=4).check(20)
  profile.ProfileConfig().check(1)


def test_the_step_that_every_run_compiles_in_is_refused():
  with pytest.raises(ConfigError, match='config.profile.start must be .*of at least 2.*, not 1'):
    call(profile.ProfileConfig, dict(start=1), 'config.profile')


# ---- what is said at the end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('there, expected', [
    ({'xprof', 'tensorboard'}, 'xprof --logdir {0}/profile'),
    ({'tensorboard', 'tensorboard_plugin_profile'}, 'tensorboard --logdir {0}/profile'),
    ({'tensorboard'}, '{0}/profile/plugins/profile/steps_4_to_6: open its .trace.json.gz at https://ui.perfetto.dev '
                      '(or pip install xprof)'),
    (set(), '{0}/profile/plugins/profile/steps_4_to_6: open its .trace.json.gz at https://ui.perfetto.dev '
            '(or pip install xprof)')])
def test_a_trace_is_shown_by_an_installed_program(tmp_path, traced, monkeypatch, there, expected):
  run(tmp_path, dict(start=4, steps=3))
  monkeypatch.setattr(profile, 'installed', there.__contains__)
  monkeypatch.setattr(profile.importlib.util, 'find_spec', lambda name: name in there or None)
  assert profile.where(tmp_path) == expected.format(tmp_path)


def test_a_run_without_a_trace_has_none_to_show(tmp_path):
  assert profile.where(tmp_path) is None
