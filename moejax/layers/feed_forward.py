"""The feed-forward of a dense transformer block: one expert for all tokens, without an expert axis."""
import jax
from flax import nnx

from moejax.dispatch.layouts import Dense
from moejax.experts import feed_forward as experts
from moejax.ranges import Count, Positive, Rate


class FeedForward(experts.FeedForward):
  """The expert's computation on x <float>[..,D], and its parameters, with axes ('embed', 'mlp')."""

  def __init__(self, *, dim: int, dtype, rngs: nnx.Rngs, hidden: Count, activation: experts.Activation = 'gelu',
               use_bias: bool = False, dropout: Rate = 0., init_scale: Positive = 1., where: str = 'feed_forward'):
    """See `moejax.experts.feed_forward.FeedForward`."""
    super().__init__(dim=dim, num_experts=None, dtype=dtype, rngs=rngs, hidden=hidden,
                     activation=activation, use_bias=use_bias, dropout=dropout, init_scale=init_scale)

  def __call__(self, x: jax.Array, *, key: jax.Array | None = None, train: bool = False) -> jax.Array:
    """x: <float>[..,D] -> <float>[..,D] of the computation's dtype. Raises ValueError: dropout without a key."""
    return super().__call__(x, Dense(), key=key, train=train)
