"""The transformer block: a list of residual branches, each with a sublayer that its config names."""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config import call
from moejax.layers import feed_forwards, mixers  # noqa: F401  (whose sublayers are registered)
from moejax.layers.norms import NORMS
from moejax.layers.sublayer import SUBLAYERS, Axes, Cache, Context, Left, Sublayer
from moejax.parallel import rules
from moejax.random import derive
from moejax.random import dropout as drop
from moejax.routing.plans import Leak


@dataclasses.dataclass(frozen=True)
class BranchConfig:
  """Keys of a branch, beside those of its sublayer.

  Attributes:
    pre_norm: norm of the sublayer's input: 'model' is the model's `norm`, None omits it.
    post_norm: norm of the sublayer's output, or None.
    residual_scale: multiplies the branch before it is added (GraniteMoE's `residual_multiplier`).
  """
  pre_norm: Mapping | Literal['model'] | None = 'model'
  post_norm: Mapping | None = None
  residual_scale: float = 1.


_OPTIONS = {field.name for field in dataclasses.fields(BranchConfig)}


def without_branch_keys(config: Mapping) -> dict[str, Any]:
  """The keys of the sublayer alone."""
  return {key: value for key, value in config.items() if key not in _OPTIONS}


@dataclasses.dataclass(frozen=True)
class BranchSpec:
  """A branch of a kind of block.

  Attributes:
    config: the `name` and keys of a sublayer, and those of `BranchConfig`.
    where: its config path.
    norm: the attribute of the block that holds `pre_norm`, '<branch>_norm' if empty.
  """
  config: Mapping
  where: str
  norm: str = ''


@dataclasses.dataclass(frozen=True)
class Branch:
  """A built branch: attributes of its block, and how its result is added.

  Attributes:
    name: attribute of the sublayer.
    pre_norm, post_norm: attributes of its norms; None without.
    scale: multiplies the branch.
    where: config path of the sublayer.
  """
  name: str
  pre_norm: str | None
  post_norm: str | None
  scale: float
  where: str


class Norms(nnx.Module):
  """The norms of a block alone, held per layer while all other parameters are shared."""

  def __init__(self, block: 'Block'):
    for name in block.norm_names():
      setattr(self, name, getattr(block, name))


class Block(nnx.Module):
  """Adds the branches to `x`, one after the other: `x + scale * drop(post_norm(sublayer(pre_norm(x))))`.

  The sublayer of the branch `moe` is the attribute `moe`, its norm `moe_norm` (and `moe_post_norm`). Every branch has
  dropout, and stochastic depth at a rate that grows by `drop_step` a layer, from 0 at the first.

  Args:
    branches: by name, in order.
    norm: the model's norm.
  """

  def __init__(self, branches: Mapping[str, BranchSpec], *, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs,
               norm: Mapping, dropout: float = 0., drop_step: float = 0.):
    self.dropout, self.drop_step = dropout, drop_step
    new_norm = lambda config, where: NORMS.build(config, where, dim=dim, axis='norm', rngs=rngs)
    built = []
    for name, spec in branches.items():
      own: BranchConfig = call(BranchConfig, {k: v for k, v in spec.config.items() if k in _OPTIONS}, spec.where)
      pre_norm, post_norm = spec.norm or f'{name}_norm', f'{name}_post_norm'
      if own.pre_norm is not None:
        setattr(self, pre_norm, new_norm(norm, '.norm') if own.pre_norm == 'model' else
                new_norm(own.pre_norm, f'{spec.where}.pre_norm'))
      setattr(self, name, SUBLAYERS.build(without_branch_keys(spec.config), spec.where, beside=_OPTIONS, dim=dim,
                                          dtype=dtype, rngs=rngs))
      if own.post_norm is not None:
        setattr(self, post_norm, new_norm(own.post_norm, f'{spec.where}.post_norm'))
      built.append(Branch(name, None if own.pre_norm is None else pre_norm,
                          None if own.post_norm is None else post_norm, own.residual_scale, spec.where))
    self.branches = tuple(built)

  def sublayer(self, branch: Branch) -> Sublayer:
    """The sublayer of a branch."""
    return getattr(self, branch.name)

  def norm_names(self) -> list[str]:
    """The attributes that hold norms."""
    return [name for branch in self.branches for name in (branch.pre_norm, branch.post_norm) if name is not None]

  def remove_norms(self) -> None:
    """For a block whose layers have norms of their own."""
    for name in self.norm_names():
      setattr(self, name, None)

  def init_cache(self, batch: int, length: int, memory_length: int = 0) -> dict[str, Cache]:
    """What its branches remember of B rows of at most `length` tokens, and of a memory, before the first."""
    caches = {}
    for branch in self.branches:
      sublayer = self.sublayer(branch)
      caches[branch.name] = sublayer.init_cache(batch, memory_length if sublayer.reads_memory else length)
    return {name: cache for name, cache in caches.items() if cache is not None}

  def cache_axes(self) -> dict[str, Axes]:
    """Logical names of the axes of `init_cache`."""
    axes = {branch.name: self.sublayer(branch).cache_axes() for branch in self.branches}
    return {name: of_cache for name, of_cache in axes.items() if of_cache is not None}

  def leaks(self, train: bool) -> dict[str, Leak]:
    """Whether the sublayer at each config path sees later tokens."""
    return {branch.where: self.sublayer(branch).leak(train) for branch in self.branches}

  def __call__(self, x: Float[Array, 'B S D'], context: Context, cache: dict[str, Cache] | None = None, *,
               key: jax.Array | None, depth: Any, train: bool,
               norms: nnx.Module | None = None) -> tuple[Float[Array, 'B S D'], dict[str, Left]]:
    """x: <float>[B,S,D] -> the same shape, and what each branch leaves.

    `cache`: of the branches that remember. `norms`: used instead of the block's own, if those were removed.
    """
    left = {}
    normed = lambda name, x: x if name is None else getattr(norms or self, name)(x)
    for branch in self.branches:
      name = branch.name
      y, left[name] = self.sublayer(branch)(normed(branch.pre_norm, x), context, (cache or {}).get(name),
                                            key=derive(key, name), train=train)
      y = normed(branch.post_norm, y)
      y = drop(y, self.dropout, key=derive(key, f'{name}_dropout'), train=train)
      if self.drop_step:
        y = drop(y, self.drop_step * depth, key=derive(key, f'{name}_depth'), train=train, shared_axes=(1, 2))
      y = y if branch.scale == 1 else branch.scale * y
      x = rules.constrain(x + y.astype(x.dtype), ('batch', 'sequence', 'embed'))
    return x, left
