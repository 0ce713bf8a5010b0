"""Nonlinearities of feed-forward experts: plain, or gated by a third matrix."""
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Activation = Literal['gelu', 'relu', 'silu', 'squared_relu', 'geglu', 'reglu', 'swiglu']

# gelu is the tanh approximation; squared ReLU is So et al. 2021 (Primer).
ACTIVATIONS = {'gelu': jax.nn.gelu, 'relu': jax.nn.relu, 'silu': jax.nn.silu,
               'squared_relu': lambda x: jnp.square(jax.nn.relu(x))}
# Shazeer 2020, "GLU variants improve transformer", eq. 6: act(x Wg) * (x Wi).
GATES = {'geglu': jax.nn.gelu, 'reglu': jax.nn.relu, 'swiglu': jax.nn.silu}
assert set(ACTIVATIONS) | set(GATES) == set(get_args(Activation))


def activate(activation: Activation, zi: jax.Array, zg: jax.Array | None) -> jax.Array:
  """The hidden layer from the pre-activations: act(zi), or act(zg) * zi if the activation is gated."""
  return ACTIVATIONS[activation](zi) if zg is None else GATES[activation](zg) * zi
