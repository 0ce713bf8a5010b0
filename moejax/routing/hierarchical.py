"""Two levels of gates: a primary one chooses groups of experts, and one in every group chooses among its experts.

Experts `i*M .. i*M + M-1` are group i. The logit of expert j in group i is `o_i + log softmax(h_i)_j`, so that the
logsumexp of a group is the primary logit o_i, and selection and weighting need nothing but the logits.

Shazeer et al. 2017 (arXiv 1701.06538), appendix B; for `top 2` of both levels the layer `MoE2D` of Mesh TensorFlow
(`mesh_tensorflow/transformer/moe.py`), which lucidrains/mixture-of-experts has in PyTorch.
"""
import dataclasses
from typing import ClassVar, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from moejax import functional
from moejax.config import ConfigError
from moejax.routing.balancing import BALANCERS, Balancer, Routed, switch_loss
from moejax.routing.noisy import check_noise, chosen, imbalance, learned_noise_std, over_tokens, prob_in_top_k
from moejax.routing.placement import PLACEMENTS, capacity, checked_slots, slots_in_order
from moejax.routing.plans import Leak, Plan, TokenPlan
from moejax.routing.scores import SCORES, Score, Scores, required, vectors
from moejax.routing.selection import SELECTIONS, top_k
from moejax.routing.weighting import WEIGHTINGS, softmax_over_experts


def group_size(num_experts: int, groups: int, where: str) -> int:
  """M. Raises ConfigError where the groups are not equal."""
  if groups < 1 or num_experts % groups:
    raise ConfigError(f'{where}.groups: {groups} groups do not divide {num_experts} experts. Choose a divisor of '
                      'num_experts.')
  return num_experts // groups


def joint_logits(outer: jax.Array, inner: jax.Array) -> jax.Array:
  """<float32>[..., N] of the primary gate and [..., N, M] of the others -> [..., N*M]."""
  joint = outer[..., None] + jax.nn.log_softmax(inner, axis=-1)
  return joint.reshape(*outer.shape[:-1], -1)


