"""Models extracted for a task against the full model on batches of that task."""
import ast
import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drawn_parameters import draw_parameters
from moejax import models
from moejax.functional import flatten
from moejax.routing import papers
from moejax.surgery.extract_task import extract_task, side_by_side

ATTENTION = dict(heads=2)
ROUTERS = {
    'task_moe': papers.task_moe(num_tasks=3), 'demix': papers.demix(num_domains=3),
    'cross_task': papers.cross_task(num_tasks=3, width=4)}


def sparse(router, **experts):
  moe = dict(num_experts=4, experts=dict(name='feed_forward', hidden=8, **experts), router=router,
             dispatch=dict(name='reference'), group='sequence')
  return dict(num_layers=2, attention=ATTENTION, feed_forward=dict(hidden=8), sparse=dict(name='every', n=1), moe=moe)


def of_layers(router, **options):
  return dict(name='decoder', vocab_size=13, dim=8, num_layers=2, attention=ATTENTION, feed_forward=dict(hidden=8),
              sparse_form='layer', sparse=dict(name='every', n=1), moe=dict(num_experts=4, router=router)) | options


def draw(config):
  return draw_parameters(models.build(config), router_deviation=2.)  # routers that tell tasks apart


@functools.cache
def full(name, activation='gelu'):
  config = dict(name='decoder', vocab_size=13, dim=8,
                **sparse(ROUTERS[name], activation=activation, use_bias=activation == 'gelu'))
  return config, *draw(config)


def logits(config, params, state, batch):
  return np.asarray(compiled(repr(config))(params, state, batch).logits)


@functools.cache
def compiled(config):
  return jax.jit(models.build(ast.literal_eval(config)).apply)


TOKENS = jax.random.randint(jax.random.key(5), (3, 7), 0, 13)


@pytest.mark.parametrize('name, activation', [('task_moe', 'gelu'), ('demix', 'gelu'), ('cross_task', 'swiglu')])
def test_the_extracted_model_is_the_full_one_for_its_task(name, activation):
  config, params, state = full(name, activation)
  outputs = []
  for task in (0, 2):
    dense, dense_params, dense_state = extract_task(config, params, state, task)
    assert 'moe' not in dense and dense_state == {}
    assert dense['feed_forward']['hidden'] == (16 if name == 'task_moe' else 8)
    outputs.append(logits(dense, dense_params, dense_state, dict(tokens=TOKENS)))
    expected = logits(config, params, state, dict(tokens=TOKENS, tasks=jnp.full_like(TOKENS, task)))
    # The same products; only sums over hidden units are of two experts at once: float32 rounding.
    np.testing.assert_allclose(outputs[-1], expected, rtol=1e-4, atol=1e-5)
  assert not np.allclose(outputs[0], outputs[1], atol=1e-2)


def with_shared(expert, **options):
  """(config, params, state) of a model that routes by task, with one more expert for all tokens."""
  config = copy.deepcopy(full('task_moe')[0])
  config['moe'] |= dict(shared=expert) | options
  return config, *draw(config)


def test_a_shared_expert_is_a_part_of_the_extracted_feed_forward():
  config, params, state = with_shared(dict(name='feed_forward', hidden=6, use_bias=True))
  dense, dense_params, dense_state = extract_task(config, params, state, 1)
  assert dense['feed_forward'] == dict(hidden=2 * 8 + 6, activation='gelu', use_bias=True)
  expected = logits(config, params, state, dict(tokens=TOKENS, tasks=jnp.ones_like(TOKENS)))
  found = logits(dense, dense_params, dense_state, dict(tokens=TOKENS))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # sums in another order: float32 rounding


@pytest.mark.parametrize('expert, options, message', [
    (dict(name='feed_forward', hidden=6, use_bias=True), dict(shared_gate='softmax'),
     r"config\.model\.moe\.shared_gate = 'softmax' weighs the shared expert token by token"),
    (dict(name='feed_forward', hidden=6), {}, r"config\.model\.moe\.shared: .* 'use_bias': False\} cannot be joined"),
    (dict(name='feed_forward', hidden=6, use_bias=True, activation='relu'), {}, "'relu', 'use_bias': True} cannot be joined"),
    (dict(name='residual_stack', hidden=6), {}, "'residual_stack' of .* cannot be joined"),
])
def test_a_shared_expert_that_cannot_be_joined_is_refused(expert, options, message):
  with pytest.raises(ValueError, match=message):
    extract_task(*with_shared(expert, **options), 0)


