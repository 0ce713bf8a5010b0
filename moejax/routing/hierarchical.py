"""Two levels of gates: a primary gate chooses groups of experts, and a gate in each group chooses among its experts.

Experts `i*M .. i*M + M-1` are group i. The logit of expert j in group i is `o_i + log softmax(h_i)_j`, so that the
logsumexp of a group is the primary logit o_i, and selection and weighting need only the logits.

Shazeer et al. 2017 (arXiv 1701.06538), appendix B. `moe_2d` has the stages of Mesh TensorFlow's later layer.
"""
import dataclasses
from typing import Annotated, ClassVar, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from moejax import functional
from moejax.config import ConfigError
from moejax.ranges import Count, Divides, NonNegative
from moejax.routing.balancing import BALANCERS, Balancer, Routed
from moejax.routing.noisy import check_noise, chosen, imbalance, learned_noise_std, over_tokens, prob_in_top_k
from moejax.routing.plans import Leak, TokenPlan, token_plan
from moejax.routing.scores import SCORES, Score, Scores, required, vectors
from moejax.routing.selection import SELECTIONS, top_k
from moejax.routing.weighting import WEIGHTINGS, Weighting


# Number of equally large groups of experts.
Groups = Annotated[Count, Divides('num_experts')]


def joint_logits(outer: jax.Array, inner: jax.Array) -> jax.Array:
  """<float32>[..., N] of the primary gate, [..., N, M] of the secondary gates -> [..., N*M]."""
  joint = outer[..., None] + jax.nn.log_softmax(inner, axis=-1)
  return joint.reshape(*outer.shape[:-1], -1)


def two_levels(logits: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """The inverse of `joint_logits`: (outer [..., N], inner [..., N, M] up to a constant per group)."""
  inner = logits.reshape(*logits.shape[:-1], groups, -1)
  return jax.nn.logsumexp(inner, axis=-1), inner


@SCORES('hierarchical')
class Hierarchical(Score):
  """A linear gate over groups and one in each group.

  Config:
    groups: N.
    noise: 'learned' (`noisy.NoisyLinear`) in training at both levels, or 'none'.
    init_std: initial standard deviation of all kernels.
    noise_floor: minimum standard deviation of the noise.
  """

  gives = ('outer', 'outer_clean', 'inner', 'inner_clean')

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs, groups: Groups,
               noise: Literal['learned', 'none'] = 'learned', init_std: NonNegative = 0.,
               noise_floor: NonNegative = 1e-2):
    dim, size = vectors(dim, where), num_experts // groups
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
  """Each token chooses its best `groups_per_token` groups, and the best `per_group` experts in each.

  Config:
    groups: N, a divisor of the number of experts.
    groups_per_token: number of groups a token chooses.
    per_group: number of experts it chooses in each.
  """
  where: str
  num_experts: int
  groups: Groups
  groups_per_token: Count
  per_group: Count

  reads_slots: ClassVar[bool] = False

  def __post_init__(self):
    size = self.num_experts // self.groups
    for name, most in (('groups_per_token', self.groups), ('per_group', size)):
      if getattr(self, name) > most:
        raise ConfigError(f'{self.where}.{name} must be between 1 and {most}, for {self.groups} groups of {size} '
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
    return token_plan(expert, valid[..., None], self.num_experts)


def hierarchical_weights(expert: jax.Array, logits: jax.Array, groups: int) -> jax.Array:
  """`G_i * G_ij`: softmax over the chosen groups, times softmax over the chosen experts of the group (equation 12).

  Args:
    expert: <int32>[G,S,K], all different.
    logits: <float32>[G,S,E], see `joint_logits`.
    groups: N.

  Returns:
    <float32>[G,S,K] summing to 1 over K.
  """
  outer, _ = two_levels(logits, groups)
  group = expert // (logits.shape[-1] // groups)
  def pick(values, index):
    return jnp.sum(jnp.where(index[..., None] == jnp.arange(values.shape[-1]), values[:, :, None], 0), axis=-1)
  same = group[..., :, None] == group[..., None, :]
  of_expert = jax.nn.softmax(pick(logits, expert)[..., None, :], axis=-1, where=same)
  # A group occurs once per choice in it, but counts once.
  of_group = jax.nn.softmax(pick(outer, group) - jnp.log(same.sum(-1)), axis=-1) * same.sum(-1)
  return of_group * jnp.diagonal(of_expert, axis1=-2, axis2=-1)


@WEIGHTINGS('hierarchical')
@dataclasses.dataclass(frozen=True)
class HierarchicalWeights(Weighting):
  """See `hierarchical_weights`; the share of choices not sampled or dropped is lost.

  Config:
    groups: N, a divisor of the number of experts, as in the score.
  """
  where: str
  k: int | None
  num_experts: int
  groups: Groups

  def __post_init__(self):
    if self.k is None:
      raise ConfigError(f"{self.where}: weigh 'hierarchical' requires token choice, but this selection is not token "
                        "choice. Use weigh=dict(name='softmax').")

  def weigh(self, plan: TokenPlan, logits: jax.Array) -> TokenPlan:
    return plan.scale(hierarchical_weights(plan.expert, logits, self.groups))

  @property
  def always_one(self) -> bool:
    return self.k == 1


@BALANCERS('hierarchical_load')
class HierarchicalLoad(Balancer):
  """CV^2 over experts of `Load_i * Load_i(X_i)_j / |X_i|` (equation 14), where X_i are the tokens that choose group i.

  Both loads are sums of `prob_in_top_k`; without noise, counts. Config besides the coefficient, as in the selection:
    groups_per_token: K of the primary gate.
    per_group: K of the secondary gates.
  """

  reads = Hierarchical.gives

  def __init__(self, *, where: str, k: int | None, noisy: bool, coefficient: NonNegative, groups_per_token: Count,
               per_group: Count):
    check_noise(noisy, k, where)
    if groups_per_token * per_group != k:
      raise ConfigError(f'{where}: groups_per_token = {groups_per_token} times per_group = {per_group} is not the '
                        f"selection's k = {k}. Set both as in the selection.")
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
