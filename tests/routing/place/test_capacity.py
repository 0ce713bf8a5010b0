"""Capacities derived by hand, and slots against queues that are filled token by token in numpy."""
import itertools
import math
import struct

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing.place import conventions, queues
from moejax.routing.plans import TokenPlan
from moejax.routing.stages import PLACEMENTS
import routing_reference as reference

G, S, K, E = 2, 8, 2, 3
KEY = jax.random.key(0)

# (S, E, K, factor): slots by the formula of each codebase.
#   10 tokens, 4 experts, 2 choices, 1.25:
#     equal shares are 10*2*1.25/4 = 6.25 with K, 3.125 without; ceil(10/4) = 3.
#     moejax and deepspeed ceil(6.25) = 7; vmoe up to 8; flaxformer round(3.125) = 3, at least 4; mesh_tensorflow
#     int(3.125) = 3, at least 4; fairseq int(2*1.25*3 = 7.5) = 7; lingvo int(3.125) = 3, up to 4; tutel
#     2*int(3.75) = 6.
#   100 tokens, 8 experts, 1.05: 100*1.05/8 = 13.125, ceil(100/8) = 13, 1.05*13 = 13.65; with K = 2: 26.25 and 27.3.
#   4 tokens, 8 experts, 1: half a slot.
#   fastmoe rounds factor*S up, then shares of it down: 13*2/4 = 6.5, 105/8 = 13.1, 210/8 = 26.25, 4/8, 24/2,
#   84/8 = 10.5; widenet has one slot less than the share rounded down.
#   6 tokens, 2 experts, 4: 12 slots; mesh_tensorflow alone stops at S.
#   84 tokens, 8 experts, 1: 10.5 rounds half to even in Python: 10.
TABLE = {
    (10, 4, 2, 1.25): dict(moejax=7, vmoe=8, flaxformer=4, mesh_tensorflow=4, deepspeed=7, fairseq=7, lingvo=4,
                         tutel=6, fastmoe=6, widenet=5),
    (100, 8, 1, 1.05): dict(moejax=14, vmoe=16, flaxformer=13, mesh_tensorflow=13, deepspeed=14, fairseq=13, lingvo=16,
                            tutel=13, fastmoe=13, widenet=12),
    (100, 8, 2, 1.05): dict(moejax=27, vmoe=28, flaxformer=13, mesh_tensorflow=13, deepspeed=27, fairseq=27, lingvo=16,
                            tutel=26, fastmoe=26, widenet=25),
    (4, 8, 1, 1.): dict(moejax=1, vmoe=4, flaxformer=4, mesh_tensorflow=4, deepspeed=4, fairseq=1, lingvo=0, tutel=1,
                        fastmoe=0, widenet=0),
    (6, 2, 1, 4.): dict(moejax=12, vmoe=12, flaxformer=12, mesh_tensorflow=6, deepspeed=12, fairseq=12, lingvo=12,
                        tutel=12, fastmoe=12, widenet=11),
    (84, 8, 1, 1.): dict(moejax=11, vmoe=12, flaxformer=10, mesh_tensorflow=10, deepspeed=11, fairseq=11, lingvo=12,
                         tutel=11, fastmoe=10, widenet=9),
}


@pytest.mark.parametrize('sizes, convention, slots', [
    (sizes, convention, slots) for sizes, row in TABLE.items() for convention, slots in row.items()])
def test_capacity_equals_the_codebase(sizes, convention, slots):
  assert conventions.capacity(*sizes, convention) == slots


def test_the_same_factor_is_twice_the_capacity_in_vmoe_that_it_is_in_flaxformer_for_two_choices():
  assert conventions.capacity(1024, 8, 2, 1.25, 'vmoe') == 2 * conventions.capacity(1024, 8, 2, 1.25, 'flaxformer')


def test_moejax_capacity_is_exact_where_floats_would_round_up():
  assert 1.1 * 50 / 5 > 11
  assert conventions.capacity(50, 5, 1, 1.1) == 11


def test_fastmoe_s_switch_gate_rounds_up_in_floats():
  assert conventions.capacity(50, 5, 1, 1.1, 'fastmoe_switch') == 12
  assert conventions.capacity(50, 5, 1, 1.2, 'fastmoe_switch') == 12


