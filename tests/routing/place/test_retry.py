"""Where a token goes when its expert is full, against a loop over rounds and tokens."""
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.place import retry

G, S, E = 2, 8, 4


def retried(expert, routed, capacity):
  """{(token, choice)}: round by round, tokens in order, whoever has no slot asks the next expert."""
  filled, kept, waiting = [0] * E, set(), [token for token in range(S) if routed[token]]
  for choice in range(expert.shape[-1]):
    left = []
    for token in waiting:
      name = expert[token, choice]
      if filled[name] < capacity:
        kept.add((token, choice))
        filled[name] += 1
      else:
        left.append(token)
    waiting = left
  return kept


slots_with_retries = jax.jit(retry.slots_with_retries, static_argnums=(2, 3))


@given(st.integers(0, 2**31), st.sampled_from([1, 3]), st.sampled_from([0.7, 1.]))
def test_retries_equal_a_loop_over_rounds_and_tokens(seed, capacity, share):
  numbers = np.random.default_rng(seed)
  expert = np.argsort(numbers.random((G, S, E)) * [1, 2, 3, 4])[..., :3].astype(np.int32)  # the first ones are popular
  routed = numbers.random((G, S)) < share
  kept, slot = (np.asarray(a) for a in slots_with_retries(expert, routed, E, capacity))
  for g in range(G):
    assert set(zip(*np.nonzero(kept[g]))) == retried(expert[g], routed[g], capacity)
    taken = [(expert[g, s, k], slot[g, s, k]) for s, k in zip(*np.nonzero(kept[g]))]
    assert len(set(taken)) == len(taken) and all(0 <= place < capacity for _, place in taken)


def test_places_that_know_positions_alone_refuse_priorities():
  config = papers.switch(overflow='retry')
  with pytest.raises(ConfigError, match=r'router\.place: this placement assigns slots by position and choice'):
    router.build(config | dict(place=config['place'] | dict(priority='batch')), 'router', dim=E, num_experts=E,
                 rngs=nnx.Rngs(0))
