"""The interface of implementations of attention."""
from collections.abc import Callable
from typing import NamedTuple

import jax

from moejax.kernels.target import Target
from moejax.layers.attend.mask import Mask


class AttentionInputs(NamedTuple):
  """What `attend` computes from; the same shapes and meanings as its arguments."""
  queries: jax.Array
  keys: jax.Array
  values: jax.Array
  scale: float
  mask: Mask | None = None
  bias: jax.Array | None = None
  sinks: jax.Array | None = None
  cap: float | None = None
  drop: Callable[[jax.Array], jax.Array] | None = None


DROPS = "dropout of attention's weights needs all of them: use 'plain', or set dropout to 0."


class AttentionKernel(NamedTuple):
  """One way to compute attention, forward and backward.

  Attributes:
    run: -> <float>[B,S,H,v] of the dtype of the values.
    limit: one sentence on why the target cannot run the inputs, of which it reads no values; None if it can.
  """
  run: Callable[[AttentionInputs], jax.Array]
  limit: Callable[[Target, AttentionInputs], str | None] = lambda target, inputs: None
