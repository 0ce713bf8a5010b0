"""Parameters for tests, drawn without running the initialisers, which would take longer than most tests."""
import jax
import jax.numpy as jnp
import numpy as np

from moejax.functional import flatten, unflatten


def draw_parameters(model, router_deviation=0.4):
  """(non-zero parameters, initial router state) of a model; scales are around one, all others around zero."""
  draw, (params, state) = np.random.default_rng(0), model.shapes()
  deviation = lambda path: router_deviation if 'router' in path else 0.4
  values = {path: jnp.float32(draw.normal(float(path.endswith('scale')), deviation(path), leaf.shape))
            for path, leaf in flatten(params).items()}
  return unflatten(values), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
