"""Hierarchical gates against loops over tokens, and against flat gates for one group or groups of one expert."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import routing_reference as reference
from moejax.config import ConfigError
from moejax.random import derive
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.place.two_levels import TwoLevelCapacity
from moejax.routing.plans import TokenPlan
from moejax.routing.score.hierarchical import joint_logits, two_levels
from moejax.routing.select.hierarchical import HierarchicalTop2
from moejax.routing.stages import Routed, noiseless
from moejax.routing.weigh.hierarchical import hierarchical_weights

G, S, D, N, M = 1, 10, 5, 3, 4
E = N * M
X = np.random.default_rng(1).normal(size=(G, S, D)).astype(np.float32)


def build(fragment, num_experts=E):
  module = router.build(fragment, 'config.router', dim=D, num_experts=num_experts, rngs=nnx.Rngs(0))
  generator = np.random.default_rng(0)
  for _, variable in nnx.to_flat_state(nnx.state(module.score, nnx.Param)):
    variable[...] = jnp.asarray(generator.normal(size=variable.shape), jnp.float32)
  return module


NOISY = dict(groups=N, groups_per_token=2, per_group=2)


def levels(scores, *names):
  return [np.asarray(scores.extras[name], np.float64)[0] for name in names]


def test_the_sum_of_a_group_is_the_primary_gate():
  generator = np.random.default_rng(2)
  outer, inner = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((S, N), (S, N, M)))
  again, inside = two_levels(joint_logits(outer, inner), N)
  np.testing.assert_allclose(again, outer, atol=1e-6)
  np.testing.assert_allclose(jax.nn.softmax(inside, axis=-1), jax.nn.softmax(inner, axis=-1), atol=1e-6)


def test_weights_and_losses_equal_a_loop_over_tokens_in_float64():
  """Equations 12 to 14: weights G_i G_ij, importance their sum, load the product of the loads of both levels."""
  module, key = build(papers.hierarchical(**NOISY)), jax.random.key(3)
  out = reference.run(module, X, RouterInputs(), key=key, train=True)
  scores = reference.run(module.score, X, key=derive(key, 'score'), train=True)  # what the router drew
  outer, outer_clean, outer_std = levels(scores, 'outer', 'outer_clean', 'outer_std')
  inner, inner_clean, inner_std = levels(scores, 'inner', 'inner_clean', 'inner_std')

  def probs(noisy, clean, std, k):
    best = np.argsort(-noisy)
    thresholds = [noisy[best[k] if e in best[:k] else best[k - 1]] for e in range(len(noisy))]
    return best[:k], stats.norm.cdf((clean - np.array(thresholds)) / std)

  weight, load, visits, loads = np.zeros((S, N, M)), np.zeros(N), np.zeros(N), np.zeros((N, M))
  for t in range(S):
    groups, p = probs(outer[t], outer_clean[t], outer_std[t], 2)
    load += p
    for i, share in zip(groups, reference.softmax(outer[t, groups])):
      experts, p = probs(inner[t, i], inner_clean[t, i], inner_std[t, i], 2)
      weight[t, i, experts] = share * reference.softmax(inner[t, i, experts])
      loads[i] += p
      visits[i] += 1
  np.testing.assert_allclose(out.plan.to_dense().weight[0], weight.reshape(S, E), atol=1e-6)
  np.testing.assert_allclose(out.plan.weight.sum(-1), 1, atol=1e-6)
  loads *= (load / np.maximum(visits, 1))[:, None]
  variation = lambda amounts: amounts.var() / amounts.mean()**2
  # float32 sums and a float32 error function.
  assert float(out.losses['gate_importance']) == pytest.approx(0.1 * variation(weight.sum(0).ravel()), rel=1e-4)
  assert float(out.losses['hierarchical_load']) == pytest.approx(0.1 * variation(loads.ravel()), rel=1e-4)


def test_with_one_group_it_is_the_flat_gate():
  module = build(papers.hierarchical(groups=1, groups_per_token=1, per_group=2))
  plan = reference.run(module, X, RouterInputs(), train=False).plan
  logits = X[0] @ np.asarray(module.score.inner[...])[:, 0]
  for t in range(S):
    best = np.argsort(-logits[t])[:2]
    np.testing.assert_array_equal(plan.expert[0, t], best)
    np.testing.assert_allclose(plan.weight[0, t], reference.softmax(logits[t, best]), atol=1e-6)


def moe_2d(**options):
  return papers.moe_2d(**(dict(groups=N, second='all', eval_second='all') | options))


def loop_of_moe_2d(outer, inner, of_group, of_expert):
  """`MoE2D` with all second choices, slot by slot; {(token, expert): weight}."""
  groups, queue, dense = np.argsort(-outer, axis=1)[:, :2], [[] for _ in range(N)], {}
  for rank, t in [(rank, t) for rank in (0, 1) for t in range(S)]:
    if len(queue[groups[t, rank]]) < of_group:
      queue[groups[t, rank]].append((t, rank))
  for i, slots in enumerate(queue):
    filled, entries = np.zeros(M, int), []
    for t, rank in slots:
      share = reference.softmax(outer[t, groups[t]])[rank]
      best = np.argsort(-inner[t, i])[:2 if rank == 0 else 1]  # importance 1: two experts; 0.5: one, as a second choice
      for choice, (e, gate) in enumerate(zip(best, reference.softmax(inner[t, i, best]))):
        entries.append((choice if rank == 0 else 1, t, e, share * gate))
    for _, t, e, weight in sorted(entries, key=lambda entry: entry[0]):  # stable: first choices, then by slot
      if filled[e] < of_expert:
        dense[t, i * M + e] = weight
      filled[e] += 1
  return dense


@pytest.mark.parametrize('capacity_factor, second_level_factor, slots', [(9., 9., (10, 10)), (1.25, 1., (4, 4)),
                                                                         (1.8, 4., (6, 6))])
def test_moe_2d_is_a_loop_over_slots(capacity_factor, second_level_factor, slots):
  module = build(moe_2d(capacity_factor=capacity_factor, second_level_factor=second_level_factor))
  # max(min(10, int(10 * factor / 3)), 4) of a group, and max(min(T, int(T * second / 4)), 4) of an expert.
  assert module.place.slots(S, True) == slots
  plan = reference.run(module, X, RouterInputs(), key=jax.random.key(0), train=True).plan
  outer, inner = levels(reference.run(module.score, X, key=None, train=False), 'outer', 'inner')
  expected = np.zeros((S, E))
  for entry, weight in loop_of_moe_2d(outer, inner, *slots).items():
    expected[entry] = weight
  np.testing.assert_allclose(plan.to_dense().weight[0], expected, atol=1e-6)
  assert plan.capacity == slots[1]


def test_moe_2d_with_one_expert_a_group_is_the_flat_top_2():
  module = build(moe_2d(capacity_factor=1.), num_experts=N)
  flat = build(papers.gshard(second='all') | dict(place=dict(name='capacity', capacity_factor=1.,
                                                            convention='mesh_tensorflow')), num_experts=N)
  flat.score.kernel[...] = module.score.outer[...]
  ours, theirs = (reference.run(m, X, RouterInputs(), key=jax.random.key(0), train=True).plan for m in (module, flat))
  for name in ('expert', 'kept'):
    np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
  np.testing.assert_array_equal(np.where(ours.kept, ours.slot, 0), np.where(theirs.kept, theirs.slot, 0))
  np.testing.assert_allclose(ours.weight, theirs.weight, atol=1e-6)
  assert not ours.kept.all()


def test_second_choices_are_drawn_at_both_levels_and_weights_do_not_know():
  """p2 / (p1 + p2) = 0.1 at both levels and a threshold of 0.2: each is taken half of the time."""
  low = np.log(1 / 9)
  logits = joint_logits(jnp.broadcast_to(jnp.asarray([0, low, -9.]), (1, 4000, 3)),
                                     jnp.broadcast_to(jnp.asarray([[0, low, -9., -9.]] * 3), (1, 4000, 3, 4)))
  select = HierarchicalTop2(num_experts=E, groups=N)
  plan = select(noiseless(logits), jnp.ones((1, 4000), bool), key=jax.random.key(0), train=True)
  np.testing.assert_array_equal(plan.expert[0, 0], [0, 1, 4])
  kept = np.asarray(plan.kept[0])
  # 4,000 draws of one half: a standard error of 0.008.
  np.testing.assert_allclose(kept.mean(0), [1, .5, .5], atol=0.033)
  assert np.corrcoef(kept[:, 1], kept[:, 2])[0, 1] == pytest.approx(0, abs=0.065)
  np.testing.assert_allclose(hierarchical_weights(plan.expert, logits, N)[0, 0], [.81, .09, .1], rtol=1e-4)


def test_the_balance_loss_of_two_levels_is_two_at_uniform_routing_and_large_where_all_choose_one():
  module = build(moe_2d())
  loss = module.balance['hierarchical_switch']
  outer, inner = np.zeros((1, N * M, N)), np.zeros((1, N * M, N, M))
  for t in range(N * M):  # every expert is the first choice of one token, by a hair
    outer[0, t, t // M], inner[0, t, t // M, t % M] = 1e-4, 1e-4
  def routed(outer, inner):
    extras = dict(outer=jnp.asarray(outer, jnp.float32), inner=jnp.asarray(inner, jnp.float32))
    scores = dataclasses.replace(noiseless(jnp.zeros((1, 1, E))), extras=extras)
    return Routed(scores=scores, probs=None, plan=None, valid=jnp.ones((1, N * M), bool))
  assert float(loss.loss(routed(outer, inner))) == pytest.approx(2, abs=1e-3)
  outer[..., 0], inner[..., 0, 0] = 50, 50
  # The groups that nobody chooses cost nothing: M of one group is M / N in the mean over groups.
  assert float(loss.loss(routed(outer, inner))) == pytest.approx(N + M / N, rel=1e-4)


def test_a_second_group_that_does_not_exist_is_not_a_choice():
  place = TwoLevelCapacity(num_experts=4, k=2, groups=2, capacity_factor=9., second_level_factor=9.)
  plan = TokenPlan(expert=jnp.asarray([[[0, 1]] * 5]), weight=jnp.ones((1, 5, 2)), kept=jnp.ones((1, 5, 2), bool),
                   num_experts=4)
  assert place(plan, plan.weight, key=None, train=True).kept.all()


@pytest.mark.parametrize('fragment, message', [
    (papers.hierarchical(groups=5), 'config.router.score.groups must be .* that divides num_experts, not 5'),
    (papers.hierarchical(groups=N, groups_per_token=4), 'select.groups_per_token must be between 1 and 3'),
    (papers.hierarchical(groups=N, per_group=5), 'select.per_group must be between 1 and 4'),
    (papers.hierarchical(**NOISY) | dict(balance=dict(hierarchical_load=dict(
        coefficient=1., groups_per_token=1, per_group=2))), 'is not the selection.s k = 4'),
])
def test_stages_that_do_not_fit_are_refused_before_compilation(fragment, message):
  with pytest.raises(ConfigError, match=message):
    router.build(fragment, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
