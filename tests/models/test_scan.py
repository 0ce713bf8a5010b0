"""Whole models, scanned and unrolled: the same loss, gradients, router losses and state, from the same key."""
import jax
import jax.numpy as jnp
import numpy as np

import tiny
from moejax import functional, models
from moejax.layers.stack import Stack
from moejax.routing import papers

TOKENS = jnp.asarray([[1, 5, 2, 9, 4, 7], [3, 3, 8, 1, 12, 6]])


def train(model, params, state, batch):
  @jax.jit
  def run(params):
    def loss(params):
      output = model.apply(params, state, batch, key=jax.random.key(1), train=True)
      router = sum(sum(router.losses.values()) for router in output.routers.values())
      return jnp.square(output.logits).mean() + router, (router, output.updates)
    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, (router, updates)), grads = run(params)
  return loss, router, grads, functional.merge_updates(state, updates)


def test_a_sparse_decoder_with_router_state_and_randomness():
  # Loss-free balancing has state, jitter and stochastic depth draw random numbers.
  router = papers.loss_free(k=2)
  router = router | dict(balance=router['balance'] | dict(z=0.1), score=router['score'] | dict(jitter=0.01))
  config = tiny.decoder(router, num_layers=4, stochastic_depth=0.2)
  stack = Stack(('dense', 'sparse') * 2)
  model, params, state, _ = tiny.initialised(config)
  loss, router_loss, grads, new_state = train(model, params, state, dict(tokens=TOKENS))

  def each(convert, tree):
    return tree | dict(blocks=convert(tree['blocks']))

  model = models.build(config | dict(stacking='scan', remat='full'))
  scanned = train(model, each(stack.scanned, params), each(stack.scanned, state), dict(tokens=TOKENS))

  assert router_loss > 0
  # The same float32 operations, fused differently.
  np.testing.assert_allclose(scanned[0], loss, rtol=1e-5)
  np.testing.assert_allclose(scanned[1], router_loss, rtol=1e-5)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, each(stack.unrolled, scanned[2]), grads)
  jax.tree.map(close, each(stack.unrolled, scanned[3]), new_state)
  # The state moved, and the routers' kernels got gradients.
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(new_state))
  routers = {path: leaf for path, leaf in functional.flatten(grads).items() if 'router' in path}
  assert routers and all(np.any(leaf != 0) for leaf in routers.values())


def test_scanned_parameters_have_a_layers_axis():
  axes = functional.flatten(models.build(tiny.decoder(tiny.SWITCH, num_layers=4, stacking='scan')).axes)
  assert axes['blocks/0/1/moe/experts/wi'] == ('layers', 'expert', 'expert_embed', 'expert_mlp')
  axes = functional.flatten(models.build(tiny.decoder(tiny.SWITCH, num_layers=4)).axes)
  assert axes['blocks/3/moe/experts/wi'] == ('expert', 'expert_embed', 'expert_mlp')
