"""Layers that share parameters (ALBERT, WideNet), against a stack without sharing that holds the same values."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional, models
from moejax.config import ConfigError
from moejax.layers.stack import Stack
from moejax.routing import papers

LAYERS = 3
NORMS = ('attention_norm', 'feed_forward_norm')
TOKENS = jnp.asarray([[1, 5, 2, 9, 4, 7], [3, 3, 8, 1, 12, 6]])
# The bias of loss-free balancing is state of the router; the z-loss reaches the router's kernel.
ROUTER = papers.loss_free(k=2) | dict(balance=dict(bias=dict(rate=0.5), z=0.1))


def config(sharing, num_layers=LAYERS, sparse=True, **options):
  moe = dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=ROUTER, dispatch=dict(name='grouped'))
  mixtures = dict(moe=moe, sparse=dict(name='every', n=1)) if sparse else {}
  return dict(name='decoder', vocab_size=13, dim=8, num_layers=num_layers, attention=dict(heads=2),
              feed_forward=dict(hidden=16), sharing=sharing) | mixtures | options


def drawn(model):
  """Parameters and state with values that tell all layers apart."""
  draw = np.random.default_rng(0)
  params, state = model.shapes()
  value = lambda path, leaf: jnp.float32(draw.normal(float(path.endswith('scale')), 0.4, leaf.shape))
  return tuple(functional.unflatten({path: value(path, leaf) for path, leaf in functional.flatten(tree).items()})
               for tree in (params, state))


def train(model, params, state):
  @jax.jit
  def run(params):
    def loss(params):
      output = model.apply(params, state, dict(tokens=TOKENS), key=jax.random.key(1), train=True)
      router = sum(sum(router.losses.values()) for router in output.routers.values())
      return jnp.square(output.logits).mean() + router, output
    return jax.value_and_grad(loss, has_aux=True)(params)
  (loss, output), gradients = run(params)
  return loss, output, gradients


def copies(tree, sharing):
  """The tree of the model without sharing whose every layer holds what is shared."""
  tree = dict(tree)
  shared, own = tree.pop('shared'), tree.pop('blocks', {})
  return tree | dict(blocks={str(depth): shared | own.get(str(depth), {}) for depth in range(LAYERS)})


@functools.cache
def trained(sharing):
  model = models.build(config(sharing))
  params, state = drawn(model)
  return model, params, state, train(model, params, state)


@functools.cache
def trained_copies(sharing):
  model, params, state, _ = trained(sharing)
  return train(models.build(config('none')), copies(params, sharing), copies(state, sharing))


# The same float32 operations in programs that differ.
close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize('sharing', ['all', 'all_but_norms'])
class TestSharing:

  def test_is_the_stack_whose_layers_are_copies(self, sharing):
    (loss, output, _), (expected, other, _) = trained(sharing)[3], trained_copies(sharing)
    close(loss, expected)
    assert list(output.routers) == ['block_00', 'block_01', 'block_02']
    for depth, router in output.routers.items():
      np.testing.assert_array_equal(router.plan.expert, other.routers[depth].plan.expert)

  def test_the_gradient_of_shared_parameters_is_the_sum_over_layers(self, sharing):
    gradients, by_layer = trained(sharing)[3][2], trained_copies(sharing)[2]['blocks']
    flat = functional.flatten(gradients['shared'])
    assert any(path.startswith('moe/router') for path in flat)
    for path, leaf in flat.items():
      close(leaf, sum(functional.flatten(by_layer[str(depth)])[path] for depth in range(LAYERS)))
    for depth, own in gradients.get('blocks', {}).items():
      jax.tree.map(close, own, {name: by_layer[depth][name] for name in NORMS})

  def test_the_state_of_the_router_moves_once_by_the_choices_of_all_layers(self, sharing):
    _, _, state, (_, output, _) = trained(sharing)
    bias = lambda tree: tree['moe']['router']['balance']['bias']['bias']
    plans = [router.plan for router in trained_copies(sharing)[1].routers.values()]
    load = sum(np.bincount(np.asarray(plan.expert)[np.asarray(plan.kept)], minlength=plan.num_experts) for plan in plans)
    expected = bias(state['shared']) + 0.5 * np.sign(load.mean() - load)
    np.testing.assert_allclose(bias(functional.merge_updates(state, output.updates)['shared']), expected, rtol=1e-5)

  def test_scanned_is_unrolled(self, sharing):
    _, params, state, (loss, output, gradients) = trained(sharing)
    scanned = models.build(config(sharing, stacking='scan', remat='full'))
    convert = lambda tree, way: tree | {name: way(tree[name]) for name in ('blocks',) if name in tree}
    stack = Stack(('sparse',) * LAYERS)
    other_loss, other, other_gradients = train(scanned, convert(params, stack.scanned), state)
    close(other_loss, loss)
    jax.tree.map(close, convert(other_gradients, stack.unrolled), gradients)
    jax.tree.map(close, other.updates, output.updates)

  def test_counts_parameters_once_and_flops_as_often_as_they_are_used(self, sharing):
    model, params, _, _ = trained(sharing)
    whole = models.build(config('none'))
    batch = dict(tokens=jax.ShapeDtypeStruct((2, 6), jnp.int32))
    assert models.forward_flops(model, batch) == models.forward_flops(whole, batch)
    # One block: attention 4 D^2, router 4 D, 4 experts of 2 D F; norms of D: two a layer, or two, and the last.
    block, norms = 4 * 64 + 4 * 8 + 4 * 2 * 64, {'all': 2, 'all_but_norms': 2 * LAYERS}[sharing] + 1
    rest = 2 * 13 * 8 + norms * 8
    assert models.parameter_counts(model, batch) == dict(total=block + rest, active=block - 2 * 2 * 64 + rest)


def test_only_the_norms_of_each_layer_route_a_token_to_different_experts_at_different_depths():
  """With residual branches of zero every layer sees the same x; then routes differ by the norms alone."""
  for sharing in ('all', 'all_but_norms'):
    model, params, state, _ = trained(sharing)
    silent = jax.tree.map(lambda leaf: leaf, params)
    silent['shared']['attention']['out'] = 0 * params['shared']['attention']['out']
    silent['shared']['moe']['experts']['wo'] = 0 * params['shared']['moe']['experts']['wo']
    routers = jax.jit(model.apply)(silent, state, dict(tokens=TOKENS)).routers
    first, last = (np.sort(routers[depth].plan.expert) for depth in ('block_00', 'block_02'))
    assert (first == last).all() == (sharing == 'all')


def test_one_expert_that_all_share_is_the_dense_shared_block():
  """WideNet with a single expert is ALBERT's sharing of a dense block, whose feed-forward has the expert's weights."""
  moe = dict(num_experts=1, experts=dict(name='feed_forward', hidden=16), router=papers.widenet(k=1),
             dispatch=dict(name='reference'))
  sparse = models.build(config('all_but_norms') | dict(moe=moe))
  params, state = drawn(sparse)
  shared = dict(params['shared'])
  shared['feed_forward'] = jax.tree.map(lambda w: w[0], shared.pop('moe')['experts'])
  dense = models.build(config('all_but_norms', sparse=False))
  run = lambda model, params: jax.jit(model.apply)(params, {}, dict(tokens=TOKENS)).logits
  close(run(sparse, params), run(dense, params | dict(shared=shared)))


def test_layers_of_two_kinds_have_nothing_to_share():
  with pytest.raises(ConfigError, match=r"config\.model\.sharing = 'all' needs layers of one kind.*dense and sparse"):
    models.build(config('all') | dict(sparse=dict(name='every', n=2)))