@pytest.mark.parametrize('sizes, slots', [
    ((25, 2, 1, 1.2), 16),     # 12.5 * 1.20000005 = 15.0000006, and the next float32 above 15 is 15.000001
    ((100, 3, 3, 1.25), 125),  # 33.3333321 * 3.75 = 124.999995
    ((50, 2, 1, 2.2), 55),     # 25 * 2.20000005 = 55.0000012, nearer to 55 than to the next float32
    ((20, 3, 1, 1.05), 7)])    # 6.66666651 * 1.04999995 = 6.9999995
def test_deepspeed_multiplies_in_float32(sizes, slots):
  assert conventions.capacity(*sizes, 'deepspeed') == slots


def test_deepspeed_s_capacity_is_a_float32_product_at_every_size():
  float32 = lambda number: struct.unpack('f', struct.pack('f', number))[0]
  for s, e, k, factor in itertools.product(range(8, 104, 5), (2, 3, 7, 8), (1, 2, 3), (1., 1.05, 1.1, 1.25, 1.3, 2.4)):
    product = float32(float32(s / e) * float32(factor * k))  # 48 bits are exact in float64
    assert conventions.capacity(s, e, k, factor, 'deepspeed') == max(math.ceil(product), 4)


def test_a_minimum_replaces_the_minimum_of_the_convention():
  assert conventions.capacity(4, 8, 1, 1., 'flaxformer', minimum=2) == 2
  assert conventions.capacity(4, 8, 1, 1., 'moejax', minimum=3) == 3


def build(k=K, num_experts=E, **config):
  return PLACEMENTS.build(dict(name='capacity', **config), 'config.place', k=k, num_experts=num_experts)


def test_evaluation_has_a_factor_of_its_own():
  place = build(k=1, capacity_factor=1.25, eval_capacity_factor=2.)
  assert place.slots(12, train=True) == 5   # 12*1.25/3
  assert place.slots(12, train=False) == 8
  assert build(k=1, capacity_factor=1.25).slots(12, train=False) == 5


def test_fairseq_evaluates_with_a_share_of_the_tokens():
  place = build(capacity_factor=1., eval_capacity_factor=0.25, convention='fairseq')
  assert place.slots(30, train=True) == 20   # 2*ceil(30/3)
  assert place.slots(30, train=False) == 8   # ceil(0.25*30)


def test_an_expert_has_no_more_slots_than_the_group_has_tokens():
  assert build(capacity_factor=100.).slots(12, train=True) == 12


@pytest.mark.parametrize('train, key', [(True, 'capacity_factor'), (False, 'eval_capacity_factor')])
def test_a_capacity_that_keeps_nothing_is_refused_by_name(train, key):
  place = build(**{'capacity_factor': 1., 'eval_capacity_factor': 1., key: 0.1}, convention='tutel')
  with pytest.raises(ValueError, match=rf'^\.{key} = 0\.1 drops every token'):
    place.slots(12, train)


def test_capacity_needs_tokens_that_choose():
  with pytest.raises(ConfigError, match=r'config\.place: .*dropless'):
    build(k=None, capacity_factor=1.)


@jax.jit
def all_slots(expert, routed, gates):
  token_priority = gates.max(-1)
  return dict(
      choice=queues.slots_in_order(expert, routed, E, 'choice'),
      token=queues.slots_in_order(expert, routed, E, 'token'),
      batch=queues.slots_by_token_priority(expert, routed, E, token_priority),
      probability=queues.slots_by_choice_priority(expert, routed, E, gates))


@st.composite
def choices(draw):
  numbers = np.random.default_rng(draw(st.integers(0, 2**31)))
  expert = np.argsort(numbers.random((G, S, E)))[..., :K].astype(np.int32)
  routed = numbers.random((G, S, K)) < draw(st.sampled_from([1., .7]))
  gates = -np.sort(-numbers.choice([.1, .2, .4, .6], (G, S, K)).astype(np.float32))  # first choice first, with ties
  return expert, routed, gates


