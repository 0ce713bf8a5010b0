"""Selection: which experts a token, or which tokens an expert. Gives a plan whose weights are one, or what the selection
itself found, which weighting multiplies.

A selection is a class with static attributes

    k            int | None: experts a token; None where tokens do not choose a fixed number,
    reads_slots  it needs logits [G,S,E,C], a score for every slot,
    reads_gates  it ranks by the weighting's gates in place of logits; may be left out: False,
    reads        names of what it needs of `Scores.extras`; may be left out: nothing,

and `leak(train)`, what the choice itself lets through from later tokens (`plans.Leak`), and
`__call__(scores, valid, *, key, train) -> Plan`. Ties go to the lowest index everywhere.
"""
import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp

from moejax.config import ConfigError, Registry
from moejax.ranges import Count, Divides, NonNegative, Positive
from moejax.routing import placement
from moejax.routing.plans import DensePlan, Leak, Plan, SoftPlan, slot_plan, token_plan
from moejax.routing.scores import Scores, required

SELECTIONS = Registry('router selection')


def top_k(scores: jax.Array, k: int) -> jax.Array:
  """The `k` largest of the last axis, largest first, ties to the lowest index.

  `jax.lax.top_k` is a custom call that compilers do not partition over leading axes; maxima are. An argmax, whose
  reduction carries two values, is slow on CPUs: so the maximum, and then the lowest index that has it.

  Args:
    scores: <float>[..., E], finite.
    k: at most E.

  Returns:
    <int32>[..., k].
  """
  num_experts = scores.shape[-1]
  index = jnp.arange(num_experts)
  chosen = []
  for _ in range(k):
    # "Not less" holds for NaN as well: the index stays one of an expert.
    best = jnp.where(scores < scores.max(-1, keepdims=True), num_experts, index).min(-1)
    chosen.append(best)
    scores = jnp.where(best[..., None] == index, -jnp.inf, scores)
  return jnp.stack(chosen, axis=-1)


GroupScore = Literal['max', 'top_2_sum']


def group_limited(scores: jax.Array, groups: int, kept: int, group_score: GroupScore) -> jax.Array:
  """`scores` with -inf where an expert is not in one of the token's `kept` best groups of experts.

  Args:
    scores: <float>[..., E]; for 'top_2_sum' gates, as sums of logits mean nothing.
    groups: of E / groups experts that follow each other.
    kept: groups a token.
    group_score: a group's best score (DeepSeek-V2, section 2.2.2), or the sum of its two best (as in the published code
      of DeepSeek-V3, where gates are sigmoids, and in Megatron-LM).

  Returns:
    <float>[..., E].
  """
  by_group = scores.reshape(*scores.shape[:-1], groups, -1)
  best = by_group.max(-1)
  if group_score == 'top_2_sum':
    others = jnp.where(jnp.arange(by_group.shape[-1]) == by_group.argmax(-1)[..., None], -jnp.inf, by_group)
    best = best + others.max(-1)
  allowed = (top_k(best, kept)[..., None] == jnp.arange(groups)).any(-2)
  return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(scores.shape)


SecondExpert = Literal['all', 'sampling', 'random']


