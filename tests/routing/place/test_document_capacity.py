"""With slots per document, a document is routed as if alone, however it is packed."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ConfigError
from moejax.dispatch import build as build_dispatch
from moejax.routing import router
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import TokenPlan
from moejax.routing.stages import PLACEMENTS

E, K, D = 4, 2, 5


def place(name, **config):
  return PLACEMENTS.build(dict(name=name, capacity_factor=0.75, **config), 'config.place', k=K, num_experts=E)


def plan_of(seed, tokens):
  rng = np.random.RandomState(seed)
  expert = np.stack([rng.permutation(E)[:K] for _ in range(tokens)])[None]
  gates = jnp.asarray(rng.rand(1, tokens, K), jnp.float32)
  return TokenPlan(jnp.asarray(expert), gates, jnp.ones((1, tokens, K), bool), num_experts=E), gates


def joined(parts):
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)


@pytest.mark.parametrize('config', [
    dict(), dict(order='token'), dict(priority='batch'), dict(priority='probability'),
    dict(convention='tutel'), dict(convention='fairseq', eval_capacity_factor=0.3)], ids=str)
@pytest.mark.parametrize('train', [True, False])
def test_documents_keep_what_they_keep_alone(config, train):
  lengths, padding = (6, 3, 1, 6, 3), 2
  parts = [plan_of(number, length) for number, length in enumerate(lengths)]
  alone = []
  for (plan, gates), length in zip(parts, lengths):
    try:
      alone.append(np.asarray(place('capacity', **config)(plan, gates, key=None, train=train).kept))
    except ConfigError:  # a formula without slots for so few tokens
      alone.append(np.zeros((1, length, K), bool))
  empty, zeros = plan_of(99, padding)
  plan, gates = joined([*parts, (dataclasses.replace(empty, kept=jnp.zeros_like(empty.kept)), zeros)])
  documents = jnp.asarray(np.repeat([7, 0, 3, 8, 2, 1], [*lengths, padding]))[None]
  packed = place('document_capacity', **config)(plan, gates, key=None, train=train, documents=documents)
  assert packed.capacity is None and packed.slot is None
  assert 0 < packed.kept.sum() < plan.kept.sum()
  np.testing.assert_array_equal(packed.kept[:, :sum(lengths)], np.concatenate(alone, axis=1))
  assert not packed.kept[:, sum(lengths):].any()


def test_a_router_gives_slots_by_document_and_needs_to_know_them():
  config = dict(score=dict(name='linear', init_std=1.), select=dict(name='top_k', k=K),
                place=dict(name='document_capacity', capacity_factor=0.5))
  module = router.build(config, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, 12, D))
  documents = jnp.broadcast_to(jnp.arange(12) // 4, (2, 12))
  plan = module(x, RouterInputs(documents=documents)).plan
  crowded = module(x.at[:, :4].set(x[:, :1]), RouterInputs(documents=documents)).plan
  np.testing.assert_array_equal(plan.kept[:, 4:], crowded.kept[:, 4:])  # whatever the first document wants
  assert 0 < plan.kept.sum() < plan.kept.size
  assert module.leak(train=True) == 'slots'
  with pytest.raises(ConfigError, match='needs documents, but the model does not supply them'):
    module(x, RouterInputs())
  with pytest.raises(ConfigError, match="cannot run a TokenPlan without a capacity; 'grouped' and 'reference' can"):
    build_dispatch(dict(name='gather'), 'config.dispatch').check(plan)
