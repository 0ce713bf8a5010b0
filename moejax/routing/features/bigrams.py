"""A hash of a token's id and its predecessor's (Hash Layers, arXiv 2106.04426)."""
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.ranges import Count
from moejax.routing.inputs import RouterInputs
from moejax.routing.stages import FEATURES, Feature


def pair_hash(first: Int[Array, '...'], second: Int[Array, '...'], buckets: int) -> Int[Array, '...']:
  """<int32> of the same shape, below `buckets`: a pseudo-random hash of each pair, identical on every platform.

  32-bit multiplications and shifts (the finaliser of MurmurHash3), once per element of the pair.
  """
  def mix(h):
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
  h = mix(mix(first.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)) + second.astype(jnp.uint32))
  return (h % jnp.uint32(buckets)).astype(jnp.int32)


@FEATURES('bigrams')
class Bigrams(Feature):
  """A hash, below `buckets`, of the ids of the token and its predecessor.

  Config:
    buckets: number of hash values.
  """

  def __init__(self, *, buckets: Count):
    self.buckets = buckets

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> Int[Array, 'G S']:
    """-> <int32>[G,S]. Raises ConfigError if the model supplies no ids."""
    return pair_hash(inputs['previous_ids'], inputs['token_ids'], self.buckets)