def top_2(scores: Scores, policy: SecondExpert, threshold: float,
          key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """GShard's choice of two experts (Algorithm 1; names of the policies as in lingvo and Mesh TensorFlow).

  Args:
    scores: with logits <float32>[G,S,E].
    policy: 'all' takes the two best; 'sampling' draws the second from the softmax without the first; 'random' takes
      the second best with probability min(1, g2 / threshold), where g2 = p2 / (p1 + p2).
    threshold: of 'random'.
    key: unused by 'all'.

  Returns:
    expert <int32>[G,S,2] and routed <bool>[G,S,2], False where the second expert was not drawn.
  """
  expert = top_k(scores.select, 2)
  routed = jnp.ones(expert.shape, bool)
  experts = jnp.arange(scores.logits.shape[-1])
  if policy == 'sampling':
    noisy = scores.logits + jax.random.gumbel(key, scores.logits.shape)
    second = jnp.argmax(jnp.where(experts == expert[..., :1], -jnp.inf, noisy), axis=-1)
    expert = expert.at[..., 1].set(second.astype(jnp.int32))
  if policy == 'random':
    logits = jnp.sum(jnp.where(expert[..., None] == experts, scores.logits[..., None, :], 0.), axis=-1)
    second_gate = jax.nn.softmax(logits, axis=-1)[..., 1]
    draw = jax.random.uniform(key, second_gate.shape)
    routed = routed.at[..., 1].set(draw * threshold < second_gate)
  return expert, routed


def expert_choice(probs: jax.Array, valid: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
  """Every expert takes the `capacity` tokens that want it most (Expert Choice, equation 2).

  Args:
    probs: <float32>[G,S,E].
    valid: <bool>[G,S]; no expert takes other tokens.
    capacity: C, at most S.

  Returns:
    token <int32>[G,E,C], best first, and filled <bool>[G,E,C].
  """
  wanted = jnp.where(valid[:, None], probs.swapaxes(1, 2), -jnp.inf)
  # A sort is partitioned over groups and experts; `jax.lax.top_k` is not.
  token = jnp.argsort(-wanted, axis=-1, stable=True)[..., :capacity].astype(jnp.int32)
  return token, jnp.take_along_axis(wanted, token, axis=-1) > -jnp.inf


def _check_k(k: int, num_experts: int, where: str):
  if k > num_experts:
    raise ConfigError(f'{where}: a token cannot choose {k} of {num_experts} experts. '
                      f'Allowed for k: 1 to num_experts ({num_experts}).')


@SELECTIONS('top_k')
@dataclasses.dataclass(frozen=True)
class TopK:
  """Every token takes the `k` experts that score highest.

  Config:
    k: experts a token.
  """
  where: str
  num_experts: int
  k: Count

  reads_slots: ClassVar[bool] = False

  def __post_init__(self):
    _check_k(self.k, self.num_experts, self.where)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    expert = top_k(scores.select, self.k)
    return token_plan(expert, valid[..., None], self.num_experts)


@SELECTIONS('group_limited')
@dataclasses.dataclass(frozen=True)
class GroupLimited(TopK):
  """The `k` best experts of the best groups of experts: see the function `group_limited`.

  With as many groups as the mesh axis `expert` has devices, each group lies on one, and `groups_per_token` bounds the
  devices that a token travels to.

  Config besides `k`:
    groups: a divisor of the number of experts.
    groups_per_token: at most `groups`; together they have at least `k` experts.
    group_score: 'max', or 'top_2_sum' of the gates (plus the bias where `balance.bias` adds one), by which experts are
      then ranked too.
  """
  groups: Annotated[Count, Divides('num_experts')]
  groups_per_token: Count
  group_score: GroupScore = 'max'

  @property
  def reads_gates(self) -> bool:
    return self.group_score == 'top_2_sum'

  def __post_init__(self):
    super().__post_init__()
    size = self.num_experts // self.groups
    least = -(-self.k // size)
    if not least <= self.groups_per_token <= self.groups:
      raise ConfigError(f'{self.where}.groups_per_token must lie between {least} (for k = {self.k} experts in groups of '
                        f'{size}) and {self.groups}, the number of groups; not {self.groups_per_token}.')
    if self.group_score == 'top_2_sum' and size < 2:
      raise ConfigError(f'{self.where}.group_score: groups of one expert have no two best. Choose "max".')

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    limited = group_limited(scores.select, self.groups, self.groups_per_token, self.group_score)
    return super().__call__(dataclasses.replace(scores, select=limited), valid, key=key, train=train)


@SELECTIONS('sample')
@dataclasses.dataclass(frozen=True)
class Sample(TopK):
  """Training: `k` experts drawn from the softmax without replacement (Switch Transformer, appendix C, for k = 1).

  The weight stays the probability of what was drawn. Evaluation takes the `k` best.
  """

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    if train:
      noise = jax.random.gumbel(required(key, 'select "sample"'), scores.select.shape)
      scores = dataclasses.replace(scores, select=scores.select + noise)
    return super().__call__(scores, valid, key=key, train=train)


@SELECTIONS('top_2')
@dataclasses.dataclass(frozen=True)
class Top2:
  """Two experts a token, the second by a policy: see the function `top_2`.

  Config:
    second: policy in training.
    eval_second: policy at evaluation ('random' in Mesh TensorFlow); its draws are the same at every call.
    threshold: of 'random': GShard's 0.5, or the 0.2 of Mesh TensorFlow and ST-MoE.
  """
  where: str
  num_experts: int
  second: SecondExpert = 'all'
  eval_second: SecondExpert = 'all'
  threshold: NonNegative = 0.5

  k: ClassVar[int] = 2
  reads_slots: ClassVar[bool] = False

  def __post_init__(self):
    _check_k(2, self.num_experts, self.where)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    policy = self.second if train else self.eval_second
    if policy != 'all':
      key = required(key, f'select "top_2" with second={policy!r}') if train else jax.random.key(0)
    expert, routed = top_2(scores, policy, self.threshold, key)
    return token_plan(expert, routed & valid[..., None], self.num_experts)


@SELECTIONS('expert_choice')
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
  """Every expert takes the C tokens that give it the largest softmax probability.

  Config:
    capacity_factor: c, experts a token on average; C is the capacity for K = 1.
    convention: how C is computed (`placement.capacity`).
  """
  where: str
  num_experts: int
  capacity_factor: Positive = 2.
  convention: placement.Convention = 'moejax'

  k: ClassVar[None] = None
  reads_slots: ClassVar[bool] = False

  def leak(self, train: bool) -> Leak:
    return 'future'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    tokens = valid.shape[1]
    slots = placement.slots_that_choose(tokens, self.num_experts, self.capacity_factor,
                                        f'{self.where}.capacity_factor', self.convention)
    token, filled = expert_choice(jax.nn.softmax(scores.select, axis=-1), valid, slots)
    return slot_plan(token, filled, tokens)


@SELECTIONS('all')
@dataclasses.dataclass(frozen=True)
class All:
  """Every expert sees every token: a dense mixture."""
  num_experts: int

  k: ClassVar[None] = None
  reads_slots: ClassVar[bool] = False

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    return DensePlan(jnp.broadcast_to(valid[..., None], (*valid.shape, self.num_experts)).astype(jnp.float32))


def soft_dispatch(logits: jax.Array, valid: jax.Array) -> jax.Array:
  """Softmax over the tokens: what every slot is made of (Soft MoE, equation 1).

  Args:
    logits: <float32>[G,S,E,C].
    valid: <bool>[G,S]; other tokens are part of no slot.

  Returns:
    <float32>[G,S,E,C] summing to 1 over S wherever the group has a valid token.
  """
  valid = valid[..., None, None]
  return jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(jnp.float32).min), axis=1) * valid


@SELECTIONS('soft')
@dataclasses.dataclass(frozen=True)
class Soft:
  """Every slot is a mixture of the tokens (Soft MoE, equation 1)."""

  k: ClassVar[None] = None
  reads_slots: ClassVar[bool] = True

  def leak(self, train: bool) -> Leak:
    return 'future'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    combine = jnp.broadcast_to(valid[..., None, None], scores.logits.shape).astype(jnp.float32)
    return SoftPlan(dispatch=soft_dispatch(scores.select, valid), combine=combine)
