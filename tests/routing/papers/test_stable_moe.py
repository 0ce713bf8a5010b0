"""StableMoE's stages: their routes, the parameters they train, and that stage 2 is frozen; losses by hand."""
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import functional
from moejax.config import ConfigError
from moejax.models.sequences import TokenRows
from moejax.routing import papers, router
from moejax.routing.papers.stable_moe import balance_loss, distillation_loss

G, S, D, E, V, STAGE_1 = 2, 12, 8, 4, 11, 3


@functools.cache
def built(words='unigram'):
  fragment = papers.stable_moe(V, STAGE_1, words=words) | dict(place=dict(name='dropless'))
  fragment['score'] = fragment['score'] | dict(gain=1., width=5)
  model = functional.functionalize(
      lambda rngs: router.build(fragment, 'config.router', dim=D, num_experts=E, rngs=rngs))
  return model, *(jax.jit(functools.partial(model.apply, train=train)) for train in (True, False))


@functools.cache
def initial(words='unigram'):
  """(params, state)"""
  return jax.jit(built(words)[0].init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnames='words')
def gradients_of(params, state, x, inputs, words='unigram'):
  """Of (all losses and the weight, the distillation loss alone); the latter also by what is routed."""
  def total(params):
    out = built(words)[0].apply(params, state, x, inputs, train=True)
    return sum(out.losses.values()) + out.plan.weight.sum()
  def taught(params, x):
    return built(words)[0].apply(params, state, x, inputs, train=True).losses['distillation']
  return jax.grad(total)(params), jax.grad(taught, argnums=(0, 1))(params, x)


def at(state, step):
  return functional.merge_updates(state, dict(score=dict(step=jnp.int32(step))))


# Documents of 12 tokens, and of 3, 7 and 2.
POSITIONS = jnp.array([[*range(12)], [*range(3), *range(7), *range(2)]])
SEGMENTS = jnp.array([[1] * 12, [1] * 3 + [2] * 7 + [3] * 2])


def batch(seed):
  ids = jax.random.randint(jax.random.key(seed), (G, S), 0, V)
  return jax.random.normal(jax.random.key(100 + seed), (G, S, D)), TokenRows(ids, SEGMENTS, POSITIONS).router_inputs


def greedy(params, x):
  return np.argmax(np.asarray(x) @ np.asarray(params['score']['experts']).T, axis=-1)


def by_word(params, ids, words='unigram'):
  """What `z e'` chooses, by a float64 loop over the tokens of POSITIONS. ids: <int>[G,S] -> <int>[G,S]."""
  table, experts = (np.asarray(params['score'][name], np.float64) for name in ('words_table', 'words_experts'))
  ids, chosen = np.asarray(ids), np.empty(ids.shape, int)
  for g, s in np.ndindex(ids.shape):
    within = int(POSITIONS[g, s])
    match words:
      case 'unigram':
        z = table[ids[g, s]]
      case 'bigram':
        z = (table[ids[g, s]] + table[ids[g, s - 1 if within else s]]) / 2  # a first word is its own neighbour
      case 'convolution':
        kernel = np.asarray(params['score']['words_kernel'], np.float64)
        z = sum(kernel[back] * table[ids[g, s - back]] for back in range(5) if back <= within)
    chosen[g, s] = np.argmax(experts @ z)
  return chosen


def test_stage_1_routes_by_the_token_and_weighs_by_its_sigmoid():
  params, state = initial()
  x, inputs = batch(0)
  plan = built()[1](params, state, x, inputs).plan
  np.testing.assert_array_equal(plan.expert[..., 0], greedy(params, x))
  logits = np.asarray(x) @ np.asarray(params['score']['experts']).T
  np.testing.assert_allclose(plan.weight[..., 0], 1 / (1 + np.exp(-logits.max(-1))), rtol=1e-5)


