"""Domains added to a DEMix decoder and taken out: whose logits are whose, bit for bit, also after the new expert has
trained; the nearest expert by a float64 loop, and on text that one of the experts speaks."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from drawn_parameters import draw_parameters
from moejax import models
from moejax.functional import flatten
from moejax.layers.stack import Stack
from moejax.routing import papers
from moejax.surgery.add_domain import add_domain, copy_domain, new_expert_alone, posterior, remove_domain
from moejax.training import optimizer

V, J, ROWS, S = 13, 3, 4, 7


def decoder(dispatch='grouped', **options):
  moe = dict(num_experts=J, experts=dict(name='feed_forward', hidden=8), router=papers.demix(num_domains=J),
             dispatch=dict(name=dispatch), group='sequence')
  return dict(name='decoder', vocab_size=V, dim=8, num_layers=2, attention=dict(heads=2), feed_forward=dict(hidden=8),
              sparse=dict(name='every', n=1), moe=moe) | options


@functools.cache
def drawn():
  return draw_parameters(models.build(decoder()))


@functools.cache
def compiled(dispatch, domains):
  config = decoder(dispatch)
  config['moe'] |= dict(num_experts=domains, router=papers.demix(num_domains=domains))
  return jax.jit(models.build(config).apply)


def logits(parts, batch, task):
  """Of `batch`, all of it of one domain."""
  config, params, state = parts
  apply = compiled(config['moe']['dispatch']['name'], config['moe']['num_experts'])
  return np.asarray(apply(params, state, {**batch, 'tasks': jnp.full((ROWS, S), task)}).logits)


def text(seed=0, spoken_by=None):
  """A batch of two documents per row; `spoken_by`: the targets are that expert's most likely tokens."""
  tokens = jax.random.randint(jax.random.key(seed), (ROWS, S), 0, V)
  batch = dict(tokens=tokens, segments=jnp.tile(jnp.array([1, 1, 1, 2, 2, 2, 2]), (ROWS, 1)),
               positions=jnp.tile(jnp.array([0, 1, 2, 0, 1, 2, 3]), (ROWS, 1)), loss_mask=jnp.ones((ROWS, S)))
  said = tokens if spoken_by is None else jnp.asarray(logits((decoder(), *drawn()), batch, spoken_by).argmax(-1))
  return batch | dict(targets=said)


@pytest.mark.parametrize('dispatch', ['grouped', 'reference'])
def test_the_new_domain_has_the_logits_of_the_one_copied_and_all_others_their_own(dispatch):
  before = decoder(dispatch), *drawn()
  batch = text(1)
  for copied in range(J):
    after = copy_domain(*before, copied)
    assert after[0]['moe']['num_experts'] == after[0]['moe']['router']['score']['num_tasks'] == J + 1
    assert before[0] == decoder(dispatch)
    np.testing.assert_array_equal(logits(after, batch, J), logits(before, batch, copied))
    for domain in range(J):
      np.testing.assert_array_equal(logits(after, batch, domain), logits(before, batch, domain))


def test_the_copied_expert_is_the_most_similar_to_the_new_text():
  before = decoder(), *drawn()
  batches = [text(seed, spoken_by=1) for seed in (2, 3)]
  found, expected = add_domain(*before, batches), copy_domain(*before, 1)
  assert found[0] == expected[0]
  jax.tree.map(np.testing.assert_array_equal, found[1:], expected[1:])


def test_training_on_the_new_domain_leaves_the_logits_of_all_others_bit_for_bit():
  config, params, state = copy_domain(decoder(), *drawn(), 1)
  model = models.build(config)
  adamw = dict(name='adamw', clip=0.1, weight_decay=0.1, schedule=dict(name='constant', peak=1e-2))
  transform = optimizer.build(adamw | new_expert_alone(config), 'config.optimizer', model=model, steps=10).transform
  batch = text(4) | dict(tasks=jnp.full((ROWS, S), J))

  @jax.jit
  def step(params, moments):
    def loss(params):
      output = model.apply(params, state, batch, key=jax.random.key(0), train=True)
      return optax.softmax_cross_entropy_with_integer_labels(output.logits, batch['targets']).mean()
    value, gradients = jax.value_and_grad(loss)(params)
    updates, moments = transform.update(gradients, moments, params)
    return value, optax.apply_updates(params, updates), moments

  trained, moments, losses = params, transform.init(params), []
  for _ in range(3):
    value, trained, moments = step(trained, moments)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  for path, leaf in flatten(trained).items():
    moved = np.asarray(leaf != flatten(params)[path])
    if '/moe/experts/' in path:
      assert moved[J].any() and not moved[:J].any()
    else:
      assert not moved.any()
  for domain in range(J):
    np.testing.assert_array_equal(logits((config, trained, state), batch, domain),
                                  logits((config, params, state), batch, domain))


def test_a_domain_that_is_taken_out_takes_nothing_of_the_others_with_it():
  before, batch = (decoder(), *drawn()), text(1)
  after = remove_domain(*before, 1)
  for new, old in ((0, 0), (1, 2)):
    np.testing.assert_array_equal(logits(after, batch, new), logits(before, batch, old))
  again = remove_domain(*copy_domain(*before, 1), J)
  assert again[0] == before[0]
  jax.tree.map(np.testing.assert_array_equal, again[1:], before[1:])


def test_scanned_layers_are_changed_as_unrolled_ones():
  params, state = drawn()
  stack = Stack(('sparse', 'sparse'))
  scan = lambda tree: tree | dict(blocks=stack.scanned(tree['blocks']))
  scanned = decoder(stacking='scan')
  for change in (copy_domain, remove_domain):
    jax.tree.map(np.testing.assert_array_equal, change(scanned, scan(params), state, 1)[1],
                 scan(change(decoder(), params, state, 1)[1]))


def test_the_nearest_expert_follows_the_moving_average_of_posteriors_at_row_ends():
  """By kernelmachine/demix: likelihoods of the token before alone, the last document of a row the one that counts."""
  params, state = drawn()
  batches = [text(seed) | dict(loss_mask=jnp.ones((ROWS, S)).at[1].set(0).at[2, -1].set(0)) for seed in (5, 6)]
  prior = np.full(J, 1 / J)
  for batch in batches:
    log_probs = np.stack([special.log_softmax(logits((decoder(), params, state), batch, j).astype(np.float64), axis=-1)
                          for j in range(J)])
    for row in (0, 2, 3):  # row 1 does not count
      last = S - 1 - (row == 2)
      likelihood = np.exp(log_probs[:, row, last - 1, batch['targets'][row, last - 1]])
      prior = 0.7 * prior + 0.3 * prior * likelihood / (prior * likelihood).sum()
  np.testing.assert_allclose(posterior(decoder(), params, state, batches), prior, rtol=1e-4)


def test_a_model_without_demix_or_the_domain_is_refused():
  params, state = drawn()
  by_token = decoder()
  by_token['moe'] |= dict(router=papers.loss_free(k=1))
  for config in (by_token, decoder(moe=None)):
    with pytest.raises(ValueError, match='config.model is not a DEMix decoder'):
      add_domain(config, params, state, [text()])
  with pytest.raises(ValueError, match='domains 0 to 2 and must keep one: domain 3 cannot be removed'):
    remove_domain(decoder(), params, state, J)
  with pytest.raises(ValueError, match='domains 0 to 2, but no domain 3 to copy'):
    copy_domain(decoder(), params, state, J)
  with pytest.raises(ValueError, match='there is no text of the new domain'):
    add_domain(decoder(), params, state, [])
