"""With jax_enable_x64 routers give indices and weights of 64 bits; the expert block accepts them.

Oracle: the same block in 32 bits.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.expert_block import expert_block
from moejax.kernels.routes import Routes, Weights

N, E, D, F = 6, 3, 4, 5
TOKEN, SIZES = np.array([0, 2, 4, 1, 3, 5]), np.array([3, 2, 1])


def outputs(implementation, position, bits):
  """The block's output, and its gradients by x, all weights and the routes' weights."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  weights = Weights(wi=draw(E, D, F), wo=draw(E, F, D), bi=draw(E, F), bo=draw(E, D))
  number, integer = (np.float64, np.int64) if bits == 64 else (np.float32, np.int32)
  where = np.argsort(TOKEN)[:, None].astype(integer) if position else None
  share = rng.random(N).astype(number)

  def block(x, weights, share):
    routes = Routes(jnp.asarray(TOKEN.astype(integer)), share, jnp.asarray(SIZES.astype(integer)), where)
    return (expert_block(x, weights, routes, activation='gelu', implementation=implementation) ** 2).sum()

  with jax.enable_x64(bits == 64):
    weights = jax.tree.map(jnp.asarray, weights)
    return jax.tree.map(np.asarray, jax.value_and_grad(block, (0, 1, 2))(jnp.asarray(draw(N, D)), weights,
                                                                        jnp.asarray(share)))


@pytest.mark.parametrize('position', [True, False])
@pytest.mark.parametrize('implementation', ['xla', 'reference', 'ragged_dot'])
def test_an_expert_block_takes_indices_and_weights_of_64_bits(implementation, position):
  wide, narrow = (outputs(implementation, position, bits) for bits in (64, 32))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), wide, narrow)
  assert wide[1][2].dtype == np.float64 and wide[1][0].dtype == np.float32  # each gradient has the type of its argument
