"""Keys by name: different names give different streams, equal names equal ones, and evaluation has no key."""
import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moejax.random import derive

KEY = jax.random.key(0)


def data(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


@given(st.lists(st.one_of(st.text(min_size=1, max_size=8), st.integers(0, 2**31 - 1)), min_size=2, max_size=6, unique=True))
def test_every_name_has_a_key_of_its_own_whatever_else_was_derived(names):
  keys = [data(derive(KEY, name)) for name in names]
  assert len(set(keys)) == len(names)
  assert [data(derive(KEY, name)) for name in reversed(names)] == keys[::-1]


def test_a_name_under_another_key_is_another_stream():
  assert data(derive(derive(KEY, 'a'), 'c')) != data(derive(derive(KEY, 'b'), 'c')) != data(derive(KEY, 'c'))


def test_without_a_key_no_key_is_derived():
  assert derive(None, 'noise') is None
