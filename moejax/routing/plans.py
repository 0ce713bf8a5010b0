"""Plans: the output of routing and the input of dispatch; four pytrees with static shapes.

Axes: G routing groups, S tokens per group, E experts, K experts per token, C slots per expert.

    TokenPlan   each token names its experts          top-k family, BASE, hash, random; with capacity or dropless
    SlotPlan    each slot of an expert names a token  expert choice; the slot form of a TokenPlan with capacity
    SoftPlan    slots are mixtures of tokens          Soft MoE; the one-hot form of a SlotPlan
    DensePlan   a weight for every token and expert   dense routing; the reference form of all plans but SoftPlan

Conversions go downwards only: `to_slots`, `to_soft`, `to_dense`. Every plan also has

    pick(values)    a value per token and expert -> a value per entry of the plan,
    scale(factor)   the plan with its weights multiplied, entry by entry,
    shares()        <float32>[G,S,E] the share of each token that goes to each expert: a count, or a weight if dense.
"""
import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

# Whether an output depends on later tokens of its group.
#   causal: never.
#   slots:  only because a later token's first choice can take the slot of an earlier token's second choice;
#           published top-2 decoders train like this.
#   future: later tokens affect which experts an earlier token goes to (expert choice, batch priority, Soft MoE).
Leak = Literal['causal', 'slots', 'future']


