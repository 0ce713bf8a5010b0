"""Whole layers as experts (CrossTaskMoE): against a loop over the layers, each a dense `Block` of its own, and against
the dense models of single routes; the gradients of a hard route against the formula of the straight-through softmax."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn_parameters import draw_parameters
from moejax import functional, models
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.layers.block_mixture import BlockMixture
from moejax.layers.attend import Mask
from moejax.layers.block import Block, BranchSpec
from moejax.layers.sublayer import Context
from moejax.layers.positions import POSITIONS
from moejax.layers.stack import Stack
from moejax.models.sequences import TokenRows
from moejax.random import derive
from moejax.routing import papers

B, S, D, F, E, V = 3, 6, 8, 10, 3, 13
X = jax.random.normal(jax.random.key(0), (B, S, D))
IDS = jnp.asarray([[1, 5, 2, 9, 4, 7], [3, 3, 8, 1, 12, 6], [2, 11, 7, 7, 0, 5]])
SEGMENTS = jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
POSITION = jnp.asarray([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
TASKS = jnp.broadcast_to(jnp.arange(B)[:, None], (B, S))  # a task for each row
KEY, DEPTH = jax.random.key(7), 1
HARD = papers.cross_task(num_tasks=3, width=4, hidden=5)
SOFT = papers.cross_task(num_tasks=3, width=4, hidden=5, relaxation='softmax')
AVERAGE = papers.cross_task(num_tasks=3, width=4, hidden=5, relaxation='softmax', start=1e9, end=1e9)
DOMAIN = papers.demix(num_domains=3)
TOP_2, SWITCH = papers.top_k_dropless(k=2), papers.switch() | dict(place=dict(name='capacity', capacity_factor=0.5))

# The same float32 operations in programs that differ.
close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


# ---- one mixture ----------------------------------------------------------------------------------------------------


def dense_block(rngs, dropout):
  branches = dict(attention=dict(name='attention', heads=2),
                  feed_forward=dict(name='feed_forward', hidden=F, activation='gelu'))
  return Block({name: BranchSpec(config, f'config.{name}') for name, config in branches.items()}, dim=D,
               dtype=jnp.float32, rngs=rngs, norm=dict(name='rms_norm'), dropout=dropout, drop_step=dropout)


def context():
  encoding = POSITIONS.build(dict(name='rope'), 'config.positions', dim=D, rngs=nnx.Rngs(0), heads=2,
                             bidirectional=False)
  return Context(TokenRows(IDS, SEGMENTS, POSITION, TASKS).router_inputs, encoding,
                 mask=Mask(SEGMENTS, SEGMENTS, causal=True))


@functools.cache
def mixture(name, dropout=0.):
  """(params, state, compiled (params, x, train) -> (y, RouterOutput))"""
  block = functools.partial(dense_block, dropout=dropout)
  model = functional.functionalize(lambda rngs: BlockMixture(
      BranchSpec(dict(num_experts=E, router=globals()[name]), 'config.moe'), dim=D, rngs=rngs, block=block))
  params, state = draw_parameters(model, router_deviation=1.)

  def run(params, x, train):
    y, left = model.apply(params, state, x, context(), key=KEY, depth=DEPTH, train=train)
    return y, left['moe'].router
  return params, state, jax.jit(run, static_argnums=2)


@functools.cache
def one_layer(dropout, train):
  """Compiled `(params of a block, x, key) -> y`."""
  model = functional.functionalize(functools.partial(dense_block, dropout=dropout))
  return jax.jit(lambda params, x, key: model.apply(params, {}, x, context(), key=key, depth=DEPTH, train=train)[0])


def layers_one_by_one(params, dropout=0., train=False):
  """<float64>[E,B,S,D]; the key of layer e is the e-th under that of the layers."""
  key = derive(derive(KEY, 'moe'), 'layers')
  return np.stack([one_layer(dropout, train)(jax.tree.map(lambda leaf: leaf[e], params['moe']['layers']), X,
                                             jax.random.fold_in(key, e)) for e in range(E)]).astype(np.float64)


def weights(output):
  return np.asarray(output.plan.to_dense().weight, np.float64)


@pytest.mark.parametrize('name', ['HARD', 'SOFT', 'TOP_2', 'SWITCH'])
def test_the_output_is_the_weighted_sum_of_a_loop_over_layers(name):
  params, _, run = mixture(name)
  y, output = run(params, X, False)
  weight, layers = weights(output), layers_one_by_one(params)
  assert weight.shape == (B, S, E)
  for b, s in np.ndindex(B, S):
    # A token without any weight, padding or over the capacity, passes by.
    expected = sum(weight[b, s, e] * layers[e, b, s] for e in range(E)) if weight[b, s].any() else X[b, s]
    close(y[b, s], expected)
  unrouted = ~weight.any(-1)
  assert unrouted[SEGMENTS == 0].all() and (unrouted.sum() > 2) == (name == 'SWITCH')
  if name != 'SWITCH':
    close(weight.sum(-1)[SEGMENTS > 0], 1)
  if name == 'TOP_2':  # experts of tokens, where tasks have theirs for a row
    assert any(len({tuple(token > 0) for token in row}) > 1 for row in weight)


def test_at_a_high_temperature_the_output_is_the_average_of_the_layers():
  params, _, run = mixture('AVERAGE')
  close(np.where(SEGMENTS[..., None] == 0, X, layers_one_by_one(params).mean(0)), run(params, X, False)[0])


def test_every_layer_drops_by_a_key_of_its_own():
  params, _, run = mixture('AVERAGE', dropout=0.5)
  # All layers alike: without dropout so are their outputs.
  params = params | dict(moe=params['moe'] | dict(layers=jax.tree.map(
      lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), params['moe']['layers'])))
  layers = layers_one_by_one(params, dropout=0.5, train=True)
  close(np.where(SEGMENTS[..., None] == 0, X, layers.mean(0)), run(params, X, True)[0])
  assert all(np.abs(layers[e] - layers[0]).max() > 0.1 for e in range(1, E))
  evaluated = layers_one_by_one(params, dropout=0.5)
  assert (evaluated == evaluated[0]).all()


def test_gradients_of_a_hard_route_are_straight_through():
  """Layers that are not on a route have none, and what the scores learn is `p_e (g_e - sum p g)`, where g_e, over all
  tokens, is the product of the output's gradient with layer e: also of the layers that were not taken."""
  params, _, run = mixture('HARD')
  towards = np.asarray(jax.random.normal(jax.random.key(3), X.shape) * (SEGMENTS > 0)[..., None])
  # Row by row: a task each. The bias of the scores has their gradient, summed over tokens.
  layers = layers_one_by_one(params)
  _, output = run(params, X, True)
  gradient = jax.jit(jax.grad(lambda params, row: (run(params, X, True)[0] * towards)[row].sum()))
  for row in range(B):
    found = gradient(params, row)['moe']
    taken = int(weights(output)[row, 0].argmax())
    for leaf in flatten(found['layers']).values():
      assert np.asarray(leaf[taken]).any() and not np.delete(np.asarray(leaf), taken, axis=0).any()
    g = np.einsum('sd,esd->e', towards[row].astype(np.float64), layers[:, row])
    p = np.asarray(output.probs, np.float64)[row, 0]
    temperature = 2.  # of the first step
    close(found['router']['score']['bo'], p * (g - (p * g).sum()) / temperature, rtol=1e-3)


