"""Plans: what a router decides. Four pytrees with static shapes, the one contract between routing and dispatch.

Axes: G routing groups, S tokens in a group, E experts, K experts a token, C slots an expert.

    TokenPlan   each token names its experts          top-k family, hash, random; placed in buffers or dropless
    SlotPlan    each expert's slots name their token  expert choice, BASE; the slot form of a placed TokenPlan
    SoftPlan    slots are mixtures of tokens          Soft MoE; the one-hot form of a SlotPlan
    DensePlan   a weight for every token and expert   dense routing; the reference form of all but soft

Conversions run one way, downwards: `to_slots`, `to_soft`, `to_dense`.
"""
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

# Whether an output depends on later tokens of its group.
#   causal: never.
#   slots:  only because a later token's higher choice can take the buffer slot of an earlier token's lower choice;
#           published top-2 decoders train like this.
#   future: later tokens decide which experts an earlier one sees (expert choice, batch priority, Soft MoE).
Leak = Literal['causal', 'slots', 'future']


def _plan(cls):
  static = [f.name for f in dataclasses.fields(cls) if f.metadata.get('static')]
  data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
  return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)


def _static(**kwargs):
  return dataclasses.field(metadata=dict(static=True), **kwargs)


@_plan
@dataclasses.dataclass(frozen=True)
class TokenPlan:
  """Each token names K experts.

  Attributes:
    expert: <int32>[G,S,K] expert of each choice, the first choice first.
    weight: <float32>[G,S,K] combine weight; meaningless where not `kept`.
    kept: <bool>[G,S,K] False: the choice is not computed (dropped, not sampled, or a padding token).
    slot: <int32>[G,S,K] position in the expert's buffer where kept; None if dropless.
    capacity: slots an expert and group; None if dropless.
    passthrough: <float32>[G,S] weight of the token itself in the output, or None.
  """
  expert: jax.Array
  weight: jax.Array
  kept: jax.Array
  slot: jax.Array | None = None
  passthrough: jax.Array | None = None
  num_experts: int = _static(default=0)
  capacity: int | None = _static(default=None)
  leak: Leak = _static(default='causal')

  @property
  def kept_weight(self) -> jax.Array:
    """<float32>[G,S,K]: the weight, zero where not kept."""
    return jnp.where(self.kept, self.weight, 0.)

  def to_slots(self) -> 'SlotPlan':
    """The slot form of a placed plan. Raises ValueError if the plan is dropless."""
    if self.capacity is None:
      raise ValueError('a dropless TokenPlan has no slots: give the router a capacity (place.capacity_factor), '
                       'or use dispatch "grouped".')
    groups, tokens, choices = self.expert.shape
    shape = (groups, self.num_experts, self.capacity)
    # Unkept choices are written out of bounds and fall away.
    index = (jnp.arange(groups)[:, None, None], self.expert, jnp.where(self.kept, self.slot, self.capacity))
    token = jnp.broadcast_to(jnp.arange(tokens)[None, :, None], self.expert.shape)
    return SlotPlan(
        token=jnp.zeros(shape, jnp.int32).at[index].set(token, mode='drop'),
        weight=jnp.zeros(shape, self.weight.dtype).at[index].set(self.weight, mode='drop'),
        filled=jnp.zeros(shape, bool).at[index].set(True, mode='drop'),
        passthrough=self.passthrough, num_tokens=tokens, leak=self.leak)

  def to_dense(self) -> 'DensePlan':
    """<float32>[G,S,E] with the kept weights; a token that names an expert twice gets the sum."""
    one_hot = jax.nn.one_hot(self.expert, self.num_experts, dtype=self.weight.dtype)
    return DensePlan(jnp.einsum('gsk,gske->gse', self.kept_weight, one_hot), self.passthrough, leak=self.leak)


@_plan
@dataclasses.dataclass(frozen=True)
class SlotPlan:
  """Each slot of each expert names a token of the group.

  Attributes:
    token: <int32>[G,E,C] token in the slot; meaningless where not `filled`.
    weight: <float32>[G,E,C] combine weight of that token; meaningless where not `filled`.
    filled: <bool>[G,E,C].
    passthrough: <float32>[G,S] weight of the token itself in the output, or None.
  """
  token: jax.Array
  weight: jax.Array
  filled: jax.Array
  passthrough: jax.Array | None = None
  num_tokens: int = _static(default=0)
  leak: Leak = _static(default='future')

  @property
  def num_experts(self) -> int:
    """E."""
    return self.token.shape[1]

  @property
  def capacity(self) -> int:
    """C."""
    return self.token.shape[2]

  @property
  def kept_weight(self) -> jax.Array:
    """<float32>[G,E,C]: the weight, zero where the slot is empty."""
    return jnp.where(self.filled, self.weight, 0.)

  def to_soft(self) -> 'SoftPlan':
    """The one-hot form: <float32>[G,S,E,C] twice."""
    one_hot = jax.nn.one_hot(self.token, self.num_tokens, axis=1, dtype=self.weight.dtype)
    one_hot = one_hot * self.filled[:, None]
    return SoftPlan(dispatch=one_hot, combine=one_hot * self.kept_weight[:, None],
                    passthrough=self.passthrough, leak=self.leak)

  def to_dense(self) -> 'DensePlan':
    """<float32>[G,S,E]."""
    return DensePlan(self.to_soft().combine.sum(-1), self.passthrough, leak=self.leak)


@_plan
@dataclasses.dataclass(frozen=True)
class SoftPlan:
  """Slots are mixtures of tokens, outputs are mixtures of slots.

  Attributes:
    dispatch: <float32>[G,S,E,C] share of each token in each slot's input.
    combine: <float32>[G,S,E,C] share of each slot's output in each token's output.
    passthrough: <float32>[G,S] weight of the token itself in the output, or None.
  """
  dispatch: jax.Array
  combine: jax.Array
  passthrough: jax.Array | None = None
  leak: Leak = _static(default='future')

  @property
  def num_experts(self) -> int:
    """E."""
    return self.dispatch.shape[2]


@_plan
@dataclasses.dataclass(frozen=True)
class DensePlan:
  """Every expert sees every token.

  Attributes:
    weight: <float32>[G,S,E] combine weight; zero removes the expert from the output.
    passthrough: <float32>[G,S] weight of the token itself in the output, or None.
  """
  weight: jax.Array
  passthrough: jax.Array | None = None
  leak: Leak = _static(default='causal')

  @property
  def num_experts(self) -> int:
    """E."""
    return self.weight.shape[2]


Plan = TokenPlan | SlotPlan | SoftPlan | DensePlan