def test_evaluation_is_distilled_in_stage_1_too():
  params, state = initial()
  x, inputs = batch(0)
  chosen = built()[2](params, state, x, inputs).plan
  np.testing.assert_array_equal(chosen.expert[..., 0], by_word(params, inputs.token_ids))
  assert (chosen.expert[..., 0] != greedy(params, x)).any()
  # The weight is still that of the token and the expert it goes to.
  logits = np.take_along_axis(np.asarray(x) @ np.asarray(params['score']['experts']).T, np.asarray(chosen.expert), -1)
  np.testing.assert_allclose(chosen.weight, 1 / (1 + np.exp(-logits)), rtol=1e-5)


@pytest.mark.parametrize('words', ['unigram', 'convolution'])
def test_stage_2_routes_are_a_function_of_the_id_that_no_step_changes(words):
  """Trained with AdamW, whose momentum and weight decay move parameters without gradients."""
  model, train, evaluate = built(words)
  params, state = initial(words)
  optimizer = optax.adamw(0.05, weight_decay=0.1)
  moments = optimizer.init(params)

  @jax.jit
  def step(params, state, moments, x, inputs):
    def loss(params):
      out = model.apply(params, state, x, inputs, train=True)
      return sum(out.losses.values()) + jnp.mean(out.plan.weight * jnp.sin(x[..., :1])), out
    gradients, out = jax.grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(gradients, moments, params)
    return optax.apply_updates(params, updates), functional.merge_updates(state, out.updates), moments, out

  frozen, probe = None, batch(99)
  for number in range(12):
    x, inputs = batch(number)
    params_before = params
    params, state, moments, out = step(params, state, moments, x, inputs)
    if number < STAGE_1:
      np.testing.assert_array_equal(out.plan.expert[..., 0], greedy(params_before, x))
    else:
      frozen = params_before if frozen is None else frozen  # what the last step of stage 1 left
      np.testing.assert_array_equal(out.plan.expert[..., 0], by_word(frozen, inputs.token_ids, words))
      evaluated = evaluate(params, state, *probe).plan.expert[..., 0]
      np.testing.assert_array_equal(evaluated, by_word(frozen, probe[1].token_ids, words))
  # It took a copy to hold them still.
  assert (by_word(params, probe[1].token_ids, words) != by_word(frozen, probe[1].token_ids, words)).any()
  # A checkpoint in stage 2 holds all that routing needs.
  restored = jax.tree.map(jnp.asarray, jax.device_get(state))
  np.testing.assert_array_equal(evaluate(params, restored, *probe).plan.expert[..., 0],
                                by_word(frozen, probe[1].token_ids, words))


@pytest.mark.parametrize('step, moved', [(STAGE_1 - 1, {'experts', 'words_table', 'words_experts'}),
                                         (STAGE_1, {'experts'}), (STAGE_1 + 5, {'experts'})])
def test_gradients_reach_the_word_router_in_stage_1_alone(step, moved):
  params, state = initial()
  gradients, _ = gradients_of(params, at(state, step), *batch(0))
  assert {name for name, leaf in gradients['score'].items() if leaf.any()} == moved


@pytest.mark.parametrize('words, reached', [('unigram', {'words_table', 'words_experts'}),
                                            ('convolution', {'words_table', 'words_experts', 'words_kernel'})])
def test_the_distillation_loss_reaches_the_word_router_and_nothing_else(words, reached):
  params, state = initial(words)
  _, (gradients, of_x) = gradients_of(params, state, *batch(0), words=words)
  assert {name for name, leaf in gradients['score'].items() if leaf.any()} == reached
  assert not of_x.any()


def test_losses_are_0_in_stage_2():
  params, state = initial()
  for step, some in ((STAGE_1 - 1, True), (STAGE_1, False)):
    losses = built()[1](params, at(state, step), *batch(0)).losses
    assert set(losses) == {'stable_moe', 'distillation'} and all(bool(loss) == some for loss in losses.values())


