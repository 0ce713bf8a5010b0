"""The one-file Mixtral computes what the decoder of configs/mixtral_chitchat.py computes, and starts at its scales.

Each is the other's oracle: they share no code, and the example sorts, multiplies and sums by operations of JAX alone.
"""
import ast
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mixtral_chitchat
from moejax import models
from moejax.functional import flatten, unflatten
from moejax.training import objectives

FILE = pathlib.Path(__file__).parents[2] / 'examples/mixtral.py'
# Where the decoder keeps each parameter of the example.
PATHS = {
    'embedding_VD': 'embedding/table',
    'layers/*/attention_norm_D': 'blocks/*/attention_norm/scale',
    'layers/*/query_DHP': 'blocks/*/attention/query',
    'layers/*/key_DNP': 'blocks/*/attention/key',
    'layers/*/value_DNP': 'blocks/*/attention/value',
    'layers/*/out_HPD': 'blocks/*/attention/out',
    'layers/*/experts_norm_D': 'blocks/*/feed_forward_norm/scale',
    'layers/*/router_DE': 'blocks/*/moe/router/score/kernel',
    'layers/*/gate_EDF': 'blocks/*/moe/experts/wg',
    'layers/*/up_EDF': 'blocks/*/moe/experts/wi',
    'layers/*/down_EFD': 'blocks/*/moe/experts/wo',
    'norm_D': 'final_norm/scale',
    'head_DV': 'head/linear/kernel',
}


@pytest.fixture(scope='module')
def example():
  spec = importlib.util.spec_from_file_location('mixtral', FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def decoder(sizes):
  """The config of mixtral_chitchat with these sizes; all else, such as the balance loss, is its own."""
  config = mixtral_chitchat.get_config()
  config.model.update(vocab_size=sizes.vocab, dim=sizes.dim, num_layers=sizes.layers)
  config.model.attention.update(heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim)
  config.model.moe.num_experts = sizes.experts
  config.model.moe.experts.hidden = sizes.hidden
  return config


def paths(depths):
  """{path in the example: path in the decoder} of every parameter."""
  return {theirs.replace('*', str(depth)): ours.replace('*', str(depth))
          for depth in range(depths) for theirs, ours in PATHS.items()}


def named(tree):
  """{'layers/0/query_DHP': array} of a tree of the example."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def close(theirs, ours):
  # Float32 sums in another order, forwards and backwards through two layers: some dozens of roundings of the largest.
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(ours).max())


@pytest.fixture(scope='module')
def results(example):
  """((loss, logits), gradients by path in the example) of the example and of the decoder, for the same parameters."""
  sizes = example.Config(vocab=29, dim=16, layers=2, heads=4, kv_heads=2, head_dim=6, experts=5, hidden=12)
  table, draw = paths(sizes.layers), np.random.default_rng(0)
  text = jnp.asarray(draw.integers(0, sizes.vocab, (3, 14)))
  # Large enough that routers disagree and every parameter matters; norms are around one.
  params = jax.tree.map(lambda leaf: jnp.float32(draw.normal(float(leaf.ndim == 1), 0.4, leaf.shape)),
                        jax.eval_shape(lambda: example.init(sizes, jax.random.key(0))))
  config = decoder(sizes)
  model = models.build(config.model)
  objective = objectives.build(config.objective, 'config.objective')
  batch = dict(tokens=text[:, :-1], targets=text[:, 1:], loss_mask=jnp.ones_like(text[:, 1:]))

  def theirs(params):
    return example.loss_fn(params, text, sizes), example.forward(params, text[:, :-1], sizes)[0]

  def ours(params):
    output = model.apply(params, {}, batch, train=True)
    return objective(output, batch)[0] + objective.router_loss(output), output.logits

  in_decoder = unflatten({table[path]: jnp.asarray(leaf) for path, leaf in named(params).items()})
  run = lambda function, params: jax.jit(jax.value_and_grad(function, has_aux=True))(params)
  values, gradients = run(theirs, params)
  our_values, our_gradients = run(ours, in_decoder)
  our_gradients = flatten(our_gradients)
  return (values, named(gradients)), (our_values, {path: our_gradients[place] for path, place in table.items()})


def test_logits_and_loss_are_those_of_the_decoder(results):
  ((loss, logits), _), ((our_loss, our_logits), _) = results
  close(logits, our_logits)
  close(loss, our_loss)


@pytest.mark.parametrize('path', paths(2))
def test_the_gradient_of_every_parameter_is_that_of_the_decoder(results, path):
  (_, gradients), (_, our_gradients) = results
  assert our_gradients[path].any()
  close(gradients[path], our_gradients[path])


def test_weights_start_with_the_scale_of_the_decoder(example):
  sizes = example.Config(layers=1, heads=8, hidden=32)  # every fan-in differs: D = 64, H * P = 128, F = 32
  theirs = named(example.init(sizes, jax.random.key(0)))
  ours = flatten(jax.jit(models.build(decoder(sizes).model).init)(jax.random.key(1))[0])
  assert set(ours) == {place for path, place in paths(1).items() if path in theirs} and len(ours) == len(theirs)
  for path, place in paths(1).items():
    # A standard deviation of n normal numbers has a relative standard error of 1 / sqrt(2n): five of two of these.
    np.testing.assert_allclose(np.sqrt(np.mean(theirs[path]**2) / np.mean(ours[place]**2)), 1,
                               atol=5 / np.sqrt(theirs[path].size), err_msg=path)


def test_it_imports_jax_and_optax_alone():
  imports = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
  modules = {name.name if isinstance(node, ast.Import) else node.module for node in imports for name in node.names}
  assert modules == {'dataclasses', 'functools', 'typing', 'jax', 'jax.numpy', 'optax'}


def test_it_is_short_enough_to_read_at_once():
  assert len(FILE.read_text().splitlines()) <= 170


def test_training_lowers_its_loss(example):
  losses = example.main(steps=8)
  assert losses[-1] < losses[0] / 2
