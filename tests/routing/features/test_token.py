"""The token and its id as inputs of a score."""
import jax
import jax.numpy as jnp
import pytest

from moejax.routing.features import token
from moejax.routing.features.ids import TokenIds
from moejax.routing.inputs import RouterInputs

G, S, D = 2, 5, 8
X = jax.random.normal(jax.random.key(1), (G, S, D))


def test_token_features_are_float32_and_missing_token_ids_raise():
  x = X.astype(jnp.bfloat16)
  assert token.Token(dim=D)(x, RouterInputs()).dtype == jnp.float32
  ids = jnp.ones((G, S), jnp.int32)
  assert TokenIds()(x, RouterInputs(token_ids=ids)) is ids
  with pytest.raises(ValueError, match='token_ids is None'):
    TokenIds()(x, RouterInputs())
