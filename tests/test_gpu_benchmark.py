"""The benchmark for GPUs, as far as a CPU goes: its processes run, its programs lower for an H100, ratios are right.

Ratios and verdicts are those of times worked out by hand. No time is measured here that anything depends on.
"""
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import runner
from experiments.dispatch_benchmark import gpu, gpu_programs, gpu_timing
from moejax import kernels

TINY = gpu.shape(rows=256, dim=128, hidden=128, experts=2, choices=2)


class Clock:
  """Time passes only while programs run."""

  def __init__(self):
    self.now, self.ran = 0., []

  def __call__(self):
    return self.now

  def program(self, name, seconds):
    def run(calls):
      self.ran.append((name, calls))
      self.now += calls * seconds
    return run


def results(seconds, shape='Mixtral 8x7B', load='multinomial', **facts):
  """The results of the command if the programs took these seconds: {peer: {program: [seconds of each round]}}."""
  return dict(command='the command', device='a GPU', rounds=3, environment=dict(commit='abc', jax='1'),
              shapes=gpu.SHAPES, cases={shape: {peer: dict(loads={load: dict(seconds=programs, errors={}, facts=facts)})
                             for peer, programs in seconds.items()}})


def test_programs_take_turns_and_run_often_enough_to_be_timed():
  clock = Clock()
  measured = gpu_timing.measure({'slow': clock.program('slow', 0.5), 'fast': clock.program('fast', 0.004)}, 3, clock)
  np.testing.assert_allclose(measured['slow'], [0.5] * 3)
  np.testing.assert_allclose(measured['fast'], [0.004] * 3)
  # Twice to warm up, once to see how long it takes; then 20 ms or more in each of three rounds.
  assert clock.ran[:4] == [('slow', 2), ('slow', 1), ('fast', 2), ('fast', 1)]
  assert [sorted(clock.ran[n:n + 2]) for n in (4, 6, 8)] == [[('fast', 5), ('slow', 1)]] * 3


def test_ratios_are_medians_over_rounds_of_the_floor_of_the_same_process():
  read = gpu.Results(results({
      'moejax': {'moejax forward': [2., 4., 4.], 'dense forward': [1., 3., 2.], 'moejax fp8 forward': [1., 1., 1.]},
      'jax': {'ragged_dot_mgpu@a forward': [8., 8., 8.], 'ragged_dot_mgpu@b forward': [4., 4., 4.],
              'dense forward': [1., 1., 1.]}}))
  # 1/2, 3/4 and 2/4: the median is 1/2, and not that of 2 / 4.
  assert read.ours('Mixtral 8x7B', 'forward') == 0.5
  # The better of their tiles, 1/4 of their floor.
  assert read.over('Mixtral 8x7B', 'forward', 'jax', 'ragged_dot_mgpu') == 2.
  assert read.eight_bits('Mixtral 8x7B') == 4.
  assert read.ours('Mixtral 8x7B', 'dX') is None and read.ours('OLMoE', 'forward') is None


def test_bytes_saved_are_compared_with_tokens_and_pre_activations():
  # 8192 tokens of 4096 numbers and 16384 rows of two times 14336, of 2 bytes: 67 MB, which exist anyway, and 940 MB.
  tokens, pre_activations = 8192 * 4096 * 2, 16384 * 14336 * 2 * 2
  assert gpu.Results(results({'moejax': {}}, saved_bytes=pre_activations)).saved('Mixtral 8x7B') == 1.
  doubled = gpu.Results(results({'moejax': {}}, saved_bytes=2 * pre_activations + tokens)).saved('Mixtral 8x7B')
  assert doubled == 2.


def test_growth_is_the_time_with_256_experts_over_that_with_8():
  measured = results({})
  for name, seconds in ('8 experts', 2.), ('256 experts', 3.):
    measured['cases'][name] = results({'moejax': {
        'moejax forward and backward': [seconds], 'dense forward and backward': [1.]}}, name)['cases'][name]
  assert gpu.Results(measured).growth('256 experts') == 1.5


def test_the_table_says_what_was_reached_and_what_was_missed():
  text = gpu.table(results({'moejax': {'moejax forward': [1.] * 3, 'dense forward': [0.8] * 3,
                                       'moejax dX': [2.] * 3, 'dense dX': [1.] * 3}}))
  assert '| forward / dense | 0.75 | 0.80 |' in text and '| dX / dense | 0.72 | 0.50 (missed) |' in text
  assert '| Mixtral 8x7B | multinomial | 0.80 (0.80–0.80) | 0.50 (0.50–0.50) |' in text and 'commit abc' in text


