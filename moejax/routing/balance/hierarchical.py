"""Losses of two levels of gates; see `score.hierarchical`."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax.config import ConfigError
from moejax.ranges import Count, NonNegative
from moejax.routing.balance.imbalance import imbalance
from moejax.routing.balance.load import chosen, prob_in_top_k
from moejax.routing.balance.requirements import choosing_by_noise
from moejax.routing.balance.switch import switch_loss
from moejax.routing.score.hierarchical import Hierarchical
from moejax.routing.select.top_k import top_k
from moejax.routing.stages import BALANCERS, Balancer, Routed
from moejax.routing.valid_tokens import over_tokens


@BALANCERS('hierarchical_load')
class HierarchicalLoad(Balancer):
  """CV^2 over experts of `Load_i * Load_i(X_i)_j / |X_i|` (equation 14), where X_i are the tokens that choose group i.

  Both loads are sums of `prob_in_top_k`; without noise, counts. Config besides the coefficient, as in the selection:
    groups_per_token: K of the primary gate.
    per_group: K of the secondary gates.
  """

  reads = Hierarchical.gives

  def __init__(self, *, k: int | None, noisy: bool, coefficient: NonNegative, groups_per_token: Count,
               per_group: Count):
    choosing_by_noise(noisy, k)
    if groups_per_token * per_group != k:
      raise ConfigError(f': groups_per_token = {groups_per_token} times per_group = {per_group} is not the '
                        f"selection's k = {k}. Set both as in the selection.")
    self.coefficient, self.groups_per_token, self.per_group = coefficient, groups_per_token, per_group

  def loss(self, routed: Routed) -> Float32[Array, '']:
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
  """The balance loss over groups, plus the mean of the balance losses within groups (`MoE2D`): 2 at uniform routing.

  A group's loss is over the tokens whose first choice is the group. The published code averages over all slots of the
  group, including empty ones and other tokens' slots, which makes it smaller.
  """

  reads = ('outer', 'inner')

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    outer, inner = routed.scores.extras['outer'], routed.scores.extras['inner']
    first = outer.argmax(-1)
    over_groups = _first_choices_loss(outer, routed.valid)
    of_groups = jax.vmap(lambda i, logits: _first_choices_loss(logits, routed.valid & (first == i)), in_axes=(0, 2))
    return over_groups + of_groups(jnp.arange(outer.shape[-1]), inner).mean()


def _first_choices_loss(logits, valid):
  return switch_loss(jax.nn.softmax(logits, axis=-1), top_k(logits, 1), valid[..., None], valid, 'gshard')
