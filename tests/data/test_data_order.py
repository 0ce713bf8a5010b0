"""The training order as a shuffle: a permutation every epoch, without visible structure."""
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moejax.data.order import Order


@given(length=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_holds_every_example_once(length, seed, epoch):
  indices = Order(length, seed)(np.arange(epoch * length, (epoch + 1) * length))
  assert sorted(indices) == list(range(length))


@given(start=st.integers(0, 5000), count=st.integers(1, 600))
def test_a_position_gives_the_same_example_by_any_access(start, count):
  order = Order(700, 3)
  positions = np.arange(start, start + count)
  together = order(positions)
  assert [order.at(int(position)) for position in positions] == list(together)
  np.testing.assert_array_equal(order(positions[::-1])[::-1], together)


def test_epochs_and_seeds_have_orders_of_their_own():
  orders = [Order(1000, seed)(np.arange(epoch * 1000, (epoch + 1) * 1000)) for seed in (0, 1) for epoch in (0, 1)]
  for one, other in itertools.combinations(orders, 2):
    # Two random permutations agree at one place on average (Poisson with mean 1).
    assert (one == other).sum() < 10


def test_where_an_example_lands_is_uniform():
  # 2000 epochs of 12 examples: each of 144 (place, example) cells expects 166.7, so chi-squared with 121 degrees of
  # freedom (both margins are fixed); its 1 - 1e-6 quantile is 205.
  order = Order(12, 0)
  indices = order(np.arange(12 * 2000)).reshape(2000, 12)
  table = np.stack([(indices == example).sum(0) for example in range(12)])
  assert ((table - 2000 / 12) ** 2 / (2000 / 12)).sum() < 205


def test_neighbours_do_not_stay_neighbours():
  # In a random permutation of n, P(|difference| = 1) = 2 / n for each of n - 1 adjacent pairs: 2 on average.
  indices = Order(100_000, 5)(np.arange(100_000))
  assert (np.abs(np.diff(indices)) == 1).sum() < 15


def test_an_order_over_a_billion_examples_costs_no_memory():
  indices = Order(10**9, 0)(np.arange(10**9 - 4, 10**9 + 4))
  assert len(set(indices)) == 8 and indices.min() >= 0 and indices.max() < 10**9
