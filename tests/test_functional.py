"""Modules as pure functions over plain dicts; stacking is checked against the unstacked modules."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import functional
from moejax.random import derive


class Layer(nnx.Module):

  def __init__(self, rngs):
    self.w = functional.parameter(rngs, nnx.initializers.normal(1.), (3, 3), ('embed', 'mlp'))
    self.bias = functional.router_state(jnp.zeros(3), ('expert',))

  def __call__(self, x):
    return jnp.tanh(x @ self.w[...]) + self.bias[...]


class Model(nnx.Module):

  def __init__(self, rngs, scanned):
    self.scanned = scanned
    build = functional.stack_modules if scanned else functional.unstacked_modules
    self.blocks = build(Layer, 4, rngs)

  def __call__(self, x):
    if self.scanned:
      return functional.scan_modules(self.blocks, lambda block, x, _: (block(x), None), x)[0]
    for block in self.blocks:
      x = block(x)
    return x


@pytest.fixture(params=[False, True], ids=['unrolled', 'scanned'])
def model(request):
  return functional.functionalize(lambda rngs: Model(rngs, request.param))


def test_trees_are_plain_dicts_with_readable_paths_and_axes():
  model = functional.functionalize(lambda rngs: Model(rngs, False))
  params, state = model.init(jax.random.key(0))
  assert set(functional.flatten(params)) == {f'blocks/{i}/w' for i in range(4)}
  assert set(functional.flatten(state)) == {f'blocks/{i}/bias' for i in range(4)}
  assert functional.flatten(model.axes)['blocks/2/w'] == ('embed', 'mlp')
  assert all(type(leaf) is not nnx.Param for leaf in jax.tree.leaves(params))


def test_a_stack_adds_the_layers_axis():
  model = functional.functionalize(lambda rngs: Model(rngs, True))
  assert model.axes == dict(blocks=dict(w=('layers', 'embed', 'mlp')))
  assert model.state_axes == dict(blocks=dict(bias=('layers', 'expert')))
  assert model.shapes()[0]['blocks']['w'].shape == (4, 3, 3)


def test_scanned_and_unrolled_are_the_same_function_of_the_same_key():
  x = jax.random.normal(jax.random.key(1), (2, 3))
  outs, grads = [], []
  for scanned in (False, True):
    model = functional.functionalize(lambda rngs, scanned=scanned: Model(rngs, scanned))
    params, state = model.init(jax.random.key(0))
    out, grad = jax.value_and_grad(lambda p: model.apply(p, state, x).sum())(params)
    outs.append(out)
    grads.append(grad['blocks']['w'] if scanned else jnp.stack([grad['blocks'][str(i)]['w'] for i in range(4)]))
  np.testing.assert_allclose(outs[0], outs[1], rtol=1e-6)
  np.testing.assert_allclose(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_initialisation_is_traced_without_allocating(model):
  params, _ = model.shapes()
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def test_a_module_without_a_cache_says_so(model):
  for ask in (lambda: model.init_cache(2, 8), model.cache_axes):
    with pytest.raises(TypeError, match='Model has no cache: it is applied to whole inputs'):
      ask()


def test_parameters_of_another_model_are_refused(model):
  params, state = model.init(jax.random.key(0))
  with pytest.raises(ValueError, match="missing .*w.*unexpected \\['other'\\]"):
    model.apply(dict(other=1), state, jnp.zeros((1, 3)))


def test_flatten_and_unflatten_are_inverse():
  tree = dict(a=dict(b=1, c=dict(d=2)), e=3)
  assert functional.flatten(tree) == {'a/b': 1, 'a/c/d': 2, 'e': 3}
  assert functional.unflatten(functional.flatten(tree)) == tree


def test_parameters_of_experts_have_an_axis_of_that_name():
  axes = dict(experts=dict(wi=('layers', 'expert', 'embed', 'mlp')), router=dict(experts=(None, 'embed')),
              feed_forward=dict(wi=('expert_embed', 'expert_mlp')))
  assert functional.expert_paths(axes) == {'experts/wi'}


def test_updates_replace_state_and_nothing_else():
  state = dict(a=dict(bias=1, other=2))
  assert functional.merge_updates(state, dict(a=dict(bias=5))) == dict(a=dict(bias=5, other=2))
  assert functional.merge_updates(state, {}) == state
  with pytest.raises(ValueError, match='a/typo'):
    functional.merge_updates(state, dict(a=dict(typo=5)))


def test_axis_names_must_match_dimensions():
  with pytest.raises(ValueError, match='2 dimensions'):
    functional.parameter(nnx.Rngs(0), nnx.initializers.zeros, (2, 2), ('embed',))


def test_keys_have_names_and_do_not_depend_on_order():
  key = jax.random.key(0)
  assert derive(None, 'noise') is None
  a, b, again = derive(key, 'noise'), derive(key, 'dropout'), derive(key, 'noise')
  assert (jax.random.key_data(a) == jax.random.key_data(again)).all()
  assert (jax.random.key_data(a) != jax.random.key_data(b)).any()
