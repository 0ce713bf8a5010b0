"""Models by name, and what is common to all of them."""
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from moejax.config import Registry
from moejax.functional import Functional, functionalize

MODELS = Registry('model')

# The compute dtype: what activations are, and what parameters (always float32) are cast to where they are used.
Dtype = Literal['float32', 'bfloat16']


def build(config: Mapping, where: str = 'config.model') -> Functional:
  """The model that `config` names, as pure functions.

  `apply(params, state, batch, key=None, train=False)` returns a `ModelOutput`. Nothing is allocated or compiled here.

  Raises:
    ConfigError: anything in the config that cannot be built.
  """
  return functionalize(lambda rngs: MODELS.build(config, where, rngs=rngs))


def compute_dtype(dtype: Dtype) -> jnp.dtype:
  """The dtype of a name in a config."""
  return jnp.dtype(dtype)
