"""Straight-through dispatch has the gradient of its definition."""
import jax
import jax.numpy as jnp
import numpy as np

from moejax import functional
from moejax.config import call
from moejax.layers.feed_forwards.moe import MoE
from moejax.routing import papers

E = 4
KEY = jax.random.key(0)


def test_straight_through_gives_dispatch_the_gradient_of_the_weights():
  """y = sum_e w_e f_e(d_e x) with d_e = 1 + w_e - stop_gradient(w_e): the same value as without, and a gradient that
  the definition, written for every token and expert without buffers, has too."""
  dim, hidden = 6, 10
  x = jax.random.normal(KEY, (2, 4, dim))

  def layer(straight_through):
    config = dict(num_experts=E, experts=dict(name='feed_forward', hidden=hidden, activation='gelu'),
                  router=papers.lucidrains(policy='all', capacity_factor=16., z=0., straight_through=straight_through),
                  dispatch=dict(name='einsum'), group='sequence')
    return functional.functionalize(lambda rngs: call(MoE, config, 'moe', dim=dim, dtype=jnp.float32, rngs=rngs), MoE.mix)

  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: draw.normal(0, 0.5, leaf.shape).astype(np.float32), layer(True).shapes()[0])

  def definition(params, straight_through):
    probs = jax.nn.softmax(jnp.einsum('gsd,de->gse', x, params['router']['score']['kernel']), axis=-1)
    best = probs >= jnp.sort(probs, axis=-1)[..., -2:-1]
    w = jnp.where(best, probs, 0) / jnp.where(best, probs, 0).sum(-1, keepdims=True)
    d = 1 + (w - jax.lax.stop_gradient(w)) * straight_through
    inputs = d[..., None] * x[:, :, None]
    out = jnp.einsum('gsef,efd->gsed', jax.nn.gelu(jnp.einsum('gsed,edf->gsef', inputs, params['experts']['wi'])),
                     params['experts']['wo'])
    return jnp.einsum('gse,gsed->gsd', w, out)

  def slope(apply):
    return jax.jit(jax.value_and_grad(lambda params: jnp.sin(apply(params)).sum()))(params)

  gradients = []
  for straight_through in (True, False):
    model = layer(straight_through)
    value, gradient = slope(lambda params: model.apply(params, {}, x, key=KEY, train=True)[0])
    expected_value, expected = slope(lambda params: definition(params, straight_through))
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
    gradients.append(gradient['router']['score']['kernel'])
  assert abs(gradients[0] - gradients[1]).max() > 0.1
