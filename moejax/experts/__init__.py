"""What an expert computes. Experts are written once; a `Layout` says how their rows lie in memory.

A dispatcher calls `experts(rows, layout, key=key, train=train)` and gets one output row for each row. Which row meets
which expert's weights is the layout's business alone.
"""
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from moejax import config as config_lib
from moejax.kernels import Weights
from moejax.kernels.activations import Activation

EXPERTS = config_lib.Registry('expert')


class Layout(Protocol):
  """Rows that have been brought to their experts: `[E,N,D]` buffers, or `[M,D]` rows sorted by expert."""

  def matmul(self, rows: jax.Array, w: jax.Array) -> jax.Array:
    """rows: <float>[..,D], w: <float>[E,D,F] -> <float>[..,F]: each row times the matrix of its expert."""
    ...

  def per_row(self, b: jax.Array) -> jax.Array:
    """b: <float>[E,F] -> what broadcasts to <float>[..,F]: for each row the vector of its expert."""
    ...

  def once(self, b: jax.Array) -> jax.Array:
    """b: <float>[E,D] -> what to add to a result that may be one part of a sum over shards of the hidden units."""
    ...

  def whole(self, y: jax.Array) -> jax.Array:
    """y: <float>[..,D], maybe one part of a sum over shards of the hidden units -> that sum, for what comes after."""
    ...

  def bernoulli(self, key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
    """<bool>[..,F] of `shape`: True with probability `p`; a token and expert draw the same in any layout."""
    ...


class Block(NamedTuple):
  """Experts that are feed-forwards, in the form that `kernels.expert_block` fuses."""
  weights: Weights
  activation: Activation


@dataclasses.dataclass(frozen=True)
class Call:
  """Experts with what a call needs besides rows: `call(rows, layout)`.

  Attributes:
    experts: as `build` makes them.
    key: for dropout.
    train: whether there is any.
  """
  experts: Any
  key: jax.Array | None = None
  train: bool = False

  def __call__(self, rows: jax.Array, layout: Layout) -> jax.Array:
    """rows: <float>[..,D] as `layout` says -> <float>[..,D]."""
    return self.experts(rows, layout, key=self.key, train=self.train)

  def block(self) -> Block | None:
    """The experts as one fused block; None where they are something else, or drop hidden units."""
    block = getattr(self.experts, 'block', None)
    return block and block(self.train)


def build(config, where: str, *, dim: int, num_experts: int | None, dtype, rngs: nnx.Rngs) -> nnx.Module:
  """The experts that `config` names, e.g. `dict(name='feed_forward', hidden=1024)`.

  Args:
    config: `name` and the keys of that constructor.
    where: config path, for errors.
    dim: D.
    num_experts: E, or None for a single one whose weights have no expert axis.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial values.

  Returns:
    A module that is called as `experts(rows, layout, *, key=None, train=False)`. It may have a method
    `block(train) -> Block | None`, which lets dispatchers fuse it with what they do.

  Raises:
    ConfigError: a config that does not fit.
  """
  return EXPERTS.build(config, where, dim=dim, num_experts=num_experts, dtype=dtype, rngs=rngs)


from moejax.experts import feed_forward, residual_stack, scaled_geglu, segments  # noqa: E402 (they register)
