"""Balanced assignment: all tokens are assigned jointly, one expert each, and no expert exceeds its equal share.

`auction` is the balanced assignment of BASE layers; `within_shares` is the reassignment that FastMoE calls SWIPE. Both
are used without gradients and ignore padding.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from moejax.routing.place.queues import slots_in_order
from moejax.routing.plans import Leak, TokenPlan, token_plan
from moejax.routing.stages import Selection


def within_shares(expert: Int[Array, 'G S'], routed: Bool[Array, 'G S'], slots: Int[Array, 'G E']) -> Int[Array, 'G S']:
  """Every expert keeps the first tokens that claim it; the others, in order, fill the free slots, lowest expert first.

  One step of SWIPE (`swipe_once` in FastMoE), with the tokens and experts of all workers in one group.

  Args:
    expert: <int32>[G,S] the expert a token claims; E claims none.
    routed: <bool>[G,S]; other tokens take no slot.
    slots: <int32>[G,E] slots of every expert, in total at least the number of routed tokens.

  Returns:
    <int32>[G,S] below E; undefined where not routed.
  """
  num_experts = slots.shape[-1]
  claims = (expert[..., None] == jnp.arange(num_experts)) & routed[..., None]
  earlier = slots_in_order(expert[..., None], routed[..., None], num_experts)
  kept = claims & (earlier < slots[:, None])
  moved = routed & ~kept.any(-1)
  # The n-th moved token goes to the first expert up to which there are more than n free slots.
  free = jnp.cumsum(slots - kept.sum(1), axis=-1)
  nth = jnp.cumsum(moved, axis=1) - 1
  target = jnp.sum(nth[..., None] >= free[:, None], axis=-1)
  return jnp.where(moved, target, expert).astype(jnp.int32)


def auction(scores: Float32[Array, 'S E'], valid: Bool[Array, 'S'], rounds: int = 100,
            last_round: int = 1000) -> Int[Array, 'S']:
  """Assigns tokens to experts by auction: each expert gets its share and the total score is close to the maximum.

  The auction of fairseq's `balanced_assignment` (BASE layers, section 3.1, after Bertsekas). In every round each expert
  bids for the c tokens of highest value to it: the margin over the next token plus eps = max(spread / 50, 1e-4). The
  highest bidder holds the token, and its cost rises by that bid for all others. Experts bid only eps for tokens they
  hold. The auction ends when every token has a bid, usually within eps per token of the optimum; this is not a theorem
  for this variant, and many equal scores can cost a few eps. After `rounds` rounds holders lose that privilege, so
  that the auction ends soon, farther from the optimum.

  Here c = ceil(n/E) for n valid tokens. Where E does not divide n, dummy tokens of low value fill up the shares, so
  some experts get fewer real tokens. Scores that are not finite count as the smallest finite one.

  Args:
    scores: <float32>[S,E].
    valid: <bool>[S]; other tokens do not take part.
    rounds: rounds in which holders bid only eps.
    last_round: after it, tokens still without a bid fill the free slots in order. We know of no auction that reaches
      it, but a loop on a pod must be bounded.

  Returns:
    <int32>[S] at most ceil(n/E) valid tokens per expert; undefined where not valid.
  """
  tokens, num_experts = scores.shape
  count = valid.sum()
  share = (count + num_experts - 1) // num_experts
  usable = valid[:, None] & jnp.isfinite(scores)
  lowest = jnp.min(jnp.where(usable, scores, jnp.inf))
  highest = jnp.max(jnp.where(usable, scores, -jnp.inf))
  # Shifted to a maximum of 0: prices rise by small fractions of the spread, which a large offset would round away.
  worth = jnp.where(usable, scores, lowest) - highest
  worth = jnp.where(usable.any(), worth, 0.)
  spread = jnp.where(usable.any(), highest - lowest, 0.)
  eps = jnp.maximum(spread / 50, 1e-4)
  # Up to E-1 dummy tokens, and one that is never active, so that an expert that takes everything has a next-best token.
  worth = jnp.pad(worth.T, ((0, 0), (0, num_experts)), constant_values=-spread / 2)
  active = jnp.concatenate([valid, jnp.arange(num_experts) < num_experts * share - count])
  experts = jnp.arange(num_experts)[:, None]
  most = -(-tokens // num_experts)

  def play(state):
    turn, value, cost, holder, _ = state
    order = jnp.argsort(-value, axis=1, stable=True)[:, :most + 1]
    best = jnp.take_along_axis(value, order, axis=1)
    following = jnp.take(best, share, axis=1)[:, None]
    margin = jnp.where(jnp.isfinite(following), best - following, 0.)
    offer = jnp.where(jnp.arange(most + 1) < share, margin + eps, 0.)
    bids = jnp.zeros_like(value).at[experts, order].set(offer)
    insists = (turn > 0) & (turn < rounds)
    bids = jnp.where(insists & (holder == experts), eps, bids)
    price, has_bid = bids.max(0), bids.max(0) > 0
    holder = jnp.where(has_bid, jnp.argmax(bids, axis=0), num_experts)
    cost = cost + price
    value = jnp.where(holder == experts, jnp.where(turn < rounds, 0., worth), worth - cost)
    return turn + 1, jnp.where(active, value, -jnp.inf), cost, holder, jnp.all(has_bid | ~active)

  start = (0, jnp.where(active, worth, -jnp.inf), jnp.zeros(len(active)), jnp.full(len(active), num_experts), False)
  *_, holder, _ = jax.lax.while_loop(lambda state: ~state[-1] & (state[0] < last_round), play, start)
  shares = jnp.broadcast_to(share, (1, num_experts))
  return within_shares(holder[None, :tokens], valid[None], shares)[0]


@dataclasses.dataclass(frozen=True)
class TrainedTogether(Selection):
  """Base class of selections that assign tokens jointly in training, and by token choice at evaluation.

  Training therefore depends on later tokens and evaluation does not; a decoder allows that by `routing_leak='train'`.
  """
  num_experts: int

  def leak(self, train: bool) -> Leak:
    return 'future' if train else 'causal'

  def plan(self, expert: Int[Array, 'G S K'], valid: Bool[Array, 'G S']) -> TokenPlan:
    """A plan with all weights one. `expert`: <int32>[G,S,K]."""
    return token_plan(expert, valid[..., None], self.num_experts)
