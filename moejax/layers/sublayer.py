"""What a block is made of: sublayers, by name, and what they receive and return.

A sublayer mixes tokens (`mixers`: attention, recurrence) or transforms each token (`feed_forwards`: dense, mixture of
experts). Both follow one protocol, so that a block can hold any of them in any order.
"""
import dataclasses
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Float32

from moejax.config import Registry
from moejax.layers.attend import Mask
from moejax.layers.positions import PositionEncoding
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import Leak
from moejax.routing.router import RouterOutput

# What a sublayer remembers of earlier tokens: arrays by name; what the branches of a block do; and the logical names of
# the axes of a sublayer's arrays.
Cache = dict[str, jax.Array]
Caches = dict[str, Cache]
Axes = dict[str, tuple[str | None, ...]]


@dataclasses.dataclass(frozen=True)
class Context:
  """Inputs of all blocks of a stack besides the activations.

  Attributes:
    inputs: for routers, with fields [B,S]; self-attention and recurrence use its positions too.
    encoding: rotates queries and keys of self-attention.
    mask: for self-attention, without a window, which each layer has for itself; None: every token sees all.
    bias: <float32>[1,H,S,S] for self-attention, or None.
    memory: <float>[B,T,D] for cross-attention, or None.
    memory_mask: for cross-attention.
  """
  inputs: RouterInputs
  encoding: PositionEncoding
  mask: Mask | None = None
  bias: Float32[Array, '1 H S S'] | None = None
  memory: Float[Array, 'B T D'] | None = None
  memory_mask: Mask | None = None


class Left(NamedTuple):
  """What a sublayer leaves besides its activations.

  Attributes:
    router: the output of its router, which is its attribute `router`.
    cache: what it remembers for the next tokens (a mixture of layers: by the branches of a layer); None if it was given
      none, or if that stays as it is.
  """
  router: RouterOutput | None = None
  cache: Cache | Caches | None = None


class Sublayer(nnx.Module):
  """The base class of mixers and feed-forwards.

  Attributes:
    reads_memory: it attends to the memory of the context, and the `length` of `init_cache` is that of the memory.
  """

  reads_memory = False

  def __call__(self, x: Float[Array, 'B S D'], context: Context, cache: Cache | None = None, *,
               key: jax.Array | None = None, train: bool = False) -> tuple[Float[Array, 'B S D'], Left]:
    """Applies the sublayer.

    Args:
      x: <float>[B,S,D].
      context: the inputs that all blocks share.
      cache: what it remembers of earlier tokens, or None for whole sequences.
      key: for noise and dropout.
      train: whether to apply noise and dropout.

    Returns:
      <float>[B,S,D], and what it leaves.
    """
    raise NotImplementedError

  def init_cache(self, batch: int, length: int) -> Cache | None:
    """What it remembers of B rows of at most `length` tokens, before the first; None: nothing."""
    del batch, length
    return None

  def cache_axes(self) -> Axes | None:
    """Logical names of the axes of `init_cache`."""
    return None

  def leak(self, train: bool) -> Leak:
    """Whether an output depends on later tokens, beyond what the mask of the context allows."""
    del train
    return 'causal'


SUBLAYERS: Registry[Sublayer] = Registry('sublayer', Sublayer, context=('dim', 'dtype', 'rngs'))
