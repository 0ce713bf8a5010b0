"""Experts. Each is written once, for any memory layout of its rows (`Layout`).

A dispatcher calls `experts(rows, layout, key=key, train=train)` and gets one output row per row. Only the layout knows
which expert's weights apply to which row.
"""
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from moejax import config as config_lib
from moejax.experts.layouts import Layout
from moejax.kernels import Weights
from moejax.kernels.expert_block import Activation


class FusedExperts(NamedTuple):
  """Feed-forward experts in the form that `kernels.expert_block` fuses."""
  weights: Weights
  activation: Activation


class Expert(nnx.Module):
  """Base class of experts. One module holds all E, in arrays with a leading axis."""

  def __call__(self, rows: Float[Array, '... D'], layout: Layout, *, key: jax.Array | None = None,
               train: bool = False) -> Float[Array, '... D']:
    """rows: <float>[..,D] in `layout` -> <float>[..,D]."""
    raise NotImplementedError

  def block(self, train: bool) -> FusedExperts | None:
    """The experts as one fused block, for dispatchers that fuse it with dispatch and combine; None if they are none."""
    return None


EXPERTS = config_lib.Registry('expert', Expert, context=('dim', 'num_experts', 'dtype', 'rngs'))


class BoundExperts:
  """Experts as a dispatcher calls them, with rows and their layout alone."""

  def __call__(self, rows: Float[Array, '... D'], layout: Layout) -> Float[Array, '... D']:
    """rows: <float>[..,D] in `layout` -> <float>[..,D]."""
    raise NotImplementedError

  def block(self) -> FusedExperts | None:
    """The experts as one fused block; None: they only run as called."""
    return None


@dataclasses.dataclass(frozen=True)
class BoundModule(BoundExperts):
  """A module of experts with the other arguments of its call bound.

  Attributes:
    experts: see `build`.
    key: for dropout.
    train: whether dropout applies.
  """
  experts: Expert
  key: jax.Array | None = None
  train: bool = False

  def __call__(self, rows: Float[Array, '... D'], layout: Layout) -> Float[Array, '... D']:
    """See `BoundExperts`."""
    return self.experts(rows, layout, key=self.key, train=self.train)

  def block(self) -> FusedExperts | None:
    """See `BoundExperts`; None if they are not feed-forwards, or use dropout."""
    return self.experts.block(self.train)


def build(config: Mapping, where: str, *, dim: int, num_experts: int | None, dtype, rngs: nnx.Rngs) -> Expert:
  """Builds the experts named in `config`, e.g. `dict(name='feed_forward', hidden=1024)`.

  Args:
    config: `name` and the keys of its constructor.
    where: config path.
    dim: D.
    num_experts: E, or None for a single expert without an expert axis.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial values.

  Raises:
    ConfigError: an invalid config.
  """
  return EXPERTS.build(config, where, dim=dim, num_experts=num_experts, dtype=dtype, rngs=rngs)


from moejax.experts import feed_forward, residual_stack, scaled_geglu, segments  # they register
