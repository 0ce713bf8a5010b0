"""Sorting choices by expert, against numpy's stable argsort."""
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from moejax.kernels.routes import by_expert

# (E, copies of the choices): a few, and so many that E * M is more than an int32 holds.
SMALL, LARGE = (5, 1), (2**20, 2048)


@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.sampled_from([SMALL, LARGE]))
def test_choices_of_an_expert_stay_in_order_and_masked_ones_come_last(names, size):
  num_experts, copies = size
  expert = np.tile([num_experts if name == 5 else name for name in names], copies)
  order, position, sizes = by_expert(jnp.array(expert), num_experts)
  np.testing.assert_array_equal(order, np.argsort(expert, kind='stable'))
  np.testing.assert_array_equal(position[order], np.arange(len(expert)))
  np.testing.assert_array_equal(sizes[:5], np.bincount(expert, minlength=5)[:5])
