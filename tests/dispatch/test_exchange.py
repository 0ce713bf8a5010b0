"""Expert parallelism changes nothing: each exchange on each mesh gives what `reference` gives on one device.

`reference` is a dense loop without any exchange: every token times every expert, weighted. Compared are the output and all
gradients; random experts and tokens, so that any misrouted row is detected.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moejax import functional
from moejax.config import ConfigError, call
from moejax.dispatch import ragged
from moejax.layers.feed_forwards.moe import MoE
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.routing import papers

B, S, D, F, E = 8, 4, 8, 8, 8

MESHES = {
    'expert 8': dict(data=1, expert=8),
    'expert 4': dict(data=2, expert=4),
    'expert 2': dict(data=4, expert=2),
    'data 8': dict(data=8),
    'fsdp 2 expert 4': dict(data=1, fsdp=2, expert=4),
    'expert 2 model 2': dict(data=2, expert=2, model=2),
    'one of each': dict(data=1, fsdp=2, expert=2, model=2),
}
DROPLESS = papers.top_k_dropless(k=2)
CAPACITY = papers.vmoe(k=2) | dict(place=dict(name='capacity', capacity_factor=0.75))
CHOICE = papers.expert_choice()
GATHER = dict(name='gather')
ALL_GATHER = dict(name='grouped', exchange='all_gather')
RAGGED = dict(name='grouped', exchange='ragged_all_to_all')


def build(dispatch, router, **config):
  config = dict(num_experts=E, experts=dict(name='feed_forward', hidden=F), dispatch=dispatch, router=router,
                group='sequence') | config
  return functional.functionalize(
      lambda rngs: call(MoE, config, 'config.moe', dim=D, dtype=jnp.float32, rngs=rngs), MoE.mix)


def loss_and_gradients(layer, train):
  def loss(params, x):
    y, output = layer.apply(params, {}, x, key=jax.random.key(7) if train else None, train=train)
    return jnp.mean(y**2) + sum(output.losses.values()), (y, output.metrics)
  # Compiling is nearly all the time that this takes.
  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def arguments(layer):
  rng = np.random.RandomState(0)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), layer.shapes()[0])
  return params, rng.normal(0, 1, (B, S, D)).astype(np.float32)


def check(dispatch, mesh, router=DROPLESS, train=False, **config):
  built = mesh_lib.build(mesh)
  layer = build(dispatch, router, **config)
  params, x = arguments(layer)
  expected = _reference(repr((router, train, sorted(config.items()))), router, train, config)
  with rules.use(built):
    placed = jax.device_put(params, rules.shardings(built, layer.axes, params))
    found = loss_and_gradients(layer, train)(placed, jax.device_put(x, rules.batch_sharding(built)))
  # The same sums in another order, of terms of order one; gradients are of a mean.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
  return expected


_KNOWN = {}


def _reference(name, router, train, config):
  if name not in _KNOWN:
    layer = build(dict(name='reference'), router, **config)
    _KNOWN[name] = loss_and_gradients(layer, train)(*arguments(layer))
  return _KNOWN[name]


ALIKE = 'expert 2', 'data 8', 'expert 2 model 2'


@pytest.mark.parametrize('mesh', [pytest.param(mesh, id=name, marks=[pytest.mark.slow] if name in ALIKE else [])
                                  for name, mesh in MESHES.items()])
@pytest.mark.parametrize('dispatch, router', [(GATHER, CAPACITY), (ALL_GATHER, DROPLESS), (RAGGED, DROPLESS)],
                         ids=['all_to_all', 'all_gather', 'ragged_all_to_all'])
def test_every_exchange_on_every_mesh_gives_what_one_device_gives(dispatch, router, mesh):
  (_, (_, metrics)), _ = check(dispatch, mesh, router)
  assert (metrics['dropped'] > 0.05) == (router is CAPACITY)


# What else travels, or is computed, on the way.

GATED = dict(name='feed_forward', hidden=F, activation='swiglu', use_bias=True)
DROPOUT = dict(name='feed_forward', hidden=F, use_bias=True, dropout=0.3)


@pytest.mark.parametrize('dispatch, router', [(GATHER, CAPACITY), (ALL_GATHER, DROPLESS), (RAGGED, DROPLESS)],
                         ids=['all_to_all', 'all_gather', 'ragged_all_to_all'])
@pytest.mark.parametrize('experts, train', [(GATED, False), (DROPOUT, True)], ids=['gated, biases', 'dropout, biases'])
def test_biases_are_added_once_and_a_token_and_expert_drop_the_same_units_on_every_mesh(dispatch, router, experts, train):
  check(dispatch, MESHES['one of each'], router, train, experts=experts)


@pytest.mark.parametrize('dispatch, router', [(GATHER, CAPACITY), (ALL_GATHER, DROPLESS)], ids=['gather', 'grouped'])
@pytest.mark.parametrize('mesh', [dict(data=1, expert=8), dict(data=1, expert=4, model=2)], ids=['expert 8', 'expert 4'])
def test_experts_fewer_than_the_devices_are_sharded_inside(dispatch, router, mesh):
  check(dispatch, mesh, router, num_experts=2, experts=GATED)


STACK = dict(name='residual_stack', hidden=F, sublayers=2)


@pytest.mark.parametrize('dispatch, router, mesh', [
    (GATHER, CAPACITY, MESHES['one of each']), (ALL_GATHER, DROPLESS, dict(data=1, expert=4, model=2))],
    ids=['all_to_all', 'inside'])
def test_a_residual_stack_sums_the_shards_of_its_hidden_units_between_sublayers(dispatch, router, mesh):
  check(dispatch, mesh, router, num_experts=E if router is CAPACITY else 2, experts=STACK)


@pytest.mark.parametrize('dispatch', [GATHER, ALL_GATHER, RAGGED], ids=['gather', 'all_gather', 'ragged_all_to_all'])
def test_slot_plans_travel_too(dispatch):
  check(dispatch, MESHES['expert 4'], CHOICE)


@pytest.mark.parametrize('dispatch, router', [(GATHER, CAPACITY), (ALL_GATHER, DROPLESS), (RAGGED, DROPLESS)],
                         ids=['all_to_all', 'all_gather', 'ragged_all_to_all'])
def test_what_travels_in_chunks_arrives_the_same(dispatch, router):
  router = router | dict(place=dict(name='capacity', capacity_factor=1.5)) if router is CAPACITY else router  # 2 slots
  check(dispatch | dict(chunks=2), MESHES['expert 4'], router, train=True, experts=DROPOUT)


def test_a_group_may_span_devices():
  check(GATHER, MESHES['expert 4'], CAPACITY, group='batch')
  check(ALL_GATHER, MESHES['expert 4'], CAPACITY, group='batch')


@pytest.mark.parametrize('config, message', [
    (dict(num_experts=6), r'config.moe.num_experts = 6 .* `expert`: make it a multiple of 4, or '
                          r'set config.mesh.expert = 2'),
    (dict(num_experts=2, experts=dict(name='feed_forward', hidden=6)),
     r'with 2 experts on the 4 devices of the mesh axis `expert`.*hidden a multiple of 4, or config.mesh.expert a '
     r'divisor of 2'),
    (dict(dispatch=ALL_GATHER | dict(chunks=3)), r'config.moe.dispatch.chunks = 3 does not divide the 4 tokens'),
    (dict(dispatch=GATHER | dict(chunks=5), router=CAPACITY),
     r'config.moe.dispatch.chunks = 5 does not divide the \d+ slots'),
])
def test_what_does_not_divide_is_named(config, message):
  with rules.use(mesh_lib.build(MESHES['expert 4'])), pytest.raises(ConfigError, match=message):
    layer = build(**(dict(dispatch=ALL_GATHER, router=DROPLESS) | config))
    jax.eval_shape(lambda params, x: layer.apply(params, {}, x), *arguments(layer))


# The journey of rows, against a loop over devices, experts and rows.

DEVICES, LOCAL = 4, 2
ROWS = 6


@functools.cache
def journey(mesh):
  def local(rows, sizes):
    trip = ragged.RaggedExchange.of(sizes[0])
    arrived = trip.there(rows[0], capacity=DEVICES * ROWS)
    sizes, source, place = trip.sorted_by_expert(len(arrived))
    return jax.tree.map(lambda a: a[None], (arrived, sizes, arrived[source], arrived[source][place],
                                            trip.back(arrived, ROWS)))
  spec = jax.sharding.PartitionSpec('expert')
  return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, DEVICES * LOCAL - 1), max_size=ROWS), min_size=DEVICES, max_size=DEVICES))
def test_rows_arrive_in_order_of_source_and_expert_and_return_to_their_places(experts):
  """experts[d]: the expert of each row of device d, which are sorted by it; devices may have fewer than `ROWS`."""
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:DEVICES]), ('expert',))
  rows, sizes = np.zeros((DEVICES, ROWS, 1), np.float32), np.zeros((DEVICES, DEVICES * LOCAL), np.int32)
  expected, number = [[] for _ in range(DEVICES)], 0
  for device, chosen in enumerate(experts):
    for place, expert in enumerate(sorted(chosen)):
      number += 1
      rows[device, place] = number
      sizes[device, expert] += 1
      expected[expert // LOCAL].append((expert, number))
  arrived, counts, by_expert, again, returned = journey(mesh)(rows, sizes)
  for device, arrivals in enumerate(expected):
    numbers = [number for _, number in arrivals]
    padding = [0] * (DEVICES * ROWS - len(numbers))
    assert arrived[device, :, 0].tolist() == numbers + padding
    assert again[device, :, 0].tolist() == numbers + padding
    assert by_expert[device, :, 0].tolist() == [number for _, number in sorted(arrivals)] + padding
    assert counts[device].tolist() == [sum(e == device * LOCAL + i for e, _ in arrivals) for i in range(LOCAL)]
  np.testing.assert_array_equal(returned, np.where(np.arange(ROWS)[:, None] < sizes.sum(1)[:, None, None], rows, 0))
