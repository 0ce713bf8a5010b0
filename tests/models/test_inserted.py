"""Mixtures inserted after a block: the dense model around them is untouched, and they see the residual stream."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from moejax import models
from moejax.functional import flatten, unflatten
from moejax.layers.stack import Stack

TOKENS = jnp.asarray([[1, 5, 2, 9, 4, 7], [3, 3, 8, 1, 12, 6]])
STACK = dict(name='residual_stack', hidden=8, sublayers=2)
INSERTED = tiny.body(tiny.SWITCH, num_layers=4, sparse_form='insert') | dict(moe=tiny.moe(tiny.SWITCH, experts=STACK))


def test_a_mixture_of_experts_that_add_nothing_leaves_the_dense_model():
  model, params, state, apply = tiny.initialised(tiny.decoder() | INSERTED)
  batch = dict(tokens=TOKENS)
  flat = flatten(params)
  dense, _, _, apply_dense = tiny.initialised(tiny.decoder(num_layers=4))
  own = {path: leaf for path, leaf in flat.items() if '/moe/' not in path}
  assert set(own) == set(flatten(dense.shapes()[0]))  # nothing but the mixture is new: no norm before it either
  idle = {path: jnp.zeros_like(leaf) if path.rsplit('/', 1)[-1] in ('wo', 'bo') and '/moe/' in path else leaf
          for path, leaf in flat.items()}

  expected = apply_dense(unflatten(own), {}, batch).logits
  np.testing.assert_array_equal(apply(unflatten(idle), state, batch).logits, expected)
  assert not np.allclose(apply(params, state, batch).logits, expected, atol=0.1)


@pytest.mark.parametrize('kind', ['decoder', 'vision'])
def test_scanned_and_unrolled_are_the_same(kind):
  config = getattr(tiny, kind)() | INSERTED
  batch = dict(tokens=TOKENS) if kind == 'decoder' else dict(
      image=jax.random.normal(jax.random.key(0), (2, 8, 8, 1)))
  _, params, state, apply = tiny.initialised(config)
  scanned = Stack(('dense', 'sparse') * 2).scanned(params['blocks'])
  model = models.build(config | dict(stacking='scan'))
  found = jax.jit(model.apply)(params | dict(blocks=scanned), state, batch)
  np.testing.assert_allclose(found.logits, apply(params, state, batch).logits, rtol=0, atol=1e-4)  # fused differently