# ---- models of them -------------------------------------------------------------------------------------------------


def body(router, num_experts=E, **options):
  return dict(num_layers=2, attention=dict(heads=2), feed_forward=dict(hidden=F, activation='gelu'),
              sparse=dict(name='every', n=1), sparse_form='layer',
              moe=dict(num_experts=num_experts, router=router)) | options


def decoder(router, **options):
  return dict(name='decoder', vocab_size=V, dim=D) | body(router, **options)


def dense(config):
  return {key: value for key, value in config.items() if key not in ('moe', 'sparse', 'sparse_form')}


def route(blocks, path):
  return {str(depth): jax.tree.map(lambda leaf: leaf[expert], blocks[str(depth)]['moe']['layers'])
          for depth, expert in enumerate(path)}


BATCH = dict(tokens=IDS, segments=SEGMENTS, positions=POSITION, tasks=TASKS)


def drawn(router):
  """(params, state, compiled apply) of a decoder"""
  model = models.build(decoder(router))
  return *draw_parameters(model, router_deviation=1.), jax.jit(model.apply)


def test_a_route_is_the_dense_model_of_its_layers():
  """Every row of the batch has a task of its own, so a dense model of its own."""
  params, state, apply = drawn(DOMAIN)
  found = apply(params, state, BATCH).logits
  apply_dense = jax.jit(models.build(dense(decoder(DOMAIN))).apply)
  for task in range(3):
    expected = apply_dense(params | dict(blocks=route(params['blocks'], (task, task))), {}, BATCH).logits
    close(found[task][SEGMENTS[task] > 0], expected[task][SEGMENTS[task] > 0])
  assert not np.allclose(expected[0], found[0], atol=0.1)


def test_a_route_of_an_encoder_decoder_is_the_dense_model_of_its_layers():
  config = dict(name='encoder_decoder', vocab_size=V, dim=D, encoder=body(DOMAIN), decoder=body(DOMAIN))
  model = models.build(config)
  params, state = draw_parameters(model)
  batch = dict(encoder_tokens=IDS, decoder_tokens=IDS[:, ::-1], encoder_tasks=TASKS, decoder_tasks=TASKS)
  output = jax.jit(model.apply)(params, state, batch)
  assert set(output.routers) == {f'{side}_block_0{depth}' for side in ('encoder', 'decoder') for depth in (0, 1)}
  apply_dense = jax.jit(models.build(config | dict(encoder=dense(body(DOMAIN)), decoder=dense(body(DOMAIN)))).apply)
  for task in range(3):
    own = {side: params[side] | dict(blocks=route(params[side]['blocks'], (task, task)))
           for side in ('encoder', 'decoder')}
    close(output.logits[task], apply_dense(params | own, {}, batch).logits[task])


