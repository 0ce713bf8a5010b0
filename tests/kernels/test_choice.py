"""The choice of implementation, and its explanation."""
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from moejax.kernels import Routes, Shape, Weights, expert_block, explain, grouped_matmul
from moejax.kernels.choice import MODULES, PREFERRED, choose, implementations
from moejax.kernels.target import target
from tests import checked_shapes

LARGE = Shape(4096, 8, 1024, 4096, jnp.bfloat16)
NARROW = Shape(4096, 8, 20, 48, jnp.bfloat16)
KINDS = {'tpu': 'TPU v5 lite', 'gpu': 'NVIDIA H100 80GB HBM3'}


def on(platform):
  """What is traced inside is for a device that is only described."""
  device = AbstractDevice(device_kind=KINDS[platform], num_cores=1, platform=platform)
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=device))


@pytest.mark.parametrize('name', MODULES)
def test_every_name_has_an_implementation(name):
  assert implementations(name)


def test_here_it_is_the_one_for_cpus():
  assert target().platform == 'cpu' and not target().interpret
  assert choose(None, LARGE) == implementations('xla')[0]


@pytest.mark.parametrize('platform, name', [('tpu', 'pallas_tpu'), ('gpu', 'pallas_gpu')])
def test_kernels_are_chosen_on_their_platform_where_they_fit(platform, name):
  with on(platform):
    assert choose(None, LARGE) in implementations(name)
    assert choose(None, NARROW) == implementations('ragged_dot')[0]


def test_one_implementation_has_to_run_all_shapes():
  with on('tpu'):
    assert choose(None, LARGE, NARROW) == implementations('ragged_dot')[0]


def test_the_explanation_says_what_runs_why_and_what_would_be_faster():
  with on('tpu'):
    text = explain(NARROW)
  lines = {line.split(':')[0].strip(): line for line in text.splitlines()}
  assert 'runs:' in lines['ragged_dot']
  assert 'would be faster, but cannot run:' in lines['pallas_tpu'] and '128' in lines['pallas_tpu']
  assert 'could run:' in lines['xla']


def test_the_explanation_of_a_slower_choice_names_the_faster_one():
  lines = {line.split(':')[0].strip(): line for line in explain(LARGE, implementation='ragged_dot').splitlines()}
  assert 'runs:' in lines['ragged_dot'] and 'is faster:' in lines['xla']


@pytest.mark.parametrize('name, shape, words', [
    ('pallas_tpu', LARGE, ['TPU', 'xla']),
    ('pallas_gpu', LARGE, ['GPU', 'xla']),
])
def test_an_unsupported_platform_raises_naming_an_implementation_that_works(name, shape, words):
  with pytest.raises(ValueError) as error:
    choose(name, shape)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize('platform, name, shape, words', [
    ('tpu', 'pallas_tpu', NARROW, ['20', '128', 'ragged_dot']),
    ('tpu', 'pallas_tpu', LARGE._replace(dtype=jnp.float16), ['float16', 'bfloat16']),
    ('gpu', 'pallas_gpu', NARROW, ['20', 'ragged_dot']),
])
def test_an_unsupported_shape_raises_naming_the_limit_and_an_alternative(platform, name, shape, words):
  with on(platform), pytest.raises(ValueError) as error:
    choose(name, shape)
  for word in words:
    assert word in str(error.value)


M, D, F, E = 30, 4, 6, 5


@pytest.mark.parametrize('change, message', [
    (dict(implementation='dense'), "implementation 'dense'.* Allowed: pallas_gpu, pallas_tpu, ragged_dot"),
    (dict(group_sizes=jnp.zeros(E + 1, jnp.int32)), 'group_sizes'),
    (dict(group_sizes=jnp.zeros(E)), 'integer group_sizes'),
    (dict(x=jnp.zeros((M, D + 1))), r'x \[M,D\]'),
    (dict(x=jnp.zeros((M, D), jnp.bfloat16)), 'the same dtype'),
])
def test_a_grouped_matmul_that_does_not_fit_is_refused(change, message):
  arguments = dict(x=jnp.zeros((M, D)), w=jnp.zeros((E, D, F)), group_sizes=jnp.zeros(E, jnp.int32))
  with checked_shapes.off(), pytest.raises(ValueError, match=message):
    grouped_matmul(**arguments | change)


@pytest.mark.parametrize('change, message', [
    (dict(x=jnp.zeros((7, D + 1))), r'x \[N,4\]'),
    (dict(activation='swiglu'), 'wg if and only if the activation is gated'),
    (dict(weights=Weights(jnp.zeros((E, D, F)), jnp.zeros((E, D, F)))), r'weights.wo \(5, 6, 4\)'),
    (dict(x=jnp.zeros((7, D), jnp.bfloat16)), 'dtype of x, bfloat16'),
    (dict(routes=Routes(jnp.zeros(M, jnp.int32), jnp.zeros(M), jnp.zeros(3, jnp.int32))), r'group_sizes \[5\]'),
    (dict(routes=Routes(jnp.zeros(M, jnp.int32), jnp.zeros(2), jnp.zeros(E, jnp.int32))), r'weight \(30,\)'),
])
def test_an_expert_block_that_does_not_fit_is_refused(change, message):
  arguments = dict(x=jnp.zeros((7, D)), weights=Weights(jnp.zeros((E, D, F)), jnp.zeros((E, F, D))), activation='relu',
                   routes=Routes(jnp.zeros(M, jnp.int32), jnp.zeros(M), jnp.zeros(E, jnp.int32)))
  with checked_shapes.off(), pytest.raises(ValueError, match=message):
    expert_block(**arguments | change)


def test_preferences_name_implementations():
  assert {name for names in PREFERRED.values() for name in names} <= set(MODULES)
