"""Kinds of blocks and their patterns: what a config may write, and that each form computes the same."""
import functools

import jax
import numpy as np
import pytest

from moejax import functional, models
from moejax.config import ConfigError
from moejax.functional import flatten, unflatten
from moejax.layers.stack import Stack
from moejax.models.mixtures import mixture_of
from moejax.routing import papers

TOKENS = np.random.default_rng(0).integers(1, 30, (2, 8), np.int32)
ATTENTION, FFN = dict(heads=2), dict(hidden=12)
MOE = dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=papers.loss_free(k=2),
           dispatch=dict(name='reference'))  # compiles fastest
OTHER = MOE | dict(num_experts=2, router=papers.switch())
# In an order that makes two segments when scanned, the second with a unit of two.
KINDS = ('local', 'local', 'full', 'local', 'full')
BLOCKS = dict(
    local=dict(mixer=dict(name='attention', window=2, post_norm=dict(name='rms_norm'), **ATTENTION),
               ffn=dict(name='feed_forward', residual_scale=0.5, **FFN)),
    full=dict(ffn=dict(name='moe', **MOE), mixer=dict(name='attention', **ATTENTION),
              last=dict(name='moe', pre_norm=None, **OTHER)))


def decoder(**config):
  return models.build(dict(name='decoder', vocab_size=30, dim=8, routing_leak='oracle', **config))


