"""Plans: conversions lose nothing, and pick, scale and shares agree with the plan's entries."""
import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing.place import queues
from moejax.routing.plans import DensePlan, SlotPlan, SoftPlan, TokenPlan, most_leaking
import routing_reference as reference

G, S, K, E, C = 2, 6, 2, 3, 2


@jax.jit
def placed_plan(expert, weight, routed):
  slot = queues.slots_in_order(expert, routed, E)
  return TokenPlan(expert=expert, weight=weight, kept=routed & (slot < C), slot=slot, num_experts=E, capacity=C)


@jax.jit
def conversions(plan):
  slots = plan.to_slots()
  return slots, slots.to_soft(), slots.to_dense(), plan.to_dense(), plan.shares(), slots.shares()


@st.composite
def token_plans(draw):
  numbers = np.random.default_rng(draw(st.integers(0, 2**31)))
  expert = np.argsort(numbers.random((G, S, E)))[..., :K].astype(np.int32)
  return placed_plan(expert, numbers.random((G, S, K), np.float32), numbers.random((G, S, K)) < 0.8)


@given(token_plans())
def test_slots_soft_and_dense_forms_of_a_token_plan_mean_the_same(plan):
  slots, soft, slots_dense, dense, shares, slots_shares = conversions(plan)
  expected = reference.dense_weights(plan)
  # Equal numbers are only moved, never added (no token names an expert twice).
  np.testing.assert_array_equal(dense.weight, expected.astype(np.float32))
  np.testing.assert_array_equal(slots_dense.weight, dense.weight)
  np.testing.assert_array_equal(soft.combine.sum(-1), dense.weight)
  np.testing.assert_array_equal(soft.dispatch.sum(-1), shares)
  np.testing.assert_array_equal(slots_shares, shares)
  assert slots.filled.sum() == plan.kept.sum()
  np.testing.assert_array_equal(soft.dispatch.sum(1), slots.filled)


def test_an_empty_slot_has_no_weight():
  plan = SlotPlan(token=jnp.zeros((1, 1, 2), jnp.int32), weight=jnp.array([[[3., 5.]]]),
                  filled=jnp.array([[[True, False]]]), num_tokens=2)
  np.testing.assert_array_equal(plan.to_dense().weight, [[[3.], [0.]]])
  np.testing.assert_array_equal(plan.to_soft().combine, [[[[3., 0.]], [[0., 0.]]]])


def test_a_token_that_names_an_expert_twice_gets_the_sum():
  plan = TokenPlan(expert=jnp.array([[[1, 1]]]), weight=jnp.array([[[.25, .5]]]), kept=jnp.ones((1, 1, 2), bool),
                   num_experts=2)
  np.testing.assert_array_equal(plan.to_dense().weight, [[[0., .75]]])
  np.testing.assert_array_equal(plan.shares(), [[[0., 2.]]])


def test_pick_finds_the_value_of_every_entry():
  values = jnp.arange(2 * 3, dtype=jnp.float32).reshape(1, 2, 3)  # token 0: 0 1 2, token 1: 3 4 5
  tokens = TokenPlan(expert=jnp.array([[[2, 0], [1, 2]]]), weight=jnp.ones((1, 2, 2)), kept=jnp.ones((1, 2, 2), bool),
                     num_experts=3)
  np.testing.assert_array_equal(tokens.pick(values), [[[2, 0], [4, 5]]])
  slots = SlotPlan(token=jnp.array([[[1], [0], [1]]]), weight=jnp.ones((1, 3, 1)), filled=jnp.ones((1, 3, 1), bool),
                   num_tokens=2)
  np.testing.assert_array_equal(slots.pick(values), [[[3], [1], [5]]])
  np.testing.assert_array_equal(DensePlan(jnp.ones((1, 2, 3))).pick(values), values)


def test_pick_ignores_infinite_values_of_experts_that_were_not_chosen():
  plan = TokenPlan(expert=jnp.array([[[1]]]), weight=jnp.ones((1, 1, 1)), kept=jnp.ones((1, 1, 1), bool), num_experts=3)
  np.testing.assert_array_equal(plan.pick(jnp.array([[[-jnp.inf, 7., jnp.nan]]])), [[[7.]]])


def test_scale_multiplies_the_weights_of_every_plan():
  soft = SoftPlan(dispatch=jnp.ones((1, 1, 1, 1)), combine=jnp.full((1, 1, 1, 1), .5))
  np.testing.assert_array_equal(soft.scale(jnp.full((1, 1, 1, 1), .5)).shares(), [[[.25]]])
  np.testing.assert_array_equal(soft.scale(jnp.full((1, 1, 1, 1), .5)).dispatch, soft.dispatch)
  np.testing.assert_array_equal(DensePlan(jnp.full((1, 1, 2), 2.)).scale(jnp.array([[[3., 0.]]])).weight, [[[6., 0.]]])


def test_a_dropless_plan_has_no_slot_form():
  plan = TokenPlan(expert=jnp.zeros((1, 2, 1), jnp.int32), weight=jnp.ones((1, 2, 1)), kept=jnp.ones((1, 2, 1), bool),
                   num_experts=1)
  with pytest.raises(ValueError, match='place.capacity_factor'):
    plan.to_slots()


def test_plans_are_pytrees_whose_sizes_and_leak_are_static():
  plan = TokenPlan(expert=jnp.zeros((1, 2, 1), jnp.int32), weight=jnp.ones((1, 2, 1)), kept=jnp.ones((1, 2, 1), bool),
                   num_experts=5, leak='slots')
  out = jax.jit(lambda plan: dataclasses.replace(plan, weight=plan.weight * 2))(plan)
  assert (out.num_experts, out.capacity, out.leak) == (5, None, 'slots')
  assert len(jax.tree.leaves(plan)) == 3


def test_the_worst_part_decides_what_a_router_leaks():
  assert most_leaking('causal', 'slots') == 'slots'
  assert most_leaking('future', 'slots') == 'future'
  assert most_leaking('causal') == 'causal'
