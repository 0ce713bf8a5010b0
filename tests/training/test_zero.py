"""ZeRO's stages are tables of rules: the same numbers, and the bytes per device of the paper's formulas.

For P parameters in float32 with Adam (two moments), and N devices that share what is sharded, a device holds 4P of
parameters, 4P of gradients and 8P of optimizer state, each divided by N from the stage on that shards it (arXiv:1910.02054,
section 5, with 4 + 4 + 8 in place of mixed precision's 2 + 2 + 12). Experts are divided by the devices of the axis `expert`
before that, and N of theirs is the axis `fsdp` alone.
"""
import math
import types

import jax
import numpy as np
import pytest
from flax import nnx

from moejax import functional, models
from moejax.functional import flatten
from moejax.models.output import ModelOutput
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.planning.collectives import collectives, count
from moejax.routing import papers
from moejax.training import optimizer, step
from training_fakes import CLASSES, FEATURES, make_setup

ADAM = dict(name='adamw', schedule=dict(name='constant', peak=1e-3))


def decoder():
  moe = dict(num_experts=8, experts=dict(name='feed_forward', hidden=32), router=papers.top_k_dropless(k=2),
             dispatch=dict(name='grouped'))
  return models.build(dict(name='decoder', vocab_size=64, dim=32, num_layers=2, attention=dict(heads=4),
                           feed_forward=dict(hidden=64), moe=moe, sparse=dict(name='every', n=2)), 'config.model')


def bytes_a_device(tree, shardings):
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings))
  return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


@pytest.mark.parametrize('zero', [0, 1, 2, 3])
@pytest.mark.parametrize('mesh', [dict(data=1, fsdp=8), dict(data=1, fsdp=2, expert=4), dict(data=4, fsdp=2)], ids=str)
def test_memory_follows_the_formulas(mesh, zero):
  model = decoder()
  setup = types.SimpleNamespace(mesh=mesh_lib.build(mesh), rules=rules.build(zero=zero), model=model,
                                optimizer=optimizer.build(ADAM, 'config.optimizer', model=model, steps=10),
                                training=types.SimpleNamespace(average=None))
  params, _ = model.shapes()
  placed = step.state_shardings(setup)
  gradients = rules.shardings(setup.mesh, model.axes, params, setup.rules.gradients)
  moments = jax.eval_shape(setup.optimizer.transform.init, params)
  found = (bytes_a_device(params, placed.params) + bytes_a_device(params, gradients) +
           bytes_a_device(moments, placed.opt_state))

  sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(params).items()}
  experts = sum(size for path, size in sizes.items() if '/experts/' in path)
  share, ways = mesh['fsdp'], mesh.get('expert', 1)
  def held(count, n):
    return sum(bytes * count / (n if zero >= stage else 1) for stage, bytes in ((3, 4), (2, 4), (1, 8)))
  expected = held(sum(sizes.values()) - experts, share * ways) + held(experts / ways, share)
  np.testing.assert_allclose(found, expected, rtol=0.05)


class Mlp(nnx.Module):
  """Two layers, of a width that 8 devices share."""

  def __init__(self, rngs):
    normal = nnx.initializers.normal(0.5)
    self.up = functional.parameter(rngs, normal, (FEATURES, 16), (None, 'embed'))
    self.down = functional.parameter(rngs, normal, (16, CLASSES), ('embed', None))

  def __call__(self, batch, *, key=None, train=False):
    features = batch['image'].reshape(len(batch['image']), -1) @ self.up[...]
    return ModelOutput(jax.nn.relu(features) @ self.down[...], features, {}, {})


def test_stages_differ_in_communication_and_in_no_number():
  """Gradients are all-reduced unless sharded; updated parameters are gathered if they or the moments are sharded."""
  losses, travels = {}, {}
  for zero in range(4):
    setup = make_setup(8, model=functional.functionalize(Mlp), mesh=dict(data=1, fsdp=8), sharding=dict(zero=zero))
    state, batches = step.init_state(setup), iter(setup.pipeline.train(0))
    train_step = step.make_train_step(setup)
    travels[zero] = count(collectives(train_step.lower(state, setup.place(next(batches))).compile().as_text()))
    losses[zero] = []
    for _ in range(3):
      state, metrics = train_step(state, setup.place(next(batches)))
      losses[zero].append(float(metrics['train/loss']))
  for zero in (1, 2, 3):
    np.testing.assert_allclose(losses[zero], losses[0], rtol=1e-6)  # float32 sums in another order
  assert 'all-gather' not in travels[0]
  assert all('all-gather' in travels[zero] for zero in (1, 2, 3))
