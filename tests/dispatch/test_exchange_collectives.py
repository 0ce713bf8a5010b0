"""The collectives of a sparse layer, counted in compiled programs for CPU, TPU v5e and H100, against sums done by hand.

Sums list every array that the design sends, with its bytes.

    T tokens a device, n devices of the mesh axis `expert`, E experts, C slots for each in each of G groups a device,
    K experts a token, D and F widths; all float32.
"""
import jax
import jax.numpy as jnp
import pytest

from moejax import functional
from moejax.config import call
from moejax.layers.feed_forwards.moe import MoE
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.planning import topologies
from moejax.planning.collectives import collectives, count
from moejax.routing import papers

B, S, D, F, E, K = 8, 64, 128, 256, 8, 2
FLOAT = 4
EXPERT_AND_DATA = dict(data=2, expert=4)
EVERY_AXIS = dict(data=1, fsdp=2, expert=2, model=2)
DISPATCH = {
    'all_to_all': dict(name='gather'),
    'all_gather': dict(name='grouped', exchange='all_gather'),
    'ragged_all_to_all': dict(name='grouped', exchange='ragged_all_to_all'),
}


def summed(arrays):
  """[(kind, bytes)] -> {kind: (arrays, bytes)}."""
  sizes = {kind: [size for other, size in arrays if other == kind] for kind, _ in arrays}
  return {kind: (len(size), sum(size)) for kind, size in sizes.items()}


def exchanged(method, mesh, backward):
  """The collectives of tokens."""
  n = mesh['expert']
  tokens = B * S // (mesh['data'] * mesh.get('fsdp', 1) * n)
  choices = tokens * K
  if method == 'all_to_all':
    slots = E * (tokens // S) * CAPACITY
    return 2 * (1 + backward) * [('all-to-all', slots * D * FLOAT)]
  if method == 'all_gather':
    rows, numbers = ('all-gather', n * tokens * D * FLOAT), ('all-gather', n * choices * FLOAT)
    sums, weights = ('reduce-scatter', n * tokens * D * FLOAT), ('reduce-scatter', n * choices * FLOAT)
    return [rows, numbers, numbers, sums] + backward * [rows, sums, weights]
  # All devices together send their choices; a device could receive n times its own, but not send more than these.
  rows = ('ragged-all-to-all', choices * D * FLOAT)
  return [('all-gather', n * E * FLOAT)] + 2 * (1 + backward) * [rows]


def reduced(backward):
  """The collectives of weights with data=2, expert=4: gradients of E/4 experts over `data`, of the router over all."""
  return backward * [('all-reduce', 2 * E // 4 * D * F * FLOAT), ('all-reduce', D * E * FLOAT)]


CAPACITY = 12  # 0.75 * S * K / E


def program(method, mesh, backward, devices, zero):
  built, sharding = mesh_lib.build(mesh, devices=devices), rules.build(zero=zero)
  router = papers.top_k_dropless(k=K)
  if method == 'all_to_all':
    router = papers.vmoe(k=K) | dict(place=dict(name='capacity', capacity_factor=0.75))
  config = dict(num_experts=E, experts=dict(name='feed_forward', hidden=F), dispatch=DISPATCH[method], router=router,
                group='sequence')
  layer = functional.functionalize(
      lambda rngs: call(MoE, config, 'config.moe', dim=D, dtype=jnp.float32, rngs=rngs), MoE.mix)
  params, _ = layer.shapes()
  placed = rules.shardings(built, layer.axes, params, sharding.parameters)
  params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, placed)
  x = jax.ShapeDtypeStruct((B, S, D), jnp.float32, sharding=rules.batch_sharding(built))
  forward = lambda params, x: layer.apply(params, {}, x)[0]
  gradient = jax.grad(lambda params, x: jnp.mean(forward(params, x)**2), (0, 1))
  # In full precision, or TPUs send in bfloat16 what they multiply in bfloat16.
  with (rules.use(built, sharding), jax.sharding.use_abstract_mesh(built.abstract_mesh),
        jax.default_matmul_precision('highest')):
    if backward:
      return jax.jit(gradient, out_shardings=(placed, x.sharding)).lower(params, x).compile().as_text()
    return jax.jit(forward, out_shardings=x.sharding).lower(params, x).compile().as_text()


@pytest.mark.parametrize('backward', [0, 1], ids=['forward', 'and backward'])
@pytest.mark.parametrize('method', ['all_to_all', 'all_gather'])
def test_tokens_travel_as_designed_and_nothing_else_does(method, backward):
  found = count(collectives(program(method, EXPERT_AND_DATA, backward, jax.devices(), zero=0)))
  assert found == summed(exchanged(method, EXPERT_AND_DATA, backward) + reduced(backward))


@pytest.mark.parametrize('backward', [0, 1], ids=['forward', 'and backward'])
@pytest.mark.parametrize('method', ['all_to_all', 'all_gather'])
def test_with_every_axis_weights_are_gathered_and_partial_sums_added(method, backward):
  """fsdp=2, expert=2, model=2: each matrix of E/2 experts and F/2 units, and the router's, are gathered for the forward
  pass, and their gradients scattered; outputs, and in the backward pass inputs and combine weights, are summed over
  `model`; the router's gradient is summed over where tokens are, and each device keeps its share."""
  tokens = B * S // 4
  matrix, router = E // 2 * D * F // 2 * FLOAT, D * E * FLOAT
  weights = [('all-gather', matrix), ('all-gather', matrix), ('all-gather', router)]
  weights += backward * [('reduce-scatter', matrix), ('reduce-scatter', matrix)]
  sums = [('all-reduce', tokens * D * FLOAT)]
  sums += backward * [('all-reduce', tokens * (D + K) * FLOAT), ('all-reduce', router)]
  found = count(collectives(program(method, EVERY_AXIS, backward, jax.devices(), zero=3)))
  assert found == summed(exchanged(method, EVERY_AXIS, backward) + weights + sums)


@pytest.mark.parametrize('method', DISPATCH)
@pytest.mark.parametrize('topology', ['v5e:2x4', 'h100:1x8'])
def test_tokens_travel_as_designed_in_a_compile_for(topology, method):
  if lack := topologies.missing(topology):
    pytest.skip(f'needs {lack}')
  devices = topologies.load(topology).devices
  for backward in (0, 1):
    arrays = exchanged(method, EXPERT_AND_DATA, backward) + reduced(backward)
    if topology.startswith('v5e'):
      # Sums of a few KiB go to all devices, who keep their part: it takes a TPU less time.
      arrays = [('all-reduce' if kind == 'reduce-scatter' and size < 4096 else kind, size) for kind, size in arrays]
    expected = summed(arrays)
    if topology.startswith('h100') and method == 'all_gather':
      # What leaves at the same time leaves together: rows with numbers forward, gradients of rows with those of weights.
      expected |= {kind: (1 + backward, expected[kind][1]) for kind in ('all-gather', 'reduce-scatter')}
    found = count(collectives(program(method, EXPERT_AND_DATA, backward, devices, zero=0)))
    assert found == expected
