"""A model gives the same results on one device and on eight, for any mesh: loss, gradients, metrics, dropped tokens.

The model is a decoder of two sparse layers: noise in the router, capacity that drops, a shared expert, rematerialised
layers. What differs is the mesh, the rules, the dispatcher, and whether layers are scanned. Processes are in
test_process_agreement.py; dropout, biases and dropless routers in tests/dispatch/test_exchange.py.
"""
import functools

import jax
import numpy as np
import pytest

from moejax import models
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.routing import papers
from moejax.training import objectives

BATCH, LENGTH, VOCABULARY = 8, 6, 11
MESHES = {
    '2x4': dict(data=2, expert=4),
    '4x2': dict(data=4, expert=2),
    '8x1': dict(data=8),
    '1x8': dict(data=1, expert=8),
    '2x4 fsdp': dict(data=1, fsdp=2, expert=4),
    '4x2 fsdp': dict(data=2, fsdp=2, expert=2),
    '8x1 fsdp': dict(data=2, fsdp=4),
    '1x4 model': dict(data=1, expert=4, model=2),
    'all axes': dict(data=1, fsdp=2, expert=2, model=2),
}
DISPATCHERS = {
    'reference': dict(name='reference'),
    'einsum': dict(name='einsum'),
    'gather': dict(name='gather'),
    'grouped': dict(name='grouped'),
    'grouped, ragged': dict(name='grouped', exchange='ragged_all_to_all'),
}
# Every dispatcher on every mesh, scanned or unrolled in turn. In every run each dispatcher on one of the meshes, most of
# which have several axes; the others are slow.
CASES = [(dispatch, mesh, ('scan', 'unrolled')[(i + j) % 2], j == (0, 4, 5, 7, 8)[i])
         for i, dispatch in enumerate(DISPATCHERS) for j, mesh in enumerate(MESHES)]


@functools.cache
def build(dispatch, stacking):
  router = papers.vmoe(k=2) | dict(place=dict(name='capacity', capacity_factor=0.8, priority='position'))
  moe = dict(num_experts=8, experts=dict(name='feed_forward', hidden=8, activation='geglu'), router=router,
             dispatch=DISPATCHERS[dispatch], group='sequence', shared=dict(name='feed_forward', hidden=4))
  return models.build(dict(
      name='decoder', vocab_size=VOCABULARY, dim=8, num_layers=2, attention=dict(heads=2),
      feed_forward=dict(hidden=8), moe=moe, sparse=dict(name='every', n=1), stacking=stacking, remat='full',
      routing_leak='slots'), 'config.model')


def batch():
  tokens = np.random.RandomState(0).randint(1, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)
  return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=np.ones((BATCH, LENGTH), np.float32))


def parameters(stacking):
  model, draw = build('reference', stacking), np.random.RandomState(0)
  return jax.tree.map(lambda leaf: np.float32(draw.normal(0, 0.3, leaf.shape)), model.shapes()[0])


def loss_and_gradients(model):
  objective = objectives.build(dict(name='language_model'), 'config.objective')

  def loss(params, batch):
    output = model.apply(params, {}, batch, key=jax.random.key(3), train=True)
    value, metrics = objective(output, batch)
    return value + objective.router_loss(output), (metrics, {name: r.metrics for name, r in output.routers.items()})
  # Compiling is nearly all the time that this takes.
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def on_one_device(stacking):
  return loss_and_gradients(build('reference', stacking))(parameters(stacking), batch())


def check(dispatch, mesh, stacking, sharding=rules.build()):
  built, model, params = mesh_lib.build(mesh), build(dispatch, stacking), parameters(stacking)
  with rules.use(built, sharding):
    placed = jax.device_put(params, rules.shardings(built, model.axes, params, sharding.parameters))
    found = loss_and_gradients(model)(placed, jax.device_put(batch(), rules.batch_sharding(built)))
  expected = on_one_device(stacking)
  assert max(router['dropped'] for router in expected[0][1][1].values()) > 0.05
  # float32 sums in another order: of terms of order one, through two layers and back.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize('dispatch, mesh, stacking', [
    pytest.param(dispatch, MESHES[mesh], stacking, id=f'{dispatch}, {mesh}, {stacking}',
                 marks=[] if always else [pytest.mark.slow])
    for dispatch, mesh, stacking, always in CASES])
def test_eight_devices_agree_with_one(dispatch, mesh, stacking):
  check(dispatch, mesh, stacking)


@pytest.mark.parametrize('sharding', [
    dict(zero=2, sequence=True), *[pytest.param(sharding, marks=pytest.mark.slow)
                                   for sharding in (dict(zero=0, sequence=True), dict(zero=1))]], ids=str)
def test_rules_change_no_number(sharding):
  check('gather', MESHES['all axes'], 'scan', rules.build(**sharding))
