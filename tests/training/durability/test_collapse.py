"""The alarm for collapsed routers rings where nearly all tokens choose one expert, and only where that is not legal."""
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from moejax.routing import papers
from moejax.training.durability import collapse
from moejax.training.durability.recovery import RecoveryConfig


def watch(router=None, rows=(), num_experts=4):
  model = ConfigDict(dict(moe=dict(num_experts=num_experts, router=router)) if router else {})
  setup = SimpleNamespace(config=SimpleNamespace(model=model), recovery=RecoveryConfig())
  return collapse.CollapseAlarm(setup, rows)


def row(step, *load):
  return {'step': step, 'router/block_01/load': list(load)}


def rung(collapse, loads):
  said, alarm = [], []
  for step, load in enumerate(loads, 1):
    alarm += collapse.look(step, row(step, *load), said.append).values()
  return alarm, said


TOP_1, TOP_2 = papers.switch(), papers.vmoe(k=2)
EVEN, ALL_TO_2 = (.25, .25, .25, .25), (.02, .02, .94, .02)


def test_it_rings_from_the_third_consecutive_row_and_reports_start_and_end_once():
  alarm, said = rung(watch(TOP_1), [ALL_TO_2, ALL_TO_2, EVEN, ALL_TO_2, ALL_TO_2, ALL_TO_2, ALL_TO_2, EVEN, EVEN])
  assert alarm == [0, 0, 0, 0, 0, 1, 1, 0, 0]
  assert len(said) == 2
  assert said[0].startswith('Step 6: the router of block_01 has collapsed: 94% of the tokens choose expert 2 of 4.')
  assert said[1].startswith('Step 8: the router of block_01 is no longer collapsed')


def test_half_of_the_choices_are_all_tokens_with_two_choices_each():
  assert rung(watch(TOP_2), [(.5, .3, .1, .1)] * 3)[0] == [0, 0, 1]
  assert rung(watch(TOP_2), [(.4, .4, .1, .1)] * 3)[0] == [0, 0, 0]  # 80% of the tokens


def test_a_resumed_run_remembers_earlier_rows():
  rows = [row(1, *ALL_TO_2), row(2, *ALL_TO_2)]
  assert rung(watch(TOP_1, rows), [ALL_TO_2])[0] == [1]
  assert rung(watch(TOP_1, [*rows, row(3, *ALL_TO_2)]), [ALL_TO_2]) == ([1], [])  # said before


@pytest.mark.parametrize('router, load', {
    'a hash is not learned': (papers.hash_layers(vocab_size=8), (1., 0., 0., 0.)),
    'one expert takes all of necessity': (TOP_1, (1.,)),
    'every token chooses both of two': (TOP_2, (.5, .5)),
    'a dense model': (None, (1., 0., 0., 0.)),
}.values())
def test_it_does_not_ring_where_nothing_can_collapse(router, load):
  assert not any(rung(watch(router), [load] * 5)[0])


def test_a_non_finite_load_does_not_ring():
  nan = float('nan')
  assert rung(watch(TOP_1), [(nan, nan, nan, nan)] * 4)[0] == [0] * 4
  assert rung(watch(TOP_1, [row(1, None, None, None, None)]), [EVEN])[0] == [0]


@pytest.mark.parametrize('router, expected', [
    (papers.expert_choice(), 1), (papers.soft_moe(), 1), (papers.gshard(), 2)], ids=['expert choice', 'soft', 'top-2'])
def test_a_token_counts_once_with_expert_choice_and_dense_routing(router, expected):
  model = dict(moe=dict(num_experts=4, router=router))
  assert collapse.choices(ConfigDict(model), 'block_01') == expected
  assert collapse.choices(ConfigDict(dict(encoder={}, decoder=model)), 'decoder_block_01') == expected
