"""The decoder-only model: dependencies of tokens, by gradient and by perturbation, and refusals."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from moejax import models
from moejax.config import ConfigError
from moejax.routing import papers

TOKENS = jnp.asarray([[1, 5, 2, 9, 4, 7], [3, 3, 8, 1, 12, 6]])
ROUTERS = dict(dense=None, switch=tiny.SWITCH, dropless=tiny.DROPLESS)


def features_of(name):
  """`(tokens, segments, positions) -> ModelOutput`, compiled once for a router and a shape."""
  _, params, state, apply = tiny.initialised(tiny.decoder(ROUTERS[name], positions=dict(name='learned', length=6)))

  def run(tokens, segments=None, positions=None):
    whole = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments, positions = whole[0] if segments is None else segments, whole[1] if positions is None else positions
    return apply(params, state, dict(tokens=tokens, segments=segments, positions=positions))
  return run


@pytest.mark.parametrize('name', ROUTERS)
def test_gradients_reach_all_earlier_tokens_and_no_later_ones(name):
  # Learned positions are added to the embeddings, so that their table reaches each position of a row.
  model, params, state, _ = tiny.initialised(tiny.decoder(ROUTERS[name], positions=dict(name='learned', length=6)))

  @jax.jit
  @jax.grad
  def gradient(table, position):
    replaced = params | dict(encoding=dict(table=table))
    return jnp.sin(model.apply(replaced, state, dict(tokens=TOKENS[:1])).features[0, position]).sum()

  for position in range(6):
    strength = np.abs(gradient(params['encoding']['table'], position)).sum(-1)
    assert (strength[:position + 1] > 0).all()
    np.testing.assert_array_equal(strength[position + 1:], 0)


@pytest.mark.parametrize('name', ROUTERS)
def test_changing_a_token_changes_nothing_before_it(name):
  # Gradients do not see changes of routes and of who gets a slot; this does. Rows share a group: a later row may lose
  # slots to an earlier one, never the other way round.
  run = features_of(name)
  before = run(TOKENS).logits
  for position in range(6):
    after = run(TOKENS.at[1, position].set(0)).logits
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1, :position], after[1, :position])
    assert not np.array_equal(before[1, position:], after[1, position:])


@pytest.mark.parametrize('positions', ['learned', 'rope'])
def test_packed_documents_get_the_logits_they_get_alone(positions):
  length = dict(length=6) if positions == 'learned' else {}
  _, params, state, apply = tiny.initialised(tiny.decoder(tiny.DROPLESS, positions=dict(name=positions, **length)))
  packed = apply(params, state, dict(tokens=TOKENS, segments=jnp.asarray([[1, 1, 1, 2, 2, 2]] * 2),
                                     positions=jnp.asarray([[0, 1, 2, 0, 1, 2]] * 2))).logits
  alone = apply(params, state, dict(tokens=TOKENS.reshape(4, 3))).logits
  np.testing.assert_allclose(packed, alone.reshape(packed.shape), atol=1e-5)  # sums in another order


@pytest.mark.parametrize('name', ['switch', 'dropless'])
def test_padding_changes_nothing_and_is_not_routed(name):
  run, segments = features_of(name), jnp.asarray([[1, 1, 1, 1, 0, 0]] * 2)
  one, other = (run(TOKENS.at[:, 4:].set(token), segments) for token in (0, 11))
  np.testing.assert_array_equal(one.logits[:, :4], other.logits[:, :4])
  router = one.routers['block_01']
  assert not router.plan.kept.reshape(2, 6, -1)[:, 4:].any()
  jax.tree.map(np.testing.assert_array_equal, (router.losses, router.metrics),
               (other.routers['block_01'].losses, other.routers['block_01'].metrics))


@pytest.mark.parametrize('router', [papers.expert_choice(), papers.vmoe(priority='batch'), papers.soft_moe()],
                         ids=['expert_choice', 'batch_priority', 'soft_moe'])
@pytest.mark.parametrize('routing_leak', ['refuse', 'slots'])
def test_routers_that_see_the_future_are_refused_before_anything_is_compiled(router, routing_leak):
  with pytest.raises(ConfigError, match='config.model.moe.router cannot be used in a decoder.*looking at later'):
    models.build(tiny.decoder(router, routing_leak=routing_leak))


def test_competition_for_slots_is_accepted_only_if_configured():
  with pytest.raises(ConfigError, match="routing_leak='slots'"):
    models.build(tiny.decoder(tiny.GSHARD, stacking='scan'))
  models.build(tiny.decoder(tiny.GSHARD, stacking='scan', routing_leak='slots'))


def test_tied_heads_share_the_embedding():
  assert 'head' in models.build(tiny.decoder(head='untied')).axes
  tied, params, state, apply = tiny.initialised(tiny.decoder(head='tied', num_layers=1))
  assert 'head' not in tied.axes
  one = apply(params, state, dict(tokens=TOKENS))
  scaled = models.build(tiny.decoder(head='tied_scaled', num_layers=1))
  other = jax.jit(scaled.apply)(params, state, dict(tokens=TOKENS))
  expected = np.asarray(one.features, np.float64) @ np.asarray(params['embedding']['table'], np.float64).T
  np.testing.assert_allclose(one.logits, expected, atol=1e-6)
  np.testing.assert_allclose(other.logits, expected / np.sqrt(8), atol=1e-6)


@pytest.mark.parametrize('change, message', [
    (dict(moe=None, sparse=dict(name='every', n=2)), 'config.model.moe is missing'),
    (dict(sparse=dict(name='evry', n=2)), "Did you mean 'every'"),
    (dict(attention=dict(heads=3)), 'config.model.attention.heads'),
    (dict(positions=dict(name='learnt')), "Did you mean 'learned'"),
    (dict(stacking='scanned'), "stacking must be one of 'scan', 'unrolled'"),
    (dict(feed_forward=dict(hiden=3)), 'config.model.feed_forward.hiden'),
    (dict(lengths=3), 'config.model.lengths'),
])
def test_configs_that_cannot_be_built_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    models.build(tiny.decoder() | change)


def test_an_oracle_s_router_is_accepted_only_by_name():
  router = papers.hash_layers(13, of='next_ids')
  with pytest.raises(ConfigError, match='looking at later ones'):
    models.build(tiny.decoder(router, routing_leak='train'))
  models.build(tiny.decoder(router, routing_leak='oracle'))