@given(choices(), st.integers(1, S))
def test_every_priority_keeps_what_a_queue_filled_one_by_one_keeps(arrays, capacity):
  expert, routed, gates = arrays
  slots = all_slots(*arrays)
  for g in range(G):
    queues = dict(choice=reference.choice_major(S, K), token=reference.token_major(S, K),
                  batch=reference.batch_prioritized(gates[g]), probability=reference.by_probability(gates[g]))
    for name, queue in queues.items():
      expected = reference.fill_buffers(expert[g], routed[g], E, capacity, queue)
      slot = np.asarray(slots[name][g])
      kept = {(s, k): slot[s, k] for s, k in np.ndindex(S, K) if routed[g, s, k] and slot[s, k] < capacity}
      assert kept == expected, name
      taken = [(expert[g, s, k], where) for (s, k), where in kept.items()]
      assert len(set(taken)) == len(taken)


def plan_of(expert, k=1):
  expert = jnp.asarray(expert, jnp.int32).reshape(1, -1, k)
  return TokenPlan(expert=expert, weight=jnp.ones(expert.shape), kept=jnp.ones(expert.shape, bool), num_experts=E)


def kept(plan, gates=None, key=None, train=True, **config):
  place = build(k=plan.expert.shape[-1], **config)
  gates = jnp.ones(plan.expert.shape) if gates is None else jnp.asarray(gates).reshape(plan.expert.shape)
  return place(plan, gates, key=key, train=train).kept[0]


def test_with_one_slot_batch_priority_keeps_the_token_with_the_largest_gate():
  plan = plan_of([0, 0, 0])  # ceil(1*3/3) = 1 slot
  np.testing.assert_array_equal(kept(plan, [.5, .9, .7], capacity_factor=1., priority='batch'), [[0], [1], [0]])
  np.testing.assert_array_equal(kept(plan, [.5, .9, .7], capacity_factor=1.), [[1], [0], [0]])


def test_probability_lets_a_second_choice_go_before_a_first_one_and_batch_does_not():
  plan = plan_of([[0, 1], [1, 2]], k=2)  # ceil(.75*2*2/3) = 1 slot
  gates = [[.5, .4], [.3, .2]]
  np.testing.assert_array_equal(kept(plan, gates, capacity_factor=.75, priority='probability'), [[1, 1], [0, 1]])
  np.testing.assert_array_equal(kept(plan, gates, capacity_factor=.75, priority='batch'), [[1, 0], [1, 1]])


def test_token_order_lets_an_earlier_second_choice_go_before_a_later_first_one():
  plan = plan_of([[0, 1], [1, 2]], k=2)
  np.testing.assert_array_equal(kept(plan, capacity_factor=.75, order='token'), [[1, 1], [0, 1]])
  np.testing.assert_array_equal(kept(plan, capacity_factor=.75, order='choice'), [[1, 0], [1, 1]])


def test_random_priority_keeps_every_token_equally_often_in_training_and_the_first_at_evaluation():
  plan = plan_of([0] * 6)  # ceil(1*6/3) = 2 slots
  run = jax.jit(jax.vmap(lambda key: kept(plan, key=key, capacity_factor=1., priority='random')))
  share = run(jax.random.split(KEY, 3000)).mean((0, 2))
  # 3,000 draws with probability 1/3: standard error 0.009.
  np.testing.assert_allclose(share, 1 / 3, atol=0.045)
  evaluated = kept(plan, train=False, capacity_factor=1., priority='random')
  np.testing.assert_array_equal(evaluated[:, 0], [1, 1, 0, 0, 0, 0])
  with pytest.raises(ValueError, match='draws random numbers in training'):
    kept(plan, capacity_factor=1., priority='random')


@pytest.mark.parametrize('config, k, train, leak', [
    (dict(), 1, True, 'causal'),
    (dict(), 2, True, 'slots'),
    (dict(order='token'), 2, True, 'causal'),
    (dict(priority='batch'), 1, True, 'future'),
    (dict(priority='batch', order='token'), 1, False, 'future'),
    (dict(priority='probability'), 1, True, 'future'),
    (dict(priority='random'), 1, True, 'future'),
    (dict(priority='random'), 1, False, 'causal'),
    (dict(priority='random'), 2, False, 'slots'),
])
def test_what_leaks_follows_from_priority_order_and_choices(config, k, train, leak):
  assert build(k=k, capacity_factor=1., **config).leak(train) == leak


def test_dropless_keeps_the_plan():
  plan = plan_of([0, 1, 2])
  place = PLACEMENTS.build(dict(name='dropless'), 'config.place', k=1, num_experts=E)
  assert place(plan, jnp.ones((1, 3, 1)), key=None, train=True) is plan
  assert place.leak(True) == 'causal'
