"""Routing by task, sentence and chance: features against loops, scores against their formulas in float64, and in small
decoders what the papers rest on: whose gradient is zero, and what all tokens of a task or a batch share."""
import ast
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from drawn_parameters import draw_parameters
from moejax import functional, models
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers.cross_task import straight_through, temperature
from moejax.routing.stages import FEATURES, SCORES

G, S, D, E = 2, 10, 8, 4
X = jax.random.normal(jax.random.key(0), (G, S, D))
# As the models number them: by row, padding (the last two of the second row) with the lowest number of its row.
DOCUMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 3], [12, 12, 13, 13, 13, 13, 13, 13, 11, 11]])
VALID = DOCUMENTS != 11
TASKS = jnp.array([[0, 0, 0, 2, 2, 2, 2, 2, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
INPUTS = RouterInputs(valid=VALID, documents=DOCUMENTS, tasks=TASKS)


def feature(**config):
  return FEATURES.build(config, 'config.features', dim=D, rngs=nnx.Rngs(0))


def routed(fragment, key=0, train=True, state=None):
  apply, params, first = compiled_router(repr(fragment))
  return apply(params, first if state is None else state, X, INPUTS,
               key=jax.random.key(key) if train else None, train=train), first


@functools.cache
def compiled_router(fragment):
  made = functional.functionalize(
      lambda rngs: router.build(ast.literal_eval(fragment), 'config.router', dim=D, num_experts=E, rngs=rngs))
  return jax.jit(made.apply, static_argnames='train'), *made.init(jax.random.key(0))


# ---- features -------------------------------------------------------------------------------------------------------


def test_the_mean_of_a_sentence_equals_a_loop_over_its_tokens():
  means = feature(name='sentence')(X, INPUTS)
  x, documents, valid = np.asarray(X, np.float64), np.asarray(DOCUMENTS), np.asarray(VALID)
  for g, s in zip(*np.nonzero(valid)):
    tokens = [x[g, other] for other in range(S) if documents[g, other] == documents[g, s] and valid[g, other]]
    np.testing.assert_allclose(means[g, s], sum(tokens) / len(tokens), rtol=1e-5, atol=1e-6)  # float32 sums


def test_all_tokens_of_a_task_have_its_vector_and_unknown_tasks_have_none():
  one = feature(name='task', num_tasks=2, width=5)
  vectors = np.asarray(one(X, INPUTS))
  assert vectors.shape == (G, S, 5)
  for task in (0, 1):
    np.testing.assert_array_equal(vectors[TASKS == task], np.tile(one.embedding[...][task], ((TASKS == task).sum(), 1)))
  assert np.isnan(vectors[TASKS == 2]).all()
  with pytest.raises(ValueError, match='needs tasks, but the model does not supply them'):
    one(X, RouterInputs())


def test_a_gate_that_is_aware_of_the_task_sees_token_and_task():
  made = router.build(papers.task_aware(num_tasks=3, task_width=5), 'config.router', dim=D, num_experts=E,
                      rngs=nnx.Rngs(0))
  assert made.score.kernel[...].shape == (D + 5, E)
  kernel, embedding = (np.asarray(v[...], np.float64) for v in (made.score.kernel, made.features.embedding))
  expected = np.asarray(X, np.float64) @ kernel[:D] + (embedding @ kernel[D:])[np.asarray(TASKS)]
  found = made.score(made.features(X, INPUTS), key=None, train=False).logits
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# ---- DEMix ----------------------------------------------------------------------------------------------------------


@functools.cache
def demix_decoder():
  """(gradient of the mean loss of a batch, params): a decoder whose feed-forwards have one expert per domain."""
  block = dict(num_experts=3, experts=dict(name='feed_forward', hidden=8), router=papers.demix(num_domains=3),
               dispatch=dict(name='grouped'))
  model = models.build(dict(name='decoder', vocab_size=13, dim=8, num_layers=1, attention=dict(heads=2),
                            feed_forward=dict(hidden=8), sparse=dict(name='every', n=1), moe=block))
  params, state = draw_parameters(model)

  @jax.jit
  def gradient(params, tokens, tasks):
    def loss(params):
      logits = model.apply(params, state, dict(tokens=tokens, tasks=tasks), key=jax.random.key(1), train=True).logits
      picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
      return -picked.mean()
    return jax.grad(loss)(params)
  return gradient, params


def experts_of(gradient):
  return {path: np.asarray(leaf) for path, leaf in flatten(gradient).items() if '/experts/' in path}


def test_the_gradient_of_a_demix_expert_is_the_mean_over_its_own_domain():
  # Balanced batches: E times an expert's gradient of the mean over all rows is that of the mean over its domain's rows,
  # as of a group of devices that share the experts of one domain (optimizer.gradient_scale).
  gradient, params = demix_decoder()
  tokens = jax.random.randint(jax.random.key(2), (6, 7), 0, 13)
  tasks = jnp.broadcast_to(jnp.array([0, 0, 1, 1, 2, 2])[:, None], tokens.shape)
  together = experts_of(gradient(params, tokens, tasks))
  for domain in range(3):
    rows = slice(2 * domain, 2 * domain + 2)
    alone = experts_of(gradient(params, jnp.tile(tokens[rows], (3, 1)), jnp.tile(tasks[rows], (3, 1))))
    for path, leaf in alone.items():
      # Sums in another order: float32 rounding.
      np.testing.assert_allclose(3 * together[path][domain], leaf[domain], rtol=1e-3, atol=1e-6)
      assert leaf[domain].any() and not np.delete(leaf, domain, axis=0).any()


def test_more_domains_than_experts_are_refused():
  with pytest.raises(ConfigError, match='num_tasks = 5 must be at most num_experts = 4'):
    SCORES.build(dict(name='task', num_tasks=5), 'config.score', dim=None, num_experts=4, rngs=nnx.Rngs(0))


# ---- THOR -----------------------------------------------------------------------------------------------------------


def test_training_draws_one_expert_for_the_whole_batch_and_each_equally_often():
  drawn = []
  for key in range(400):
    expert = np.asarray(routed(papers.thor(), key)[0].plan.expert)
    assert (expert == expert[0, 0, 0]).all()
    drawn.append(int(expert[0, 0, 0]))
  counts = np.bincount(drawn, minlength=E)
  # Chi-squared with 3 degrees of freedom: its 1 - 1e-6 quantile is 30.7.
  assert ((counts - 100) ** 2 / 100).sum() < 30.7


def evaluated(level, seed=0, layer=0):
  """[G,S] the experts sampled at evaluation."""
  score = SCORES.build({**papers.thor(level, seed=seed)['score']}, 'config.score', dim=None, num_experts=E,
                       rngs=nnx.Rngs(layer))
  return np.asarray(score(DOCUMENTS, key=None, train=False).logits.argmax(-1))


@pytest.mark.parametrize('level', ['token', 'document'])
def test_evaluation_draws_one_expert_a_token_or_document_once_and_for_all(level):
  seeds = [evaluated(level, seed) for seed in range(12)]
  np.testing.assert_array_equal(seeds[0], evaluated(level, 0))
  assert len({expert.tobytes() for expert in seeds}) > 6
  within = np.concatenate([expert[:, 3:7] for expert in seeds])  # of one document in each row
  alike = (within == within[:, :1]).all(-1)
  assert alike.all() if level == 'document' else not alike.all()
  across = np.stack([expert[0, [0, 3, 8]] for expert in seeds])  # of three documents
  assert not (across == across[:, :1]).all()


def test_layers_draw_on_their_own_and_keep_what_tells_them_apart():
  assert len({evaluated('token', layer=layer).tobytes() for layer in range(3)}) == 3
  out, state = routed(papers.thor())
  merged = functional.merge_updates(state, out.updates)
  assert jax.tree.map(int, merged) == jax.tree.map(int, state)


def test_a_draw_for_every_document_needs_documents():
  with pytest.raises(ConfigError, match=r"Set features=dict\(name='documents'\)"):
    router.build({**papers.thor(), 'features': dict(name='token')}, 'config.router', dim=D, num_experts=E,
                 rngs=nnx.Rngs(0))


# ---- cross-task routes ----------------------------------------------------------------------------------------------


def task_mlp(**config):
  return SCORES.build(dict(name='task_mlp', hidden=6, **config), 'config.score', dim=5, num_experts=E, rngs=nnx.Rngs(1))


def test_the_task_router_is_its_formula_in_float64():
  score = task_mlp(start=2.)
  t = jax.random.normal(jax.random.key(3), (G, S, 5))
  wi, bi, wo, bo = (np.asarray(v[...], np.float64) for v in (score.wi, score.bi, score.wo, score.bo))
  hidden = np.asarray(t, np.float64) @ wi + bi
  hidden *= special.ndtr(hidden)  # the exact GELU, which PyTorch's is by default
  found = score(t, key=None, train=False).logits
  np.testing.assert_allclose(found, (hidden @ wo + bo) / 2, rtol=1e-4, atol=1e-5)


def test_noise_is_gumbels_and_one_for_all_tokens_of_a_group():
  score, t = task_mlp(start=1.), jnp.zeros((4000, 2, 5))
  noise = np.asarray(score(t, key=jax.random.key(0), train=True).logits - score(t, key=None, train=False).logits)
  np.testing.assert_array_equal(noise[:, 0], noise[:, 1])
  # Mean Euler's gamma and variance pi^2/6; 16,000 draws: five standard errors are 0.05, and 0.13 of the variance.
  assert noise[:, 0].mean() == pytest.approx(np.euler_gamma, abs=0.05)
  assert noise[:, 0].var() == pytest.approx(np.pi**2 / 6, abs=0.13)


@pytest.mark.parametrize('step, expected', [
    (0, 2.), (1000, 2 * math.exp(-0.3)), (9985, 0.10003), (9987, 0.1), (10**6, 0.1)])
def test_the_temperature_falls_exponentially_to_its_end(step, expected):
  # 2 exp(-3e-4 t) reaches 0.1 at t = ln(20) / 3e-4 = 9985.8.
  assert float(temperature(jnp.int32(step), 2., 3e-4, .1)) == pytest.approx(expected, rel=2e-4)


def test_training_counts_the_steps_that_cool_it():
  fragment = papers.cross_task(num_tasks=3, start=2., decay=0.5)
  first, state = routed(fragment)
  second, _ = routed(fragment, state=functional.merge_updates(state, first.updates))
  assert int(first.updates['score']['step']) == 1 and int(second.updates['score']['step']) == 2
  cold, warm = (routed(fragment, train=False, state=given)[0].probs for given in (
      functional.merge_updates(state, first.updates), state))
  # Logits over a temperature that is exp(-1/2) times as high.
  logit = lambda p: np.log(np.asarray(p[0, 0], np.float64)) - np.log(np.asarray(p[0, 0, :1], np.float64))
  np.testing.assert_allclose(logit(cold), logit(warm) * math.exp(0.5), rtol=1e-3, atol=1e-4)


def test_at_a_high_temperature_routing_is_the_average_of_the_experts():
  out, _ = routed(papers.cross_task(num_tasks=3, relaxation='softmax', start=1e7, end=1.), train=False)
  expected = np.where(np.asarray(VALID)[..., None], 1 / E, 0.)
  np.testing.assert_allclose(out.plan.weight, np.broadcast_to(expected, (G, S, E)), atol=1e-6)


def test_at_a_low_temperature_routing_is_a_single_path():
  out, _ = routed(papers.cross_task(num_tasks=3, relaxation='softmax', start=1e-4, end=1e-4), train=False)
  weight = np.asarray(out.plan.weight)[np.asarray(VALID)]
  np.testing.assert_allclose(np.sort(weight, -1), np.tile([0., 0., 0., 1.], (len(weight), 1)), atol=1e-6)


def test_straight_through_is_a_one_hot_with_the_gradient_of_the_softmax():
  logits, towards = jax.random.normal(jax.random.key(5), (2, 7, E))
  value, gradient = jax.value_and_grad(lambda logits: (straight_through(logits) * towards).sum())(logits)
  best = np.asarray(logits).argmax(-1)
  assert float(value) == pytest.approx(float(np.asarray(towards)[np.arange(7), best].sum()), rel=1e-6)
  p = special.softmax(np.asarray(logits, np.float64), -1)
  expected = p * (towards - (p * towards).sum(-1, keepdims=True))
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_all_tokens_of_a_task_take_one_path():
  for train in (True, False):
    weight = np.asarray(routed(papers.cross_task(num_tasks=3), train=train)[0].plan.weight)[0]
    for tokens in (slice(0, 3), slice(3, 8), slice(8, 10)):
      assert (weight[tokens] == weight[tokens][0]).all() and sorted(weight[tokens][0]) == [0, 0, 0, 1]
