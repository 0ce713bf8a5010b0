"""Mixtures of experts at test time: posteriors against products of probabilities and identities of Bayes' rule, and the
evaluator against the single-expert passes that it mixes."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drawn_parameters import draw_parameters
from moejax import data, evaluation, models
from moejax.config import ConfigError
from moejax.evaluation import domains
from moejax.parallel import mesh as mesh_lib
from moejax.routing import papers

J, S = 3, 9
STARTS = np.array([True, False, False, False, True, False, False, False, False])
DOCUMENTS = [slice(0, 4), slice(4, 9)]
PRIOR = np.array([0.5, 0.2, 0.3])


def log_probs(seed=0):
  return np.log(np.random.default_rng(seed).uniform(0.05, 0.9, size=(J, S)))


def test_the_posterior_of_all_tokens_follows_bayes_rule():
  found, p = domains.mixture_weights(log_probs(), STARTS, PRIOR, 'all_tokens'), np.exp(log_probs())
  for document in DOCUMENTS:
    for position in range(document.start, document.stop):
      weight = PRIOR * p[:, document.start:position].prod(-1)
      np.testing.assert_allclose(found[:, position], weight / weight.sum(), rtol=1e-10)


def test_the_posterior_of_the_previous_token_forgets_all_others_and_starts_from_equal_weights():
  found, p = domains.mixture_weights(log_probs(), STARTS, PRIOR, 'previous_token'), np.exp(log_probs())
  for position, first in enumerate(STARTS):
    weight = np.ones(J) if first else PRIOR * p[:, position - 1]
    np.testing.assert_allclose(found[:, position], weight / weight.sum(), rtol=1e-10)


def test_bayes_rule_gives_a_document_its_mean_probability_over_experts():
  weights = domains.mixture_weights(log_probs(), STARTS, PRIOR, 'all_tokens')
  mixed = domains.mixture_log_probs(log_probs(), weights)
  for document in DOCUMENTS:
    expected = (PRIOR * np.exp(log_probs())[:, document].prod(-1)).sum()
    assert mixed[document].sum() == pytest.approx(math.log(expected), rel=1e-10)


def test_bayes_is_never_worse_than_one_expert_by_more_than_its_prior():
  for seed in range(20):
    weights = domains.mixture_weights(log_probs(seed), STARTS, PRIOR, 'all_tokens')
    mixed = domains.mixture_log_probs(log_probs(seed), weights)
    for document in DOCUMENTS:
      for expert in range(J):
        assert -mixed[document].sum() <= -math.log(PRIOR[expert]) - log_probs(seed)[expert, document].sum() + 1e-12


@pytest.mark.parametrize('evidence', ['previous_token', 'all_tokens'])
def test_an_expert_without_prior_has_no_weight(evidence):
  without = domains.mixture_weights(log_probs(), STARTS, np.array([0.4, 0., 0.6]), evidence)
  assert (without[1] == 0).all()
  others = domains.mixture_weights(log_probs()[[0, 2]], STARTS, np.array([0.4, 0.6]), evidence)
  np.testing.assert_allclose(without[[0, 2]], others, rtol=1e-12)


@pytest.mark.parametrize('evidence', ['previous_token', 'all_tokens'])
def test_one_expert_is_its_own_mixture(evidence):
  one = log_probs()[:1]
  weights = domains.mixture_weights(one, STARTS, np.ones(1), evidence)
  np.testing.assert_array_equal(weights, np.ones((1, S)))
  np.testing.assert_allclose(domains.mixture_log_probs(one, weights), one[0], rtol=1e-12)


def test_the_moving_prior_is_an_exponential_average_of_posteriors():
  posteriors = np.random.default_rng(0).dirichlet(np.ones(J), size=6)
  prior = PRIOR
  for posterior in posteriors:
    prior = domains.moving_prior(prior, posterior, 0.3)
  # 0.7^6 of the start, and 0.3 * 0.7^k of the k-th last row.
  expected = 0.7**6 * PRIOR + sum(0.3 * 0.7**k * posteriors[-1 - k] for k in range(6))
  np.testing.assert_allclose(prior, expected, rtol=1e-12)


# ---- the evaluator --------------------------------------------------------------------------------------------------

NAMES = ('one', 'three', 'two')  # in alphabetical order, as their tasks
MESH = mesh_lib.build(dict(data=1), devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for index, name in enumerate(NAMES):
    (folder / name).write_text('\n'.join(chr(97 + index + n % 4) * (5 + 3 * n) for n in range(6)))
  files = {name: dict(name='text', document='line', files=dict(train=str(folder / name), test=str(folder / name)))
           for name in NAMES}
  return data.build(dict(name='language_model', source=dict(name='mixture', sources=files), length=12, batch_size=6,
                         tokenizer=dict(name='bytes')))


@functools.cache
def model():
  moe = dict(num_experts=J, experts=dict(name='feed_forward', hidden=8), router=papers.demix(num_domains=J),
             dispatch=dict(name='grouped'))
  made = models.build(dict(name='decoder', vocab_size=258, dim=8, num_layers=1, attention=dict(heads=2),
                           feed_forward=dict(hidden=8), sparse=dict(name='every', n=1), moe=moe))
  params, state = draw_parameters(made)
  return made, params, state


def measure(pipeline, apply=None, **config):
  made, params, state = model()
  evaluators = evaluation.build({'test': dict(config)}, pipeline=pipeline, apply=apply or made.apply, mesh=MESH)
  return evaluators['test'](params, state)


def sent_to(expert):
  """The model with every token sent to one expert."""
  def apply(params, state, batch, **kwargs):
    return model()[0].apply(params, state, {**batch, 'tasks': jnp.full_like(batch['tasks'], expert)}, **kwargs)
  return apply


def test_the_oracle_is_the_language_model_given_the_domain_and_domains_add_up(pipeline):
  found, whole = measure(pipeline, name='domains'), measure(pipeline, name='language_model')
  for name in ('loss', 'perplexity', 'bits_per_byte', 'tokens'):
    assert found[name] == pytest.approx(whole[name], rel=1e-5)  # float32 sums on the device
  tokens = dict.fromkeys(range(J), 0)
  for batch in pipeline.evaluate('test'):
    for task in tokens:
      tokens[task] += int(((batch['tasks'] == task) & (batch['loss_mask'] > 0)).sum())
  mean = sum(count * found[f'{NAMES[task]}/loss'] for task, count in tokens.items()) / sum(tokens.values())
  assert found['loss'] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize('config', [dict(evidence='all_tokens', prior='updating'),
                                    dict(prior='cached', cached_rows=2)])
def test_a_posterior_of_one_expert_is_the_language_model_of_that_expert(pipeline, config):
  left = measure(pipeline, name='domains', mixture='posterior', removed=('one', 'two'), **config)
  alone = measure(pipeline, sent_to(1), name='language_model')
  assert left['loss'] == pytest.approx(alone['loss'], rel=1e-5)


def passes(pipeline):
  """Every row of the test split: (log p [J,S] of its counted targets, starts)."""
  made, params, state = model()
  apply = jax.jit(made.apply)
  for batch in pipeline.evaluate('test'):
    logits = [np.asarray(apply(params, state, {**batch, 'tasks': np.full_like(batch['tasks'], j)}).logits, np.float64)
              for j in range(J)]
    for row, mask in enumerate(batch['loss_mask'] > 0):
      if mask.any():
        chosen = np.stack([logit[row] - np.log(np.exp(logit[row]).sum(-1, keepdims=True)) for logit in logits])
        yield chosen[:, np.arange(12), batch['targets'][row]][:, mask], batch['positions'][row][mask] == 0


def test_mixtures_average_the_probabilities_of_whole_passes(pipeline):
  rows = list(passes(pipeline))
  count = sum(len(starts) for _, starts in rows)
  uniform = -sum(np.log(np.exp(p).mean(0)).sum() for p, _ in rows) / count
  assert measure(pipeline, name='domains', mixture='uniform')['loss'] == pytest.approx(uniform, rel=1e-5)
  equal = np.full(J, 1 / J)
  posterior = 0.
  for p, starts in rows:
    weights = [equal if first else np.exp(p[:, i - 1]) / np.exp(p[:, i - 1]).sum() for i, first in enumerate(starts)]
    posterior -= sum(np.log(weight @ np.exp(p[:, i])) for i, weight in enumerate(weights))
  found = measure(pipeline, name='domains', mixture='posterior')['loss']
  assert found == pytest.approx(posterior / count, rel=1e-5)


def test_invalid_removals_are_refused(pipeline):
  for config, message in ((dict(removed=('four',), mixture='uniform'), 'cannot remove four from the domains one'),
                          (dict(removed=('one',)), 'a mixture other than "oracle"'),
                          (dict(removed=NAMES, mixture='uniform'), 'Name some but not all of them'),
                          (dict(decay=0.), 'decay must be a float above 0 and of at most 1')):
    with pytest.raises(ConfigError, match=message):
      measure(pipeline, name='domains', **config)
