"""Selection: token choice, expert choice and dense. Returns a plan with weights one, or the selection's own weights,
which weighting multiplies.

A selection is a class with static attributes

    k            int | None: experts per token; None if tokens do not choose a fixed number,
    reads_slots  whether it needs logits [G,S,E,C], one per slot,
    reads_gates  whether it ranks by the weighting's gates instead of logits; optional, False by default,
    reads        the keys of `Scores.extras` it needs; optional, none by default,

and `leak(train)`, how the selection depends on later tokens (`plans.Leak`), and
`__call__(scores, valid, *, key, train) -> Plan`. Ties always go to the lowest index.
"""
import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from moejax.config import ConfigError, Registry
from moejax.ranges import Count, Divides, NonNegative, Positive
from moejax.routing import placement
from moejax.routing.plans import DensePlan, Leak, Plan, SoftPlan, slot_plan, token_plan
from moejax.routing.scores import Scores, required

SELECTIONS: Registry[Any] = Registry('router selection', object, context=('num_experts',))


def top_k(scores: jax.Array, k: int) -> jax.Array:
  """Indices of the `k` largest along the last axis, largest first; ties go to the lowest index.

  `jax.lax.top_k` is a custom call that compilers do not partition over leading axes, but a max is. An argmax, whose
  reduction carries two values, is slow on CPUs; hence the max, then the lowest index that attains it.

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
    # "Not less" is also true of NaN, so the index stays in range.
    best = jnp.where(scores < scores.max(-1, keepdims=True), num_experts, index).min(-1)
    chosen.append(best)
    scores = jnp.where(best[..., None] == index, -jnp.inf, scores)
  return jnp.stack(chosen, axis=-1)


GroupScore = Literal['max', 'top_2_sum']


def group_limited(scores: jax.Array, groups: int, kept: int, group_score: GroupScore) -> jax.Array:
  """`scores` with -inf where an expert is not in one of the token's `kept` best groups of experts.

  Args:
    scores: <float>[..., E]; gates for 'top_2_sum', because sums of logits are meaningless.
    groups: number of groups of consecutive experts.
    kept: groups per token.
    group_score: a group's best score (DeepSeek-V2, section 2.2.2), or the sum of its best two (as in the published code
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
    policy: 'all' takes the best two; 'sampling' draws the second from the softmax without the first; 'random' takes
      the second best with probability min(1, g2 / threshold), where g2 = p2 / (p1 + p2).
    threshold: for 'random'.
    key: unused by 'all'.

  Returns:
    expert <int32>[G,S,2] and routed <bool>[G,S,2], False where the second expert was not sampled.
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
  """Every expert takes its `capacity` tokens of highest probability (Expert Choice, equation 2).

  Args:
    probs: <float32>[G,S,E].
    valid: <bool>[G,S]; other tokens are never taken.
    capacity: C, at most S.

  Returns:
    token <int32>[G,E,C], best first, and filled <bool>[G,E,C].
  """
  wanted = jnp.where(valid[:, None], probs.swapaxes(1, 2), -jnp.inf)
  # Compilers partition a sort over groups and experts, but not `jax.lax.top_k`.
  token = jnp.argsort(-wanted, axis=-1, stable=True)[..., :capacity].astype(jnp.int32)
  return token, jnp.take_along_axis(wanted, token, axis=-1) > -jnp.inf


def _check_k(k: int, num_experts: int, where: str):
  if k > num_experts:
    raise ConfigError(f'{where}: a token cannot choose {k} of {num_experts} experts. '
                      f'Allowed for k: 1 to num_experts ({num_experts}).')


@SELECTIONS('top_k')
@dataclasses.dataclass(frozen=True)
class TopK:
  """Every token chooses the `k` experts with the highest scores.

  Config:
    k: experts per token.
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
  """The `k` best experts within the token's best groups: see the function `group_limited`.

  With as many groups as the mesh axis `expert` has devices, each device holds one group, and `groups_per_token` bounds
  the number of devices a token is sent to.

  Config besides `k`:
    groups: a divisor of the number of experts.
    groups_per_token: at most `groups`; they must contain at least `k` experts.
    group_score: 'max', or 'top_2_sum' of the gates (plus the bias of `balance.bias`, if any); experts are then ranked
      by the gates too.
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
      raise ConfigError(f'{self.where}.groups_per_token must be between {least} (for k = {self.k} experts in groups of '
                        f'{size}) and {self.groups}, the number of groups; not {self.groups_per_token}.')
    if self.group_score == 'top_2_sum' and size < 2:
      raise ConfigError(f"{self.where}.group_score: 'top_2_sum' needs groups of at least two experts. Use 'max'.")

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    limited = group_limited(scores.select, self.groups, self.groups_per_token, self.group_score)
    return super().__call__(dataclasses.replace(scores, select=limited), valid, key=key, train=train)


@SELECTIONS('sample')
@dataclasses.dataclass(frozen=True)
class Sample(TopK):
  """Training: `k` experts sampled from the softmax without replacement (Switch Transformer, appendix C, for k = 1).

  The weight is still the probability of the sampled expert. Evaluation takes the `k` best.
  """

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    if train:
      noise = jax.random.gumbel(required(key, 'select "sample"'), scores.select.shape)
      scores = dataclasses.replace(scores, select=scores.select + noise)
    return super().__call__(scores, valid, key=key, train=train)


@SELECTIONS('top_2')
@dataclasses.dataclass(frozen=True)
class Top2:
  """Two experts per token, the second by a policy: see the function `top_2`.

  Config:
    second: policy in training.
    eval_second: policy at evaluation ('random' in Mesh TensorFlow), with the same draws in every call.
    threshold: for 'random': 0.5 in GShard, 0.2 in Mesh TensorFlow and ST-MoE.
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
  """Every expert takes the C tokens with the largest softmax probability for it.

  Config:
    capacity_factor: c, average number of experts per token; C is the capacity for K = 1.
    convention: formula for C (`placement.capacity`).
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
  """Softmax over the tokens: the inputs of every slot (Soft MoE, equation 1).

  Args:
    logits: <float32>[G,S,E,C].
    valid: <bool>[G,S]; other tokens enter no slot.

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