def test_every_shape_has_goals_of_its_own_shape_only():
  assert all(name in gpu.SHAPES for goal in gpu.GOALS for name in goal.shapes)
  assert 'V-MoE-B' not in gpu.COARSE and '8 experts' not in gpu.COARSE and len(gpu.COARSE) == 5


def test_a_process_does_its_job_and_says_what_does_not_run_here():
  command = [sys.executable, '-m', 'experiments.dispatch_benchmark.gpu_programs', 'jax']
  answer = gpu.ask(command, dict(shape=gpu.shape(64, 16, 16, 2, 2), loads=['zipf'], rounds=2))
  measured = answer['loads']['zipf']
  assert answer['versions']['jax'] == jax.__version__
  assert {'dense forward', 'ragged_dot forward', 'ragged_dot forward and backward'} <= set(measured['seconds'])
  assert all(len(times) == 2 and min(times) > 0 for times in measured['seconds'].values())
  assert len(measured['errors']) == len(gpu_programs.MGPU_TILES)  # which need a GPU


def test_a_process_that_fails_is_reported_with_its_last_output():
  assert 'KeyError' in gpu.ask([sys.executable, '-m', 'experiments.dispatch_benchmark.gpu_programs', 'jax'],
                               dict(shape={}, loads=['zipf'], rounds=1))['error']


def test_all_programs_of_moejax_lower_for_an_h100():
  found = gpu_programs.programs('moejax', TINY, 'zipf')
  device = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('device',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = {name: jax.jit(function).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()
               for name, (function, arguments) in found.items()}
  # The layer's forward pass fuses the first matmul with its activation; the backward pass has three transposed products
  # and three gradients of matrices more, and each of the others what its name says.
  kernels_in = {name: text.count('@mosaic_gpu') for name, text in lowered.items() if name.startswith('moejax')}
  assert kernels_in == {
      'moejax forward': 1, 'moejax dX': 1, 'moejax dW': 1, 'moejax fp8 forward': 1,
      'moejax fp8 with quantised rows forward': 1, 'moejax forward and backward': 3,
      'moejax grouped_matmul forward and backward': 3, 'moejax layer forward': 2,
      'moejax layer forward and backward': 8}
  assert not any('mosaic_gpu' in text for name, text in lowered.items() if name.startswith('dense'))


@pytest.mark.parametrize('load, least, most', [('multinomial', 100, 160), ('zipf', 500, 620)])
def test_loads_are_even_or_fall_with_the_rank(load, least, most):
  sizes = gpu_programs.group_sizes(load, 2048, 16)
  # Evenly 128 rows each; the first of 16 by 1/rank has 2048 / 3.38 = 606.
  assert sizes.sum() == 2048 and least <= sizes.max() <= most + 60


def test_a_layer_of_one_expert_is_the_dense_one():
  shape = gpu.shape(rows=8, dim=4, hidden=6, experts=1, choices=1)
  random = lambda n, *size: jax.random.normal(jax.random.key(n), size)
  weights = kernels.Weights(random(1, 1, 4, 6), random(2, 1, 6, 4), random(3, 1, 4, 6))
  x = random(0, 8, 4)
  sparse = gpu_programs.layer(shape, 'zipf')(x, random(4, 4, 1), weights)
  dense = gpu_programs.dense_layer(shape)(x, jax.tree.map(lambda w: w[0], weights))
  np.testing.assert_allclose(sparse, dense, rtol=1e-5, atol=1e-5)


def test_saved_bytes_exclude_arguments():
  @jax.custom_vjp
  def function(x):
    return x
  function.defvjp(lambda x: (x, (x, jnp.zeros(10))), lambda kept, dy: (dy,))
  assert gpu_programs.saved_bytes(function, jnp.ones(3)) == 10 * 4


def test_without_a_hopper_gpu_the_command_says_so_in_a_sentence():
  done = subprocess.run([sys.executable, '-m', 'experiments.dispatch_benchmark.gpu'], capture_output=True, text=True,
                        cwd=runner.ROOT)
  assert done.returncode == 1 and done.stderr.startswith('Nothing is measured. Hopper kernels are for NVIDIA GPUs')