def most_leaking(*leaks: Leak) -> Leak:
  """The leak of a router whose parts have `leaks`."""
  return max(leaks, key=typing.get_args(Leak).index)


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
    expert: <int32>[G,S,K] expert of each choice, first choice first.
    weight: <float32>[G,S,K] combine weight; undefined where not `kept`.
    kept: <bool>[G,S,K] False: the choice is not computed (dropped, not sampled, or padding).
    slot: <int32>[G,S,K] position in the expert's buffer where kept; None if dropless.
    capacity: slots per expert and group; None if dropless.
    passthrough: <float32>[G,S] weight of the token itself in the output, or None.
  """
  expert: Int[Array, 'G S K']
  weight: Float32[Array, 'G S K']
  kept: Bool[Array, 'G S K']
  slot: Int[Array, 'G S K'] | None = None
  passthrough: Float32[Array, 'G S'] | None = None
  num_experts: int = _static(default=0)
  capacity: int | None = _static(default=None)
  leak: Leak = _static(default='causal')

  @property
  def kept_weight(self) -> Float32[Array, 'G S K']:
    """<float32>[G,S,K]: the weights, zero where not kept."""
    return jnp.where(self.kept, self.weight, 0.)

  def to_slots(self) -> 'SlotPlan':
    """The slot form. Raises ValueError if the plan is dropless."""
    if self.capacity is None or self.slot is None:
      raise ValueError('a dropless TokenPlan has no slots: give the router a capacity (place.capacity_factor), '
                       'or use dispatch "grouped".')
    groups, tokens, choices = self.expert.shape
    shape = (groups, self.num_experts, self.capacity)
    # Dropped choices are written out of bounds, which discards them.
    slot = jnp.where(self.kept, self.slot, self.capacity)
    # Under vmap groups are a batch dimension of the scatter, which compilers partition without communication.
    @jax.vmap
    def write(empty, expert, slot, values):
      return empty.at[expert, slot].set(values, mode='drop')
    def fill(values):
      return write(jnp.zeros(shape, values.dtype), self.expert, slot, values)
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], self.expert.shape)
    return SlotPlan(token=fill(token), weight=fill(self.weight), filled=fill(jnp.ones_like(self.kept)),
                    passthrough=self.passthrough, num_tokens=tokens, leak=self.leak)

  def to_dense(self) -> 'DensePlan':
    """<float32>[G,S,E] with the kept weights; a token that names an expert twice gets the sum."""
    return DensePlan(self._per_expert(self.kept_weight), self.passthrough, leak=self.leak)

  def pick(self, values: Float[Array, 'G S E']) -> Float[Array, 'G S K']:
    """<float>[G,S,E] -> <float>[G,S,K]: the values of the chosen experts."""
    # A masked sum: its gradient is elementwise, whereas the gradient of a gather is a scatter.
    return jnp.sum(jnp.where(self._chosen(), values[:, :, None], 0), axis=-1)

  def scale(self, factor: Float32[Array, 'G S K'] | float) -> 'TokenPlan':
    """`factor`: <float32>[G,S,K]."""
    return dataclasses.replace(self, weight=self.weight * factor)

  def shares(self) -> Float32[Array, 'G S E']:
    """<float32>[G,S,E]: the number of kept choices of each expert by each token."""
    return self._per_expert(self.kept.astype(jnp.float32))

  def _chosen(self) -> jax.Array:
    return self.expert[..., None] == jnp.arange(self.num_experts)

  def _per_expert(self, values: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(self._chosen(), values[..., None], 0), axis=2)


@_plan
@dataclasses.dataclass(frozen=True)
class SlotPlan:
  """Each slot of each expert names a token of the group.

  Attributes:
    token: <int32>[G,E,C] token in the slot; undefined where not `filled`.
    weight: <float32>[G,E,C] combine weight of that token; undefined where not `filled`.
    filled: <bool>[G,E,C].
    passthrough: <float32>[G,S] weight of the token itself in the output, or None.
  """
  token: Int[Array, 'G E C']
  weight: Float32[Array, 'G E C']
  filled: Bool[Array, 'G E C']
  passthrough: Float32[Array, 'G S'] | None = None
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
  def kept_weight(self) -> Float32[Array, 'G E C']:
    """<float32>[G,E,C]: the weights, zero where the slot is empty."""
    return jnp.where(self.filled, self.weight, 0.)

  def to_soft(self) -> 'SoftPlan':
    """The one-hot form: <float32>[G,S,E,C] twice."""
    one_hot = jax.nn.one_hot(self.token, self.num_tokens, axis=1, dtype=self.weight.dtype)
    one_hot = one_hot * self.filled[:, None]
    return SoftPlan(dispatch=one_hot, combine=one_hot * self.kept_weight[:, None],
                    passthrough=self.passthrough, leak=self.leak)

  def to_dense(self) -> 'DensePlan':
    """<float32>[G,S,E]."""
    return DensePlan(self._per_token(self.kept_weight), self.passthrough, leak=self.leak)

  def pick(self, values: Float[Array, 'G S E']) -> Float[Array, 'G E C']:
    """<float>[G,S,E] -> <float>[G,E,C]: the values of the tokens in the slots."""
    return jnp.take_along_axis(values.swapaxes(1, 2), self.token, axis=2)

  def scale(self, factor: Float32[Array, 'G E C'] | float) -> 'SlotPlan':
    """`factor`: <float32>[G,E,C]."""
    return dataclasses.replace(self, weight=self.weight * factor)

  def shares(self) -> Float32[Array, 'G S E']:
    """<float32>[G,S,E]: the number of slots of each expert that hold each token."""
    return self._per_token(self.filled.astype(jnp.float32))

  def _per_token(self, values: jax.Array) -> jax.Array:
    empty = jnp.zeros((len(values), self.num_tokens, self.num_experts), values.dtype)
    experts = jnp.arange(self.num_experts)[:, None]
    return jax.vmap(lambda empty, token, values: empty.at[token, experts].add(values))(empty, self.token, values)


@_plan
@dataclasses.dataclass(frozen=True)
class SoftPlan:
  """Slots are mixtures of tokens, outputs are mixtures of slots.

  Attributes:
    dispatch: <float32>[G,S,E,C] share of each token in each slot's input.
    combine: <float32>[G,S,E,C] share of each slot's output in each token's output.
    passthrough: <float32>[G,S] weight of the token itself in the output, or None.
  """
  dispatch: Float32[Array, 'G S E C']
  combine: Float32[Array, 'G S E C']
  passthrough: Float32[Array, 'G S'] | None = None
  leak: Leak = _static(default='future')

  @property
  def num_experts(self) -> int:
    """E."""
    return self.dispatch.shape[2]

  def pick(self, values: Float[Array, 'G S E C']) -> Float[Array, 'G S E C']:
    """Returns `values` <float>[G,S,E,C]: a value per token and slot."""
    return values

  def scale(self, factor: Float32[Array, 'G S E C'] | float) -> 'SoftPlan':
    """`factor`: <float32>[G,S,E,C], on `combine`."""
    return dataclasses.replace(self, combine=self.combine * factor)

  def shares(self) -> Float32[Array, 'G S E']:
    """<float32>[G,S,E]: total share of the expert's slots in the token's output."""
    return self.combine.sum(-1)


@_plan
@dataclasses.dataclass(frozen=True)
class DensePlan:
  """Every expert sees every token.

  Attributes:
    weight: <float32>[G,S,E] combine weight; zero removes the expert from the output.
    passthrough: <float32>[G,S] weight of the token itself in the output, or None.
  """
  weight: Float32[Array, 'G S E']
  passthrough: Float32[Array, 'G S'] | None = None
  leak: Leak = _static(default='causal')

  @property
  def num_experts(self) -> int:
    """E."""
    return self.weight.shape[2]

  def to_dense(self) -> 'DensePlan':
    """Itself."""
    return self

  def pick(self, values: Float[Array, 'G S E']) -> Float[Array, 'G S E']:
    """Returns `values` <float>[G,S,E]."""
    return values

  def scale(self, factor: Float32[Array, 'G S E'] | float) -> 'DensePlan':
    """`factor`: <float32>[G,S,E]."""
    return dataclasses.replace(self, weight=self.weight * factor)

  def shares(self) -> Float32[Array, 'G S E']:
    """<float32>[G,S,E]: the weights."""
    return self.weight


Plan = TokenPlan | SlotPlan | SoftPlan | DensePlan


def token_plan(expert: Int[Array, 'G S K'], kept: Bool[Array, 'G S #K'], num_experts: int) -> TokenPlan:
  """A dropless plan with all weights one, before weighting.

  Args:
    expert: <int>[G,S,K].
    kept: <bool>[G,S,K], or [G,S,1] for all choices of a token.
    num_experts: E.
  """
  return TokenPlan(expert=expert.astype(jnp.int32), weight=jnp.ones(expert.shape, jnp.float32),
                   kept=jnp.broadcast_to(kept, expert.shape), num_experts=num_experts)


def slot_plan(token: Int[Array, 'G E C'], filled: Bool[Array, 'G E C'], num_tokens: int) -> SlotPlan:
  """A plan with all weights one, before weighting; token <int32>[G,E,C], filled <bool>[G,E,C]."""
  return SlotPlan(token=token, weight=jnp.ones(token.shape, jnp.float32), filled=filled, num_tokens=num_tokens)


def group_size(plan: Plan) -> int:
  """S, the number of tokens routed together."""
  return plan.num_tokens if isinstance(plan, SlotPlan) else jax.tree.leaves(plan)[0].shape[1]


def has_slots(plan: Plan) -> bool:
  """Whether experts have slots: tokens of a group compete for them, or are mixed in them."""
  return not isinstance(plan, DensePlan) and not (isinstance(plan, TokenPlan) and plan.capacity is None)