def test_the_parameters_of_a_single_expert_are_the_very_same():
  config, params, state = full('demix')
  _, dense, _ = extract_task(config, params, state, 2)
  for depth in '01':
    for name, leaf in params['blocks'][depth]['moe']['experts'].items():
      np.testing.assert_array_equal(dense['blocks'][depth]['feed_forward'][name], leaf[2])


def test_of_experts_that_are_layers_the_route_of_the_task_is_the_dense_model():
  config = of_layers(ROUTERS['cross_task'], num_layers=3, sparse=dict(name='layers', indices=(0, 2)))
  params, state = draw(config)
  paths = []
  for task in (0, 1):
    dense, dense_params, dense_state = extract_task(config, params, state, task)
    assert not {'moe', 'sparse', 'sparse_form'} & set(dense) and dense_state == {}
    paths.append([])
    for depth in '02':
      found, layers = (flatten(tree) for tree in (dense_params['blocks'][depth],
                                                  params['blocks'][depth]['moe']['layers']))
      paths[-1].append([e for e in range(4) if all((found[path] == leaf[e]).all() for path, leaf in layers.items())])
      assert len(paths[-1][-1]) == 1 and set(found) == set(layers)
    expected = logits(config, params, state, dict(tokens=TOKENS, tasks=jnp.full_like(TOKENS, task)))
    # Four layers at once are products of other shapes: float32 rounding.
    np.testing.assert_allclose(logits(dense, dense_params, dense_state, dict(tokens=TOKENS)), expected,
                               rtol=1e-4, atol=1e-5)
  assert paths[0] != paths[1]


def test_a_mixture_of_layers_is_not_a_layer():
  config = of_layers(papers.cross_task(num_tasks=3, width=4, relaxation='softmax'))
  with pytest.raises(ValueError, match='config.model: the task mixes whole layers with the weights'):
    extract_task(config, *draw(config), 0)


def test_one_side_of_an_encoder_decoder_can_be_extracted_while_the_other_routes_tokens():
  config = dict(name='encoder_decoder', vocab_size=13, dim=8, encoder=sparse(papers.top_k_dropless(k=2)),
                decoder=sparse(papers.task_moe(num_tasks=3)))
  params, state = draw(config)
  tasks = jnp.ones_like(TOKENS)
  batch = dict(encoder_tokens=TOKENS, decoder_tokens=TOKENS[:, ::-1], encoder_tasks=tasks, decoder_tasks=tasks)
  parts = extract_task(config, params, state, 1, side='decoder')
  assert 'moe' in parts[0]['encoder'] and 'moe' not in parts[0]['decoder']
  np.testing.assert_allclose(logits(*parts, batch), logits(config, params, state, batch), rtol=1e-4, atol=1e-5)


def test_weights_are_multiplied_into_what_comes_last():
  # Two experts of one hidden unit, relu: 0.25 * 2 * relu(3 x) + 0.75 * 5 * relu(x) has the rows 0.5 and 3.75.
  joined = side_by_side([(dict(wi=jnp.array([[3.]]), wo=jnp.array([[2.]])), 0.25),
                         (dict(wi=jnp.array([[1.]]), wo=jnp.array([[5.]])), 0.75)])
  np.testing.assert_array_equal(joined['wi'], [[3., 1.]])
  np.testing.assert_array_equal(joined['wo'], [[0.5], [3.75]])


def test_what_does_not_route_by_task_alone_is_refused():
  config = dict(name='decoder', vocab_size=13, dim=8, **sparse(papers.top_k_dropless(k=2)))
  params, state = draw(config)
  with pytest.raises(ValueError, match='tokens of task 0 do not all have the same experts'):
    extract_task(config, params, state, 0)
  with pytest.raises(ValueError, match='extraction requires stacking=.unrolled.'):
    extract_task({**config, 'stacking': 'scan'}, params, state, 0)
  with pytest.raises(ValueError, match='experts that are layers, or .feed_forward. in the place of the dense one'):
    extract_task({**config, 'sparse_form': 'insert'}, params, state, 0)
  mixed = {**full('task_moe')[0], 'sparse': dict(name='every', n=2)}
  with pytest.raises(ValueError, match=r'widths \[8, 16\], but a dense model has one'):
    extract_task(mixed, *draw(mixed), 0)
  mixed['feed_forward'] = dict(hidden=16, activation='relu')
  with pytest.raises(ValueError, match=r"experts are .*'gelu'.*, dense layers .*'relu'.*one kind of feed-forward"):
    extract_task(mixed, *draw(mixed), 0)