def two_levels(logits: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """The inverse of `joint_logits`: (outer [..., N], inner [..., N, M] up to a constant of every group)."""
  inner = logits.reshape(*logits.shape[:-1], groups, -1)
  return jax.nn.logsumexp(inner, axis=-1), inner


@SCORES('hierarchical')
class Hierarchical(Score):
  """A linear gate over groups and one in each group.

  Config:
    groups: N.
    noise: 'learned' (`noisy.NoisyLinear`) in training at both levels, or 'none'.
    init_std: of all kernels.
    noise_floor: least standard deviation of the noise.
  """

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs, groups: int,
               noise: Literal['learned', 'none'] = 'learned', init_std: float = 0., noise_floor: float = 1e-2):
    dim, size = vectors(dim, where), group_size(num_experts, groups, where)
    init = nnx.initializers.normal(init_std)
    outer = lambda: functional.parameter(rngs, init, (dim, groups), ('embed', None))
    inner = lambda: functional.parameter(rngs, init, (dim, groups, size), ('embed', None, None))
    self.noisy, self.noise_floor = noise == 'learned', noise_floor
    self.outer, self.inner = outer(), inner()
    self.outer_noise, self.inner_noise = (outer(), inner()) if self.noisy else (None, None)

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]. extras: `outer` and `inner`, each with `_clean` and, with noise, `_std`."""
    def product(kernel):
      return jnp.einsum('gsd,d...->gs...', features, kernel[...], precision=jax.lax.Precision.HIGHEST)
    levels = dict(outer=(self.outer, self.outer_noise), inner=(self.inner, self.inner_noise))
    extras = {}
    for level, (kernel, noise_kernel) in levels.items():
      extras[level] = extras[f'{level}_clean'] = clean = product(kernel)
      if train and self.noisy:
        level_key = jax.random.fold_in(required(key, 'score "hierarchical" with noise'), level == 'inner')
        std = extras[f'{level}_std'] = learned_noise_std(product(noise_kernel), self.noise_floor)
        extras[level] = clean + std * jax.random.normal(level_key, clean.shape)
    logits = joint_logits(extras['outer'], extras['inner'])
    clean = joint_logits(extras['outer_clean'], extras['inner_clean'])
    return Scores(logits=logits, select=logits, clean=clean, extras=extras)


@SELECTIONS('hierarchical_top_k')
@dataclasses.dataclass(frozen=True)
class HierarchicalTopK:
  """Every token takes the best `per_group` experts of each of its best `groups_per_token` of `groups` groups."""
  where: str
  num_experts: int
  groups: int
  groups_per_token: int
  per_group: int

  reads_slots: ClassVar[bool] = False

  def __post_init__(self):
    size = group_size(self.num_experts, self.groups, self.where)
    for name, most in (('groups_per_token', self.groups), ('per_group', size)):
      if not 1 <= getattr(self, name) <= most:
        raise ConfigError(f'{self.where}.{name} must lie between 1 and {most}, for {self.groups} groups of {size} '
                          f'experts; not {getattr(self, name)}.')

  @property
  def k(self) -> int:
    """K."""
    return self.groups_per_token * self.per_group

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> TokenPlan:
    outer, inner = two_levels(scores.select, self.groups)
    group = top_k(outer, self.groups_per_token)
    expert = jnp.take_along_axis(top_k(inner, self.per_group), group[..., None], axis=-2)
    expert = (expert + inner.shape[-1] * group[..., None]).reshape(*valid.shape, -1)
    return token_plan(expert, jnp.broadcast_to(valid[..., None], expert.shape), self.num_experts)


SecondChoice = Literal['all', 'random']


@SELECTIONS('hierarchical_top_2')
@dataclasses.dataclass(frozen=True)
class HierarchicalTop2:
  """Two groups a token; two experts of the first and one of the second: at most three, in this order (`MoE2D`).

  Config:
    groups: N.
    second: 'all', or 'random': the second group, and the second expert of the first, with probability
      min(1, g2 / threshold), where g2 = p2 / (p1 + p2) of their level.
    eval_second: the same at evaluation; its draws are the same at every call.
    threshold: of 'random'.
  """
  where: str
  num_experts: int
  groups: int
  second: SecondChoice = 'random'
  eval_second: SecondChoice = 'random'
  threshold: float = 0.2

  reads_slots: ClassVar[bool] = False

  def __post_init__(self):
    group_size(self.num_experts, self.groups, self.where)

  @property
  def k(self) -> int:
    """K: 3, less where there is no second group, or no second expert in a group."""
    return 1 + (self.groups > 1) + (self.num_experts > self.groups)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> TokenPlan:
    outer, inner = two_levels(scores.select, self.groups)
    size = inner.shape[-1]
    policy = self.second if train else self.eval_second
    if policy == 'random':
      key = required(key, "select 'hierarchical_top_2' with second='random'") if train else jax.random.key(0)

    def best(logits, name):
      # ([..., 2] the two best, whether the second is taken); a level of one has no second.
      two = top_k(logits, min(2, logits.shape[-1]))
      if policy == 'all' or two.shape[-1] < 2:
        return two, jnp.ones(valid.shape, bool)
      share = jax.nn.softmax(jnp.take_along_axis(logits, two, axis=-1), axis=-1)[..., 1]
      return two, jax.random.uniform(jax.random.fold_in(key, name), valid.shape) * self.threshold < share

    group, second_group = best(outer, 0)
    of_group = lambda i: jnp.take_along_axis(inner, group[..., i, None, None], axis=-2)[..., 0, :]
    inside, second_inside = best(of_group(0), 1)
    expert, routed = [inside[..., 0] + size * group[..., 0]], [valid]
    if size > 1:
      expert, routed = [*expert, inside[..., 1] + size * group[..., 0]], [*routed, valid & second_inside]
    if self.groups > 1:
      expert = [*expert, jnp.argmax(of_group(1), axis=-1) + size * group[..., 1]]
      routed = [*routed, valid & second_group]
    return token_plan(jnp.stack(expert, axis=-1), jnp.stack(routed, axis=-1), self.num_experts)


def token_plan(expert: jax.Array, routed: jax.Array, num_experts: int) -> TokenPlan:
  """A dropless plan with weights of one; expert <int>[G,S,K], routed <bool>[G,S,K]."""
  return TokenPlan(expert=expert.astype(jnp.int32), weight=jnp.ones(expert.shape, jnp.float32), kept=routed,
                   num_experts=num_experts)


def hierarchical_weights(expert: jax.Array, logits: jax.Array, groups: int) -> jax.Array:
  """`G_i * G_ij`: softmax over the groups that are named, times that over the named experts of the group (equation 12).

  Args:
    expert: <int32>[G,S,K], no expert twice.
    logits: <float32>[G,S,E] of both levels together.
    groups: N.

  Returns:
    <float32>[G,S,K] summing to 1 over K.
  """
  outer, _ = two_levels(logits, groups)
  group = expert // (logits.shape[-1] // groups)
  pick = lambda values, index: jnp.sum(jnp.where(index[..., None] == jnp.arange(values.shape[-1]), values[:, :, None], 0),
                                       axis=-1)
  same = group[..., :, None] == group[..., None, :]
  of_expert = jax.nn.softmax(pick(logits, expert)[..., None, :], axis=-1, where=same)
  # A group is named as often as it has choices, and counts once.
  of_group = jax.nn.softmax(pick(outer, group) - jnp.log(same.sum(-1)), axis=-1) * same.sum(-1)
  return of_group * jnp.diagonal(of_expert, axis1=-2, axis2=-1)


@WEIGHTINGS('hierarchical')
@dataclasses.dataclass(frozen=True)
class HierarchicalWeights:
  """See `hierarchical_weights`; what is not drawn, or dropped, keeps its share. `groups`: N."""
  groups: int

  def gates(self, logits: jax.Array) -> jax.Array:
    return softmax_over_experts(logits)

  def weigh(self, plan: TokenPlan, logits: jax.Array) -> TokenPlan:
    return plan.scale(hierarchical_weights(plan.expert, logits, self.groups))

  def after_drops(self, plan: Plan) -> Plan:
    return plan


@PLACEMENTS('two_level_capacity')
@dataclasses.dataclass(frozen=True)
class TwoLevelCapacity:
  """Slots of groups, and of the experts among those who have a slot of their group (`MoE2D`).

  A group has max(min(S, int(S * factor / N)), 4) slots, first choices of a group first; its experts share these, T,
  with a capacity factor of their own: max(min(T, int(T * factor / M)), 4) each.

  Config:
    groups: N.
    capacity_factor, eval_capacity_factor: of groups.
    second_level_factor: of the experts of a group.
  """
  where: str
  num_experts: int
  groups: int
  capacity_factor: float = 1.25
  eval_capacity_factor: float = 2.
  second_level_factor: float = 1.

  def leak(self, train: bool) -> Leak:
    return 'slots'

  def slots(self, tokens: int, train: bool) -> tuple[int, int]:
    """(of a group, of an expert) for routing groups of `tokens`."""
    name = 'capacity_factor' if train else 'eval_capacity_factor'
    factor, second = getattr(self, name), self.second_level_factor
    of_group = checked_slots(capacity(tokens, self.groups, 2, factor, 'mesh_tensorflow'), tokens, factor,
                             f'{self.where}.{name}')
    size = group_size(self.num_experts, self.groups, self.where)
    of_expert = capacity(of_group, size, 2, second, 'mesh_tensorflow')
    return of_group, checked_slots(of_expert, of_group, second, f'{self.where}.second_level_factor')

  def __call__(self, plan: TokenPlan, gates: jax.Array, *, key: jax.Array | None, train: bool) -> TokenPlan:
    of_group, of_expert = self.slots(plan.expert.shape[1], train)
    group = plan.expert // (self.num_experts // self.groups)
    # The first choice stands for its group, so does the last where that is another group.
    ends = jnp.stack([group[..., 0], group[..., -1]], axis=-1)
    apart = jnp.stack([plan.kept[..., 0], plan.kept[..., -1] & (ends[..., 0] != ends[..., 1])], axis=-1)
    has_slot = apart & (slots_in_order(ends, apart, self.groups) < of_group)
    kept = plan.kept & jnp.where(group == ends[..., :1], has_slot[..., :1], has_slot[..., 1:])
    # The slots of a group hold first choices and then second ones, each in order of tokens: so do the choices of a plan.
    slot = slots_in_order(plan.expert, kept, self.num_experts)
    return dataclasses.replace(plan, kept=kept & (slot < of_expert), slot=slot, capacity=of_expert)


@BALANCERS('hierarchical_load')
class HierarchicalLoad(Balancer):
  """CV^2 over experts of `Load_i * Load_i(X_i)_j / |X_i|` (equation 14), X_i the tokens that choose group i.

  Both loads are sums of `prob_in_top_k`, without noise the counts. Config besides the coefficient, as in the selection:
    groups_per_token: K of the primary gate.
    per_group: K of the others.
  """

  def __init__(self, *, where: str, k: int | None, noisy: bool, coefficient: float, groups_per_token: int,
               per_group: int):
    check_noise(noisy, k, where)
    if groups_per_token * per_group != k:
      raise ConfigError(f'{where}: {groups_per_token} groups_per_token with {per_group} per_group are not the {k} choices '
                        'of the selection. Give both the same numbers.')
    self.coefficient, self.groups_per_token, self.per_group = coefficient, groups_per_token, per_group

  def loss(self, routed: Routed) -> jax.Array:
    e = routed.scores.extras
    outer = over_tokens(prob_in_top_k(e['outer'], e['outer_clean'], e.get('outer_std'), self.groups_per_token),
                        routed.valid)
    visits = chosen(e['outer'], self.groups_per_token).astype(jnp.float32)
    inner = prob_in_top_k(e['inner'], e['inner_clean'], e.get('inner_std'), self.per_group)
    inner = over_tokens(visits[..., None] * inner, routed.valid)
    count = jnp.maximum(over_tokens(visits, routed.valid), 1)
    load = (outer / count)[..., None] * inner
    return imbalance(load.reshape(len(load), -1), routed.valid)


@BALANCERS('hierarchical_switch')
class HierarchicalSwitch(Balancer):
  """The balance loss over groups, plus the mean over groups of that over their experts (`MoE2D`): 2 at uniform routing.

  The second is of the tokens whose first choice is the group. In the code that it is of, its means are over the group's
  slots, whether filled by such tokens, by others or not at all, which makes it smaller.
  """

  def __init__(self, *, coefficient: float):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> jax.Array:
    outer, inner = routed.scores.extras['outer'], routed.scores.extras['inner']
    first = outer.argmax(-1)
    over_groups = _first_choices_loss(outer, routed.valid)
    of_groups = jax.vmap(lambda i, logits: _first_choices_loss(logits, routed.valid & (first == i)), in_axes=(0, 2))
    return over_groups + of_groups(jnp.arange(outer.shape[-1]), inner).mean()


def _first_choices_loss(logits, valid):
  return switch_loss(jax.nn.softmax(logits, axis=-1), top_k(logits, 1), valid[..., None], valid, 'gshard')