@functools.cache
def trained(**options):
  """Compiled `(params, state) -> ((loss, output), gradients)` of a training step of hard routes, with dropout."""
  model = models.build(decoder(HARD, dropout=0.1, **options))
  def loss(params, state):
    output = model.apply(params, state, BATCH, key=KEY, train=True)
    return jnp.square(output.logits).mean(), output
  return model, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_scanned_with_recomputation_is_unrolled():
  (model, step), (scanned, other_step) = trained(), trained(stacking='scan', remat='full')
  params, state = draw_parameters(model, router_deviation=1.)
  (loss, output), gradients = step(params, state)
  stack = Stack(('sparse', 'sparse'))
  assert flatten(scanned.axes)['blocks/0/0/moe/layers/feed_forward/wi'] == ('layers', 'expert', 'embed', 'mlp')
  convert = lambda tree, way: tree | dict(blocks=way(tree['blocks']))
  (other_loss, other), other_gradients = other_step(convert(params, stack.scanned), convert(state, stack.scanned))
  close(other_loss, loss)
  jax.tree.map(close, convert(other_gradients, stack.unrolled), gradients)
  assert int(output.updates['blocks']['1']['moe']['router']['score']['step']) == 1
  jax.tree.map(close, convert(other.updates, stack.unrolled), output.updates)


def test_layers_that_share_a_mixture_are_copies_of_it():
  model, step = trained(sharing='all')
  params, state = draw_parameters(model, router_deviation=1.)
  copies = lambda tree: {name: leaf for name, leaf in tree.items() if name not in ('shared', 'blocks')} | dict(
      blocks=dict.fromkeys('01', tree['shared']))
  (loss, output), gradients = step(params, state)
  (expected, _), by_layer = trained()[1](copies(params), copies(state))
  close(loss, expected)
  jax.tree.map(lambda leaf, *layers: close(leaf, sum(layers)), gradients['shared'], *by_layer['blocks'].values())
  assert int(output.updates['shared']['moe']['router']['score']['step']) == 1


def test_tokens_see_nothing_of_later_ones():
  params, state, apply = drawn(TOP_2)
  later = BATCH | dict(tokens=IDS.at[0, 4].set(0))
  one, two = (apply(params, state, batch).logits[0] for batch in (BATCH, later))
  np.testing.assert_array_equal(one[:4], two[:4])
  assert (one[4:] != two[4:]).any(-1).all()


def test_counts_equal_the_formulas():
  """A block has 4 D^2 + 2 D F + 2 D parameters, a top-1 router D E; a token meets one block of each layer. All blocks
  are computed: FLOPs beyond those of the dense model are E - 1 blocks, and the router's, a layer. Those of a block and
  token: two for each weight of a matrix, and 4 S D for attention to S keys."""
  batch = dict(tokens=jax.ShapeDtypeStruct((2, S), jnp.int32))
  sparse, plain = models.build(decoder(SWITCH)), models.build(dense(decoder(SWITCH)))
  block, rest = 4 * D * D + 2 * D * F + 2 * D, 2 * V * D + D
  total = rest + 2 * (E * block + D * E)
  assert models.parameter_counts(sparse, batch) == dict(total=total, active=rest + 2 * (block + D * E))
  flops = 2 * (4 * D * D + 2 * D * F) + 4 * S * D
  assert models.forward_flops(sparse, batch) - models.forward_flops(plain, batch) == (
      2 * S * 2 * ((E - 1) * flops + 2 * D * E))


MOE = dict(num_experts=E, router=HARD)


@pytest.mark.parametrize('options, message', [
    (dict(moe=MOE | dict(experts=dict(name='feed_forward', hidden=8))),
     r"config\.model\.moe\.experts: with sparse_form='layer' every expert is a whole layer"),
    (dict(moe=MOE | dict(group='sequence', dispatch=dict(name='reference'))), 'Remove dispatch, group'),
    (dict(moe=MOE | dict(expert=3)), r'config\.model\.moe\.expert: .* Allowed: num_experts, router'),
    (dict(moe=MOE | dict(num_experts=0)), r'config\.model\.moe\.num_experts must be .* from 1 to 1048576, not 0'),
    (dict(moe=None), r'config\.model\.moe is missing'),
    (dict(moe=MOE | dict(router=papers.soft_moe())), r'config\.model\.moe\.router: the slots of Soft MoE'),
    (dict(moe=MOE | dict(router=papers.expert_choice())), r'config\.model\.moe\.router cannot be used in a decoder'),
    (dict(sharing='all_but_norms'), r"config\.model\.sharing: with sparse_form='layer' each expert is a layer with its own norms"),
    (dict(extra_feed_forward=dict(hidden=8)), r"config\.model\.extra_feed_forward: with sparse_form='layer'"),
])
def test_keys_that_do_not_apply_to_layers_are_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    models.build(decoder(HARD) | options)