def test_both_losses_are_those_derived_by_hand():
  # Two experts, four tokens, greedy choices 0 0 0 1: mean load 2, so expert 0 counts (3-2)/2 = 1/2, expert 1 -1/2.
  # sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2. Sum: 1/2 (3/4 + 3/4 + 1/2) - 1/2 (3/4) = 1 - 3/8 = 5/8; over 4 tokens 5/32.
  ln3 = float(np.log(3))
  logits = jnp.float32([[[ln3, 0], [ln3, -9], [0, -1], [-5, ln3]]])
  valid = jnp.ones((1, 4), bool)
  assert float(balance_loss(logits, jnp.array([[0, 0, 0, 1]]), valid)) == pytest.approx(5 / 32, rel=1e-6)
  # softmax(ln 3, 0) = (3/4, 1/4): teaching 0 costs ln(4/3), teaching 1 costs ln 4; their mean.
  taught = distillation_loss(jnp.float32([[[ln3, 0], [ln3, 0]]]), jnp.array([[0, 1]]), jnp.ones((1, 2), bool))
  assert float(taught) == pytest.approx((np.log(4 / 3) + np.log(4)) / 2, rel=1e-6)


def test_the_balance_loss_is_0_at_equal_loads_and_pushes_away_from_the_fuller_expert():
  logits = jax.random.normal(jax.random.key(0), (1, 8, E))
  valid = jnp.ones((1, 8), bool)
  assert float(balance_loss(logits, jnp.arange(8)[None] % E, valid)) == 0
  gradient = jax.grad(balance_loss)(logits, jnp.array([[0, 0, 0, 0, 1, 1, 2, 2]]), valid)[0]
  assert (gradient[:4, 0] > 0).all()  # 4 tokens, mean 2: descending lowers their scores
  assert not gradient[4:].any()  # exactly the mean


@pytest.mark.parametrize('words', ['bigram', 'convolution'])
def test_words_before_count_within_their_document(words):
  params, state = initial(words)
  x, inputs = batch(0)
  chosen = built(words)[2](params, state, x, inputs).plan.expert[..., 0]
  np.testing.assert_array_equal(chosen, by_word(params, inputs.token_ids, words))
  assert (chosen != by_word(params, inputs.token_ids)).any()
  # Neither a later word nor one of another document has a part in it.
  for changed, same in ((np.s_[0, 6], np.s_[0, :6]), (np.s_[1, 2], np.s_[1, 3:])):
    other = TokenRows(inputs.token_ids.at[changed].add(1) % V, SEGMENTS, POSITIONS).router_inputs
    np.testing.assert_array_equal(built(words)[2](params, state, x, other).plan.expert[..., 0][same], chosen[same])


def test_a_convolution_does_not_depend_on_how_tokens_are_grouped():
  params, state = initial('convolution')
  x, inputs = batch(0)
  whole = built('convolution')[2](params, state, x, inputs).plan.expert
  halves = jax.tree.map(lambda a: a.reshape(2 * G, S // 2, *a.shape[2:]), (x, inputs))
  np.testing.assert_array_equal(built('convolution')[2](params, state, *halves).plan.expert.reshape(whole.shape), whole)


def test_a_convolution_without_earlier_words_raises():
  params, state = initial('convolution')
  x, inputs = batch(0)
  with pytest.raises(ValueError, match='needs earlier ids, but the model does not supply them'):
    built('convolution')[0].apply(params, state, x, dataclasses.replace(inputs, earlier_ids=None))


@pytest.mark.parametrize('change, message', [
    (dict(features=dict(name='token')), "score 'distilled' and features 'token' do not fit"),
    (dict(score=dict(name='linear')), "score 'linear' and features 'token_with_ids' do not fit"),
    (dict(score=dict(name='linear'), features=dict(name='token')),
     "config.router.balance.stable_moe needs 'distilled' from the score, which score 'linear', as configured, does not provide"),
])
def test_parts_that_do_not_fit_are_refused_when_built(change, message):
  with pytest.raises(ConfigError, match=message):
    router.build(papers.stable_moe(V, STAGE_1) | change, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))


def test_a_stage_1_of_no_steps_is_refused():
  with pytest.raises(ConfigError, match='config.router.score.stage_1_steps must be an int of at least 1'):
    router.build(papers.stable_moe(V, 0), 'config.router', dim=D, num_experts=E, rngs=None)
