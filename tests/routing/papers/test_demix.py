"""DEMix: experts of domains learn from their own."""
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.routing import papers
from moejax.routing.stages import SCORES
from drawn_parameters import draw_parameters


@functools.cache
def demix_decoder():
  """(gradient of the mean loss of a batch, params): a decoder whose feed-forwards have one expert per domain."""
  block = dict(num_experts=3, experts=dict(name='feed_forward', hidden=8), router=papers.demix(num_domains=3),
               dispatch=dict(name='grouped'))
  model = models.build(dict(name='decoder', vocab_size=13, dim=8, num_layers=1, attention=dict(heads=2),
                            feed_forward=dict(hidden=8), sparse=dict(name='every', n=1), moe=block))
  params, state = draw_parameters(model)

  @jax.jit
  def gradient(params, tokens, tasks):
    def loss(params):
      logits = model.apply(params, state, dict(tokens=tokens, tasks=tasks), key=jax.random.key(1), train=True).logits
      picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
      return -picked.mean()
    return jax.grad(loss)(params)
  return gradient, params


def experts_of(gradient):
  return {path: np.asarray(leaf) for path, leaf in flatten(gradient).items() if '/experts/' in path}


def test_the_gradient_of_a_demix_expert_is_the_mean_over_its_own_domain():
  # Balanced batches: E times an expert's gradient of the mean over all rows is that of the mean over its domain's rows,
  # as of a group of devices that share the experts of one domain (optimizer.gradient_scale).
  gradient, params = demix_decoder()
  tokens = jax.random.randint(jax.random.key(2), (6, 7), 0, 13)
  tasks = jnp.broadcast_to(jnp.array([0, 0, 1, 1, 2, 2])[:, None], tokens.shape)
  together = experts_of(gradient(params, tokens, tasks))
  for domain in range(3):
    rows = slice(2 * domain, 2 * domain + 2)
    alone = experts_of(gradient(params, jnp.tile(tokens[rows], (3, 1)), jnp.tile(tasks[rows], (3, 1))))
    for path, leaf in alone.items():
      # Sums in another order: float32 rounding.
      np.testing.assert_allclose(3 * together[path][domain], leaf[domain], rtol=1e-3, atol=1e-6)
      assert leaf[domain].any() and not np.delete(leaf, domain, axis=0).any()


def test_more_domains_than_experts_are_refused():
  with pytest.raises(ConfigError, match='num_tasks = 5 must be at most num_experts = 4'):
    SCORES.build(dict(name='task', num_tasks=5), 'config.score', dim=None, num_experts=4, rngs=nnx.Rngs(0))
