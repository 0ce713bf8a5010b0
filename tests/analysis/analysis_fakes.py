"""A model with given routers, and the other inputs of a report."""
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moejax.evaluation import passes
from moejax.functional import Functional
from moejax.parallel import mesh as mesh_lib
from moejax.routing.plans import DensePlan, SoftPlan, TokenPlan
from moejax.routing.router import RouterOutput

MESH = mesh_lib.build(dict(data=1), devices=jax.devices()[:1])
CLASSES, SIDE = 4, 3  # classes; patches along each side of an image


class Images:
  """Ten constant images and their classes, in batches of four: the last one is half padding."""
  splits = ('train', 'test')

  def batch_spec(self, batch_size=None):
    return dict(image=jax.ShapeDtypeStruct((4, 6, 6, 1), np.float32), label=jax.ShapeDtypeStruct((4,), np.int32),
                valid=jax.ShapeDtypeStruct((4,), bool))

  def evaluate(self, split, batch_size=None, rows=None):
    label = np.arange(12).astype(np.int32) % CLASSES
    valid = np.arange(12) < 10
    image = np.broadcast_to(label[:, None, None, None], (12, 6, 6, 1)).astype(np.float32)
    for start in range(0, 12, 4):
      rows = slice(start, start + 4)
      yield dict(image=image[rows], label=np.where(valid, label, 0)[rows].astype(np.int32), valid=valid[rows])


def output(plan, load):
  """The output of a router with these values."""
  metrics = dict(load=load, dropped=jnp.float32(0.25), confidence=jnp.float32(0.6), entropy=jnp.float32(0.9),
                 importance_loss=jnp.float32(0.1))
  return RouterOutput(plan, {}, metrics, {})


def by_class(experts):
  """A router that sends every patch of an image to the expert of its class; the first patch is dropped."""
  def route(batch):
    tokens = SIDE * SIDE
    expert = jnp.broadcast_to((batch['label'] % experts)[:, None], (4, tokens)).reshape(2, 2 * tokens, 1)
    kept = jnp.broadcast_to(jnp.arange(tokens) > 0, (4, tokens)).reshape(2, 2 * tokens, 1)
    plan = TokenPlan(expert.astype(jnp.int32), jnp.full(expert.shape, 0.5), kept, num_experts=experts)
    return output(plan, jnp.full(experts, 1 / experts))
  return route


def soft(experts, slots=2):
  """A router in which each slot is the mean of all tokens, and each token the mean of all slots."""
  def route(batch):
    shape = (4, SIDE * SIDE, experts, slots)
    return output(SoftPlan(jnp.full(shape, 1 / (SIDE * SIDE)), jnp.full(shape, 1 / (experts * slots))),
                  jnp.full(experts, 1 / experts))
  return route


def dense(experts):
  """A router that weights all experts equally."""
  return lambda batch: output(DensePlan(jnp.full((4, SIDE * SIDE, experts), 1 / experts)),
                              jnp.full(experts, 1 / experts))


def model(**routers):
  """A model with these routers by layer, and parameters at the usual paths."""
  shapes = {'blocks': {'0': {'mlp': {'wi': jax.ShapeDtypeStruct((8, 16), np.float32)}}}}
  axes = {'blocks': {'0': {'mlp': {'wi': ('embed', 'mlp')}}}}
  if routers:
    experts = jax.eval_shape(next(iter(routers.values())), Images().batch_spec()).plan.num_experts
    shapes['blocks']['1'] = {'moe': {'experts': {'wi': jax.ShapeDtypeStruct((experts, 8, 16), np.float32)},
                                     'router': {'kernel': jax.ShapeDtypeStruct((8, experts), np.float32)}}}
    axes['blocks']['1'] = {'moe': {'experts': {'wi': ('expert', 'embed', 'mlp')},
                                   'router': {'kernel': ('embed', None)}}}

  def apply(params, state, batch, **_):
    return types.SimpleNamespace(routers={name: route(batch) for name, route in routers.items()})

  @dataclasses.dataclass(frozen=True)
  class Given(Functional):
    def shapes(self):
      return shapes, {}

  return Given(init=None, apply=apply, axes=axes, state_axes={})


def split():
  """The test split of `Images`."""
  return passes.Split(Images(), MESH, 'test', None)


def setup(**routers):
  """The part of `training.setup.prepare`'s result that a report needs."""
  config = ConfigDict(dict(model=dict(moe=dict(router=dict(select=dict(name='top_k', k=2)))),
                           evaluation=dict(evaluators=dict(test=dict(name='accuracy', split='test')))))
  return types.SimpleNamespace(config=config, model=model(**routers), pipeline=Images(), mesh=MESH)