@functools.cache
def run(stacking, train=True):
  """(model, params, loss, gradients by path if unrolled, output)"""
  model = decoder(num_layers=5, blocks=BLOCKS, pattern=dict(name='cycle', kinds=KINDS), stacking=stacking, dropout=0.1)
  params, state = jax.jit(model.init)(jax.random.key(0))

  @jax.jit
  def loss(params):
    output = model.apply(params, state, dict(tokens=TOKENS), key=jax.random.key(1), train=train)
    return output.logits.std() + sum(sum(router.losses.values()) for router in output.routers.values()), output
  (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  unroll = Stack(KINDS).unrolled if stacking == 'scan' else lambda tree: tree
  return model, params, value, flatten(gradients | dict(blocks=unroll(gradients['blocks']))), output


def test_kinds_in_any_order_are_the_same_scanned_and_unrolled():
  (_, _, value, gradients, output), (_, _, other, others, scanned) = run('unrolled'), run('scan')
  assert value == other
  np.testing.assert_array_equal(output.logits, scanned.logits)
  for path, gradient in gradients.items():  # sums over layers in programs that differ
    np.testing.assert_allclose(gradient, others[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize('stacking', ['unrolled', 'scan'])
def test_each_router_of_a_block_has_its_own_output_losses_and_state(stacking):
  model, params, _, _, output = run(stacking)
  assert list(output.routers) == ['block_02/ffn', 'block_02/last', 'block_04/ffn', 'block_04/last']
  assert output.routers['block_02/ffn'].metrics['load'].shape == (4,)
  assert output.routers['block_02/last'].metrics['load'].shape == (2,) and output.routers['block_02/last'].losses
  changed = functional.merge_updates(model.init(jax.random.key(0))[1], output.updates)
  assert {path.split('/', 1)[1].split('/router')[0].rsplit('/', 1)[1] for path in flatten(changed)} == {'ffn'}


def test_a_block_adds_its_branches_in_order():
  """x + scale * post_norm(sublayer(pre_norm(x))), by hand from the sublayers of the first block."""
  model = decoder(num_layers=1, blocks=dict(local=BLOCKS['local']), positions=dict(name='none'))
  params, _ = model.init(jax.random.key(0))
  params = unflatten({path: leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)  # norms with a scale that shows
                      for i, (path, leaf) in enumerate(flatten(params).items())})
  block = jax.tree.map(np.float64, params['blocks']['0'])
  norm = lambda x, scale: scale * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
  x = np.float64(params['embedding']['table'])[TOKENS]

  mixer, h = block['mixer'], norm(x, block['mixer_norm']['scale'])
  q, k, v = (np.einsum('bsd,dhk->bhsk', h, mixer[name]) for name in ('query', 'key', 'value'))
  logits = np.einsum('bhsk,bhtk->bhst', q, k) / 2
  sees = np.tril(np.ones((8, 8))) - np.tril(np.ones((8, 8)), -2)  # itself and the token before
  weights = np.where(sees, np.exp(logits), 0)
  mixed = np.einsum('bhst,bhtk,hkd->bsd', weights / weights.sum(-1, keepdims=True), v, mixer['out'])
  x = x + norm(mixed, block['mixer_post_norm']['scale'])
  hidden = norm(x, block['ffn_norm']['scale']) @ block['ffn']['wi']
  gelu = hidden * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
  x = x + 0.5 * gelu @ block['ffn']['wo']
  expected = norm(x, np.float64(params['final_norm']['scale']))
  found = jax.jit(model.apply)(params, {}, dict(tokens=TOKENS)).features
  np.testing.assert_allclose(found, expected, atol=2e-5)  # float32, a few hundred operations on numbers around 1


def test_the_shorthand_is_two_kinds():
  short = decoder(num_layers=4, attention=ATTENTION, feed_forward=FFN, moe=MOE, sparse=dict(name='every', n=2))
  attention = dict(name='attention', **ATTENTION)
  long = decoder(num_layers=4, pattern=dict(name='cycle', kinds=('dense', 'sparse')), blocks=dict(
      dense=dict(attention=attention, feed_forward=dict(name='feed_forward', **FFN)),
      sparse=dict(attention=attention, moe=dict(name='moe', **MOE))))
  params, state = short.init(jax.random.key(0))
  batch, key = dict(tokens=TOKENS), jax.random.key(1)
  expected = jax.jit(functools.partial(short.apply, train=True))(params, state, batch, key=key)
  own = unflatten({path.replace('feed_forward_norm', 'moe_norm') if path[:8] in ('blocks/1', 'blocks/3') else path: leaf
                   for path, leaf in flatten(params).items()})  # a sparse block keeps the name of the norm it takes over
  jax.tree.map(np.testing.assert_array_equal, own, long.init(jax.random.key(0))[0])
  found = jax.jit(functools.partial(long.apply, train=True))(own, state, batch, key=key)
  np.testing.assert_array_equal(found.logits, expected.logits)
  assert list(found.routers) == list(expected.routers) == ['block_01', 'block_03']


@pytest.mark.parametrize('pattern, kinds', [
    (dict(name='cycle', kinds=('a', 'b')), 'ababa'),
    (dict(name='cycle', kinds=('a', 'b', 'b')), 'abbab'),
    (dict(name='runs', runs=(('b', 1), ('a', 4))), 'baaaa')])
def test_patterns(pattern, kinds):
  blocks = {kind: dict(ffn=dict(name='feed_forward', hidden=size)) for kind, size in (('a', 4), ('b', 6))}
  shapes = decoder(num_layers=5, blocks=blocks, pattern=pattern).shapes()[0]['blocks']
  assert ''.join({4: 'a', 6: 'b'}[shapes[str(depth)]['ffn']['wi'].shape[1]] for depth in range(5)) == kinds


def test_the_config_of_a_router_is_found_by_its_name():
  model = dict(num_layers=5, blocks=BLOCKS, pattern=dict(name='cycle', kinds=KINDS))
  where, config = mixture_of(model, 'block_04/last')
  assert where == 'config.model.blocks.full.last' and config['router'] == OTHER['router']
  where, config = mixture_of(dict(encoder=dict(moe=MOE)), 'encoder_block_01')
  assert where == 'config.model.encoder.moe' and config == MOE


@pytest.mark.parametrize('config, message', [
    (dict(blocks=BLOCKS), r'config.model.pattern is missing: config.model.blocks has the kinds local, full'),
    (dict(blocks=BLOCKS, pattern=dict(name='cycle', kinds=('local', 'fall'))),
     r"config.model.pattern: there is no kind 'fall' in config.model.blocks. Allowed: local, full"),
    (dict(blocks=BLOCKS, pattern=dict(name='runs', runs=(('local', 1), ('full', 1)))),
     r'config.model.pattern names 2 layers, and config.model.num_layers is 3'),
    (dict(blocks=BLOCKS, pattern=dict(name='cycle', kinds=('local',))), r'config.model.blocks.full is not used'),
    (dict(blocks=BLOCKS, attention=ATTENTION), r'config.model.attention: config.model.blocks says what each kind'),
    (dict(blocks=dict(a=dict(mixer=dict(name='attention', heds=2)))),
     r"config.model.blocks.a.mixer.heds: SelfAttention has no such key. Did you mean 'heads'\?.*residual_scale"),
    (dict(blocks=dict(a=dict(mixer=dict(name='atention')))), r"config.model.blocks.a.mixer.name: there is no sublayer"),
    (dict(feed_forward=FFN), r'config.model.attention is missing: a Transformer needs attention and feed_forward'),
])
def test_what_cannot_be_a_block_is_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    models.build(dict(name='decoder', vocab_size=30, dim=8, num_layers=3, **config))


def test_a_decoder_asks_all_branches_for_their_leak():
  leaking = dict(a=dict(x=dict(name='feed_forward', **FFN), y=dict(name='moe', **(MOE | dict(router=papers.expert_choice())))))
  with pytest.raises(ConfigError, match='config.model.blocks.a.y.router cannot be used in a decoder'):
    models.build(dict(name='decoder', vocab_size=30, dim=8, num_layers=1, blocks=leaking))


def test_the_norms_of_each_layer_stay_its_own_where_all_else_is_shared():
  blocks = dict(a=dict(mixer=dict(name='attention', post_norm=dict(name='rms_norm'), **ATTENTION)))
  paths = flatten(decoder(num_layers=2, blocks=blocks, sharing='all_but_norms').axes)
  assert {path for path in paths if path.startswith('blocks')} == {
      f'blocks/{depth}/{norm}/scale' for depth in (0, 1) for norm in ('mixer_norm', 'mixer_post_norm')}
  assert not [path for path in paths if path.startswith('shared') and 'norm' in path]
