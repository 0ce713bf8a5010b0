"""A fingerprint changes with any change of one element, and is the same wherever the array lies."""
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moejax.training.durability.fingerprints import fingerprint

FIXED = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)


@hypothesis.given(st.integers(0, 23), st.integers(1, 2**32 - 1))
def test_the_fingerprint_changes_with_any_change_of_one_element(index, bits):
  changed = np.asarray(FIXED).copy()
  changed.reshape(-1).view(np.uint32)[index] ^= np.uint32(bits)
  assert fingerprint({'a': changed}) != fingerprint({'a': FIXED})


def test_the_fingerprint_changes_when_elements_swap_places():
  assert fingerprint(FIXED) != fingerprint(FIXED[:, ::-1])


@pytest.mark.parametrize('x', [FIXED, FIXED[0, 0, 0], FIXED.astype(jnp.bfloat16), FIXED.astype(jnp.uint8), FIXED > 5])
def test_an_array_of_the_host_has_the_fingerprint_that_it_has_on_a_device(x):
  assert fingerprint(np.asarray(x)) == fingerprint(x)
