"""The registry of models."""
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from moejax.config import Registry
from moejax.functional import Functional, functionalize

MODELS = Registry('model', nnx.Module, context=('rngs',))

# The dtype of activations, to which parameters (always float32) are cast when they are used.
Dtype = Literal['float32', 'bfloat16']


def build(config: Mapping, where: str = 'config.model') -> Functional:
  """Builds the model named in `config`, as pure functions.

  `apply(params, state, batch, key=None, train=False)` returns a `ModelOutput`. Nothing is allocated or compiled here.

  Raises:
    ConfigError: an invalid config.
  """
  return functionalize(lambda rngs: MODELS.build(config, where, rngs=rngs))


def compute_dtype(dtype: Dtype) -> jnp.dtype:
  """The dtype with this name."""
  return jnp.dtype(dtype)
