"""Which parameters decay: kernels and word embeddings, found by the names of their axes, or those that match."""
import jax
import jax.numpy as jnp

from moejax.functional import Functional, flatten, unflatten
from moejax.training.parameter_masks import decay_mask

PARAMETERS = {  # path: (shape, axes), and whether it decays by default
    'embedding/table': (((9, 4), ('vocab', 'embed')), True),
    'position_embedding/table': (((6, 4), (None, 'embed')), False),
    'encoding/table': (((6, 4), (None, 'embed')), False),
    'lengths/table': (((6, 4), ('length', 'embed')), False),
    'patches/kernel': (((6, 4), (None, 'embed')), True),
    'class_token': (((1, 4), (None, 'embed')), False),
    'blocks/norm/scale': (((2, 4), ('layers', 'embed')), False),
    'blocks/attention/query': (((2, 4, 3, 2), ('layers', 'embed', 'heads', 'head_dim')), True),
    'blocks/attention/offset': (((2, 3, 2), ('layers', 'heads', 'head_dim')), False),
    'blocks/attention/out': (((2, 1, 4, 4), ('layers', 'heads', 'head_dim', 'embed')), True),
    'blocks/moe/router/kernel': (((2, 4, 5), ('layers', 'embed', 'expert')), True),
    'blocks/moe/experts/wi': (((2, 5, 4, 8), ('layers', 'expert', 'embed', 'mlp')), True),
    'blocks/moe/experts/offset': (((2, 5, 8), ('layers', 'expert', 'mlp')), False),
    'one/experts/offset': (((5, 8), ('expert', 'mlp')), False),
    'head/bias': (((9,), ('vocab',)), False),
}


def model_of(parameters):
  """A `Functional` with parameters only: {path: (shape, axes)}."""
  shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (shape, _) in parameters.items()}
  tree = unflatten(shapes)
  return Functional(init=lambda key: (jax.tree.map(lambda s: jnp.zeros(s.shape), tree), {}), apply=None,
                    axes=unflatten({path: axes for path, (_, axes) in parameters.items()}), state_axes={})


def test_by_default_kernels_and_word_embeddings_decay_and_stacked_vectors_do_not():
  model = model_of({path: parameter for path, (parameter, _) in PARAMETERS.items()})
  mask = flatten(decay_mask(model, None, 'here'))
  assert mask == {path: decays for path, (_, decays) in PARAMETERS.items()}


def test_a_regular_expression_says_which_parameters_decay():
  model = model_of({path: parameter for path, (parameter, _) in PARAMETERS.items()})
  mask = flatten(decay_mask(model, r'experts/|head/', 'here'))
  assert {path for path, decays in mask.items() if decays} == {
      'blocks/moe/experts/wi', 'blocks/moe/experts/offset', 'one/experts/offset', 'head/bias'}
