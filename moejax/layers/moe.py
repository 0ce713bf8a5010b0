"""The mixture-of-experts layer: group, route, dispatch to experts, combine; and an expert that all tokens share."""
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax import dispatch
from moejax import experts
from moejax.config import ConfigError, call
from moejax.dispatch.layouts import Dense
from moejax.layers import initializers
from moejax.layers.embeddings import Linear
from moejax.parallel import rules
from moejax.random import derive
from moejax.ranges import LARGEST, Between, Count
from moejax.routing import router
from moejax.routing.features import RouterInputs, without_padding
from moejax.routing.router import RouterOutput

# As many as have been trained (2407.04153); a hundred slots of each can still be counted in 32 bits.
ExpertCount = Annotated[int, Between(1, 2**20)]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """The keys of `config.moe`.

  Attributes:
    num_experts: E.
    experts: what an expert is (`moejax.experts`).
    router: the stages of the router (`moejax.routing`).
    dispatch: how tokens reach their experts (`moejax.dispatch`).
    group: tokens that are routed together, and compete for the slots of a capacity: all of the 'batch' (of the rows that
      the model sees at a time: config.data.batch_size over config.training.accumulate, in evaluation too), those of one
      'sequence' with all documents that are packed in it, or this many (the largest divisor of B*S that is not above).
      Slots for each document: router.place=dict(name='document_capacity').
    shared: an expert that every token passes besides its routed ones, e.g. `dict(name='feed_forward', hidden=64)`.
    shared_gate: how the two are added: their 'sum' (as drawn in DeepSpeed-MoE, 2201.05596, section 4.1.1), or with
      two weights a token, a 'softmax' of a linear map of it (DeepSpeed's code: `use_residual`).
  """
  num_experts: ExpertCount
  experts: dict
  router: dict
  dispatch: dict
  group: Literal['batch', 'sequence'] | Count = 'batch'
  shared: dict | None = None
  shared_gate: Literal['sum', 'softmax'] = 'sum'


class MoE(nnx.Module):
  """A sparse layer in the place of a feed-forward."""

  def __init__(self, config: Mapping, where: str, *, dim: int, dtype, rngs: nnx.Rngs):
    """Builds the parts that `config` (the keys of `MoEConfig`) names.

    Raises:
      ConfigError: a config that does not fit, or experts that the active mesh cannot share out.
    """
    keys: MoEConfig = call(MoEConfig, config, where)
    check_experts(keys.num_experts, rules.active(), where)
    self.group, self.where = keys.group, where
    self.router = router.build(keys.router, f'{where}.router', dim=dim, num_experts=keys.num_experts, rngs=rngs)
    self.dispatch = dispatch.build(keys.dispatch, f'{where}.dispatch')
    self.experts = experts.build(keys.experts, f'{where}.experts', dim=dim, num_experts=keys.num_experts,
                                 dtype=dtype, rngs=rngs)
    self.shared = None if keys.shared is None else experts.build(
        keys.shared, f'{where}.shared', dim=dim, num_experts=None, dtype=dtype, rngs=rngs)
    if keys.shared_gate == 'softmax' and self.shared is None:
      raise ConfigError(f'{where}.shared_gate = "softmax" weighs a shared expert, and there is none: '
                        f'set {where}.shared.')
    self.shared_gate = None if keys.shared_gate == 'sum' else Linear(
        shape=(dim, 2), axes=('embed', None), init=initializers.fan_in(in_axis=0, out_axis=1),
        bias_init=nnx.initializers.zeros, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x: jax.Array, inputs: RouterInputs | None = None, *, key: jax.Array | None = None,
               train: bool = False) -> tuple[jax.Array, RouterOutput]:
    """Routes and computes.

    Args:
      x: <float>[B,S,D].
      inputs: what the router may look at besides `x`; fields [B,S].
      key: for noise in the router and dropout in the experts.
      train: whether there are any.

    Returns:
      <float>[B,S,D] of the dtype of `x`, and the router's output. Its plan is over groups, a row-major reshape of
      [B,S]: `output.plan.to_dense().weight.reshape(B, S, E)` is by token.

    Raises:
      ConfigError: while tracing: a plan that the dispatcher cannot run, or tokens that cannot be grouped as asked.
    """
    batch, length, dim = x.shape
    inputs = inputs or RouterInputs()
    x = without_padding(x, inputs.valid)
    tokens = tokens_per_group(self.group, batch, length, f'{self.where}.group')
    to_groups = lambda tree: jax.tree.map(lambda a: a.reshape(-1, tokens, *a.shape[2:]), tree)
    grouped = to_groups(x)
    routed = self.router(grouped, to_groups(inputs), key=derive(key, 'router'), train=train)
    with jax.named_scope('dispatch'):  # by which its work is known in traced and compiled programs
      y = self.dispatch(routed.plan, grouped, self.experts, key=derive(key, 'experts'), train=train)
    y = y.reshape(batch, length, dim)
    if self.shared is not None:
      shared = self.shared(x, Dense(), key=derive(key, 'shared'), train=train).astype(y.dtype)
      if self.shared_gate is not None:
        share = jax.nn.softmax(self.shared_gate(x), axis=-1).astype(y.dtype)
        y, shared = share[..., :1] * y, share[..., 1:] * shared
      y = y + shared
    return y, routed


def tokens_per_group(group: str | int, batch: int, length: int, where: str) -> int:
  """S: the largest divisor of the B*S tokens that is not above `group`.

  Raises:
    ConfigError: that is less than half of what was asked for, so another router than the config describes; or the
      tokens are more than indices of 32 bits can count.
  """
  total = batch * length
  if total > LARGEST:
    raise ConfigError(f'{where}: a batch of {batch} x {length} tokens is routed at once, and at most {LARGEST} can be. '
                      'Lower config.data.batch_size.')
  if isinstance(group, str):
    return total if group == 'batch' else length
  wanted = min(group, total)
  tokens = next((n for n in range(wanted, 0, -1) if total % n == 0), 0)
  if 2 * tokens < wanted or not tokens:
    raise ConfigError(f'{where}: {batch} x {length} tokens do not divide into groups of {group}; the largest size '
                      f'below that does is {tokens}. Choose a divisor of {total}, "sequence" or "batch".')
  return tokens


def check_experts(num_experts: int, mesh: Mesh | None, where: str) -> None:
  """Raises ConfigError unless the `expert` axis of the mesh divides the experts; fewer are sharded inside."""
  devices = 1 if mesh is None else mesh.shape['expert']
  if mesh is not None and num_experts > devices and num_experts % devices:
    nearest = max(n for n in range(1, devices + 1) if num_experts % n == 0 and mesh.size % n == 0)
    raise ConfigError(f'{where}.num_experts = {num_experts} cannot be shared out over the {devices} devices of the mesh '
                      f'axis `expert`: make it a positive multiple of {devices}, or config.mesh.expert {nearest}.')
