"""The feed-forward of a dense transformer block: one expert for all tokens, without an expert axis."""
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.experts.feed_forward import FeedForwardExperts
from moejax.experts.layouts import Dense
from moejax.kernels.expert_block import Activation
from moejax.layers.sublayer import SUBLAYERS, Cache, Context, Left, Sublayer
from moejax.ranges import Count, Positive, Rate


@SUBLAYERS('feed_forward')
class DenseFeedForward(FeedForwardExperts, Sublayer):
  """Two matrices, or three with a gated activation, that every token uses; its parameters have axes ('embed', 'mlp')."""

  def __init__(self, *, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs, hidden: Count,
               activation: Activation = 'gelu', use_bias: bool = False, dropout: Rate = 0.,
               init_scale: Positive = 1.):
    """See `moejax.experts.feed_forward.FeedForwardExperts`."""
    super().__init__(dim=dim, num_experts=None, dtype=dtype, rngs=rngs, hidden=hidden,
                     activation=activation, use_bias=use_bias, dropout=dropout, init_scale=init_scale)

  def __call__(self, x: Float[Array, '... D'], context: Context | None = None, cache: Cache | None = None, *,
               key: jax.Array | None = None, train: bool = False) -> tuple[Float[Array, '... D'], Left]:
    """x: <float>[..,D] -> <float>[..,D] of the computation's dtype. Raises ValueError: dropout without a key."""
    return super().__call__(x, Dense(), key=key, train=train), Left()
