"""What every paper's router does when tokens come in parts. docs/decoding.md lists it, and is held to it here.

The model has no attention, so that only routers can tell a token in a chunk from the same token in the row: equal is to
the bit. Oracle: one pass without a cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from docs_commands import ROOT, blocks
from moejax import models
from moejax.config import ConfigError
from moejax.functional import flatten, unflatten
from moejax.routing import papers
from moejax.routing.place import conventions

PAGE = ROOT / 'docs/decoding.md'
# What the rows of the page's table say, in order.
EXACT, SLOTS, DRAWS, LATER, NETWORK = (
    tuple(row.split('|')[2].replace(' ', '').split(','))
    for row in PAGE.read_text().split('| with a cache | routers |')[1].split('\n\n')[0].split('\n')[2:])

LENGTH, V, E = 8, 11, 4  # ids and tasks as in `Paper.example`
TASKS = jnp.asarray([[0] * LENGTH, [2] * LENGTH])


def paper(name, **arguments):
  return papers.PAPERS[name].fragment(**papers.PAPERS[name].example | arguments)


def placed(router, **place):
  return router | dict(place=router['place'] | place)


def without_drops(router):
  """As many slots as tokens."""
  second = dict(second_level_factor=100.) if router['place']['name'] == 'two_level_capacity' else {}
  return placed(router, capacity_factor=100., eval_capacity_factor=100., **second)


ROUTERS = {name: paper(name) for name in papers.PAPERS}
VARIANTS = {
    'hash_layers of bigrams': paper('hash_layers', of='bigrams'),
    'hash_layers of previous ids': paper('hash_layers', of='previous_ids'),
    'hash_layers of positions': paper('hash_layers', of='positions'),
    'stable_moe of bigrams': without_drops(paper('stable_moe', words='bigram')),
    'stable_moe of five words': without_drops(paper('stable_moe', words='convolution')),
    'cross_task on hard routes': paper('cross_task', relaxation='straight_through'),
    'dselect_k by task': paper('dselect_k', gate='task', tasks=3),
    'task_moe by token': paper('task_moe', level='token'),
    'fastmoe without capacity': paper('fastmoe', gate='naive'),
    'switch without drops': without_drops(paper('switch')),
}


def decoder(router, routing_leak, group='batch'):
  segments = router['select']['name'] == 'hashed'  # MultiHash
  experts = dict(name='segments', hidden=8, segments=2) if segments else dict(name='feed_forward', hidden=8)
  moe = dict(name='moe', num_experts=E, experts=experts, router=router,
             dispatch=dict(name='segments' if segments else 'reference'), group=group)
  return models.build(dict(name='decoder', vocab_size=V, dim=8, num_layers=1, blocks=dict(a=dict(moe=moe)),
                           routing_leak=routing_leak))


def accepted(router, group='batch'):
  """The decoder that accepts the least, or ConfigError."""
  for leak in ('slots', 'train'):
    try:
      return decoder(router, leak, group)
    except ConfigError as error:
      refusal = error
  raise refusal


class Built:
  """A model with drawn parameters, compiled once for each size of a chunk, without what no test reads."""

  def __init__(self, router, group='batch'):
    self.model, draw = accepted(router, group), np.random.default_rng(0)
    drawn = lambda tree: unflatten({
        path: jnp.float32(draw.normal(1. if path.endswith('scale') else 0., 0.6, leaf.shape))
        if leaf.dtype == jnp.float32 else leaf for path, leaf in flatten(tree).items()})
    params, state = self.model.shapes()
    # Biases and frozen tables are drawn; counters and the numbers of layers are as they start.
    state = drawn(jax.jit(self.model.init)(jax.random.key(0))[1]) if state else state
    params = drawn(params)

    @jax.jit
    def apply(tokens, tasks, cache):
      output = self.model.apply(params, state, dict(tokens=tokens, tasks=tasks), cache=cache)
      return output.logits, output.cache, output.routers['block_00'].metrics['dropped']
    self.apply = apply

  def whole(self, tokens):
    """(logits, share of choices that are dropped)"""
    logits, _, dropped = self.apply(tokens, TASKS[:, :tokens.shape[1]], None)
    return logits, dropped

  def in_chunks(self, tokens, sizes):
    cache, logits, start = self.model.init_cache(len(tokens), LENGTH), [], 0
    for size in sizes:
      these = slice(start, start + size)
      of_chunk, cache, _ = self.apply(tokens[:, these], TASKS[:, these], cache)
      start, logits = start + size, [*logits, of_chunk]
    return jnp.concatenate(logits, axis=1)


def some_tokens(seed):
  return jnp.asarray(np.random.default_rng(seed).integers(0, V, (2, LENGTH)), jnp.int32)


def test_the_page_lists_every_paper_by_what_its_config_says():
  listed = dict(zip(('exact', 'slots', 'draws', 'later', 'network'), map(sorted, (EXACT, SLOTS, DRAWS, LATER, NETWORK))))
  found = {kind: [] for kind in listed}
  for name, router in sorted(ROUTERS.items()):
    try:
      accepted(router)
    except ConfigError:
      found['later'].append(name)
      continue
    drawn = 'random' in (router['select'].get('eval_second'), router['select'].get('eval_policy'))
    slots = 'capacity_factor' in router.get('place', {})
    found['network' if name == 'speech_moe' else 'draws' if drawn else 'slots' if slots else 'exact'].append(name)
  assert listed == found


@pytest.mark.parametrize('name', [*EXACT, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
def test_chunks_and_single_tokens_equal_one_pass(name):
  router, tokens = Built((ROUTERS | VARIANTS)[name]), some_tokens(1)
  expected, _ = router.whole(tokens)
  assert np.abs(expected - expected[:, :1]).max() > 0.1  # tokens differ
  for seed in range(3):  # a prompt in chunks of one and three tokens in any order, then tokens one by one
    prompt = np.random.default_rng(seed).permutation([3, 1, 1])
    np.testing.assert_array_equal(router.in_chunks(tokens, [*prompt, 1, 1, 1]), expected)


@pytest.mark.parametrize('name', SLOTS)
def test_tokens_alone_are_never_dropped_and_equal_one_pass_without_drops(name):
  config, tokens = ROUTERS[name], some_tokens(3)
  own = Built(placed(config, min_capacity=1), group='sequence')
  ample = Built(without_drops(config), group='sequence')
  assert own.whole(tokens)[1] > 0
  np.testing.assert_array_equal(own.in_chunks(tokens, [1] * LENGTH), ample.whole(tokens)[0])


def test_a_chunk_has_the_slots_of_a_row_of_its_length():
  switch, tokens = Built(ROUTERS['switch']), some_tokens(3)
  np.testing.assert_array_equal(switch.in_chunks(tokens, [3, 3])[:, 3:], switch.whole(tokens[:, 3:6])[0])


@pytest.mark.parametrize('name', DRAWS)
def test_a_token_alone_gets_the_same_draw_at_every_step(name):
  """So a row of one id is routed in one way; in one pass, where each place has a draw of its own, in several."""
  same = jnp.full((2, LENGTH), 7)
  router = Built(without_drops(ROUTERS[name]) | dict(select=ROUTERS[name]['select'] | dict(threshold=1.)))
  alone, (whole, _) = router.in_chunks(same, [1] * LENGTH), router.whole(same)
  np.testing.assert_array_equal(alone, jnp.broadcast_to(alone[:, :1], alone.shape))
  assert (whole != whole[:, :1]).any()
  np.testing.assert_array_equal(alone[0, 0], whole[0, 0])


@pytest.mark.parametrize('name', LATER)
def test_routers_that_see_later_tokens_are_refused_when_built_and_have_no_cache(name):
  where = r'config\.model\.blocks\.a\.moe\.router'
  with pytest.raises(ConfigError, match=f'{where} cannot be used in a decoder: .* reveals the targets to the model'):
    accepted(ROUTERS[name])
  with pytest.raises(ConfigError, match=f'{where} cannot be used with a cache: in evaluation it routes each token by'):
    decoder(ROUTERS[name], 'oracle').init_cache(1, LENGTH)


def test_the_lstm_model_and_the_encoder_decoder_refuse_them_a_cache_too():
  moe = dict(num_experts=E, experts=dict(name='feed_forward', hidden=8), router=ROUTERS['expert_choice'],
             dispatch=dict(name='reference'))
  side = dict(num_layers=1, attention=dict(heads=2), feed_forward=dict(hidden=8))
  sparse = side | dict(moe=moe, sparse=dict(name='every', n=1))
  common = dict(vocab_size=V, dim=8, routing_leak='oracle')
  refused = lambda where: pytest.raises(ConfigError, match=f'config.model{where}.moe.router cannot be used with a cache')
  with refused(''):
    models.build(dict(name='lstm', moe=moe, **common)).init_cache(1, LENGTH)
  with refused('.decoder'):
    models.build(dict(name='encoder_decoder', encoder=side, decoder=sparse, **common)).init_cache(1, LENGTH, LENGTH)
  # An encoder sees its whole source.
  models.build(dict(name='encoder_decoder', encoder=sparse, decoder=side, **common)).init_cache(1, LENGTH, LENGTH)


@pytest.mark.parametrize('name', NETWORK)
def test_a_router_that_needs_a_network_that_decoders_do_not_have_is_refused_before_compilation(name):
  model = accepted(ROUTERS[name])
  with pytest.raises(ConfigError, match='moe.router.features needs shared, but the model does not supply them'):
    jax.eval_shape(model.apply, *model.shapes(), dict(tokens=some_tokens(0)), cache=model.init_cache(2, LENGTH))


def test_three_conventions_leave_a_lone_token_of_many_experts_without_a_slot():
  no_slot = [name for name in conventions._CONVENTIONS if conventions.capacity(1, 64, 2, 2., name) < 1]
  assert no_slot == ['lingvo', 'fastmoe', 'widenet']
  assert all(conventions.capacity(1, 64, 2, 2., name, minimum=1) == 1 for name in no_slot)
  glam, tokens = Built(ROUTERS['glam']), some_tokens(0)
  with pytest.raises(ConfigError, match=r'place\.capacity_factor = 1.0 drops every token: .*set a min_capacity'):
    glam.in_chunks(tokens, [1])


def test_thor_draws_for_a_row_by_its_number_and_for_a_token_by_its_place_in_the_call():
  tokens = some_tokens(4)
  by_token = Built(paper('thor', level='token'))
  alone, (whole, _) = by_token.in_chunks(tokens, [1] * LENGTH), by_token.whole(tokens)
  np.testing.assert_array_equal(alone[0, 0], whole[0, 0])
  assert (alone != whole).any()


def test_the_code_of_the_page_runs():
  names = {}
  for code in blocks(PAGE, 'python'):
    exec(code, names)
  assert names['generated'].shape == (2, 20) and names['output'].logits.shape == (2, 1, 256)
