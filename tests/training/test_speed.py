"""Times, utilization and memory of a run. Oracles: a clock that is set by hand, FLOPs by hand, and the kernel's count."""
import dataclasses
import types

import digits_config
import jax
import numpy as np
import pytest

from moejax.parallel import chips
from moejax.training import methods, progress, setup, speed


@pytest.fixture
def at(monkeypatch):
  """Function (seconds): sets the time of day."""
  now = [1000.]
  monkeypatch.setattr(speed.time, 'perf_counter', lambda: now[0])
  return lambda seconds: now.__setitem__(0, 1000. + seconds)


# ---- step times -----------------------------------------------------------------------------------------------------


def test_a_step_lasts_from_the_end_of_the_one_before_to_its_own(at):
  clock = speed.Clock(1)
  for seconds, step in ((5, 1), (6, 2), (6.5, 3), (8.5, 4)):
    at(seconds)
    clock.completed(step)
  assert clock.take() == [1, 0.5, 2]  # of steps 2, 3 and 4: step 1 was compiled in
  assert clock.take() == []


def test_a_run_that_resumes_compiles_in_its_first_step(at):
  clock = speed.Clock(8)
  for seconds, step in ((1, 7), (50, 8), (51, 9)):
    at(seconds)
    clock.completed(step)
  assert clock.take() == [1]


def test_a_step_reported_twice_counts_once_and_steps_reported_together_share_the_time(at):
  clock = speed.Clock(1)
  for seconds, step in ((1, 1), (2, 2), (3, 2), (3, 1), (6, 4)):
    at(seconds)
    clock.completed(step)
  assert clock.take() == [1, 2, 2]


def test_a_pause_belongs_to_no_step(at):
  clock = speed.Clock(1)
  with clock.paused():  # before the clock has started
    at(1)
  at(2)
  clock.completed(1)
  at(2.25)
  with clock.paused():
    at(12.25)
  at(13)
  clock.completed(2)
  assert clock.take() == [1]


# ---- utilization ----------------------------------------------------------------------------------------------------

# One sparse layer of width 8 on 16 images of 4 patches, and one of 4 experts of 8 hidden units for each patch.
TOKEN = 2 * 16 * 8 + 4 * 2 * 8 * 8 + 2 * 2 * 4 * 8 + 2 * 8 * 4 + 2 * 2 * 8 * 8  # patch, attention, its keys, router, expert
FORWARD = 16 * (4 * TOKEN + 2 * 8 * 10)


@pytest.fixture(scope='module')
def digits():
  return setup.prepare(digits_config.get_config())


def test_a_step_takes_three_times_the_flops_of_its_forward_passes(digits):
  assert speed.model_flops(digits) == 3 * FORWARD
  twice = dataclasses.replace(digits, method=methods.METHODS.build(dict(name='consistency'), 'config.method'))
  assert speed.model_flops(twice) == 2 * 3 * FORWARD


def test_utilization_is_model_flops_over_the_peak_of_all_devices_in_the_mean_time(digits, monkeypatch):
  monkeypatch.setattr(chips, 'of_kind', lambda kind: dataclasses.replace(chips.CHIPS['h100'], peak=1e6))
  found = speed.Speed(digits)([0.5, 1.5])
  assert found == {
      'time/examples_per_second': 16., 'time/examples_per_second_per_device': 2., 'time/step_seconds': 1.,
      'time/slowest_step_seconds': 1.5, 'time/mfu': pytest.approx(3 * FORWARD / 8e6)}


def test_a_device_with_unknown_peak_has_no_utilization(digits):
  assert chips.of_kind(jax.devices()[0].device_kind) is None
  assert set(speed.Speed(digits)([1.])) == {
      'time/examples_per_second', 'time/examples_per_second_per_device', 'time/step_seconds',
      'time/slowest_step_seconds'}
  assert chips.of_kind('NVIDIA H100 80GB HBM3') is chips.CHIPS['h100']


def test_before_a_step_is_timed_there_are_no_times(digits):
  assert speed.Speed(digits)([]) == {}


def test_text_is_counted_in_tokens_and_images_in_examples():
  shape = lambda *sizes: types.SimpleNamespace(shape=sizes, size=int(np.prod(sizes)))
  assert speed.work({'tokens': shape(4, 32), 'loss_mask': shape(4, 32)}) == ('tokens', 128)
  assert speed.work({'image': shape(4, 8, 8, 1), 'label': shape(4)}) == ('examples', 4)


# ---- memory ---------------------------------------------------------------------------------------------------------


def device(**stats):
  return types.SimpleNamespace(memory_stats=lambda: stats or None)


def test_memory_is_the_peak_of_the_fullest_device():
  assert speed.memory([device(peak_bytes_in_use=7), device(peak_bytes_in_use=9), device()]) == {
      'memory/device_peak_bytes': 9}


def test_devices_that_report_no_memory_give_the_peak_of_the_process():
  (name, peak), = speed.memory([device(), device(bytes_limit=5)]).items()
  kernel, = [int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')]
  assert name == 'memory/process_peak_bytes' and peak == pytest.approx(kernel, rel=0.02)


# ---- the line -------------------------------------------------------------------------------------------------------

ROW = {'train/loss': 2.0, 'time/tokens_per_second': 12345., 'time/tokens_per_second_per_device': 1543.,
       'time/step_seconds': 0.5, 'time/slowest_step_seconds': 0.75, 'time/mfu': 0.4321,
       'memory/device_peak_bytes': 3 * 2**29, 'router/block_01/load': [0.25, 0.25, 0.375, 0.125],
       'router/block_01/dropped': 0.03, 'router/block_03/load': [0.5, 0.5], 'router/block_03/dropped': 0.02}


def line(row, made):
  said = []
  with progress.Progress(made, 0, said.append) as shown:
    shown._speed.unit = 'tokens'
    shown.show(100, row)
  return said[0]


def test_a_line_says_loss_pace_memory_balance_and_time_left(digits):
  made = dataclasses.replace(digits, training=dataclasses.replace(digits.training, steps=400))
  assert line(ROW, made) == (
      'step 100/400  loss 2.0000  12.3k tokens/s  500.00 ms a step (slowest 750.00 ms)  MFU 43.2%  1.50 GiB  '
      'busiest expert 1.50x  3.0% dropped  2m30s left')


def test_a_line_leaves_out_unknown_values(digits):
  row = {'train/loss': 2.0, 'memory/process_peak_bytes': 2**20, 'router/block_01/load': [float('nan')] * 4,
         'router/block_01/dropped': 0.}
  assert line(row, digits) == 'step 100/20  loss 2.0000  1.00 MiB'


def test_the_balance_of_a_run_is_that_of_its_worst_layer():
  assert progress.balance({'router/a/load': [0.5, 0.5], 'router/b/load': [0.5, 0.25, 0.25]}) == ['busiest expert 1.50x']
  assert progress.balance({'eval/test/router/a/dropped': 0.5, 'train/loss': 1.}) == []
