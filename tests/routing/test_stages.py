"""Invalid values of a stage's keys, and stages that do not fit together, are refused when a router is built."""
import math

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from moejax import dispatch
from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs

D, E = 6, 4


def build(config):
  return router.build(config, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))


def refused(config, message):
  with pytest.raises(ConfigError, match=message):
    build(config)


@pytest.mark.parametrize('factor', [0, 0., -1.25, math.nan, math.inf, '1'])
@pytest.mark.parametrize('fragment', [papers.switch, papers.expert_choice, papers.mtf_expert_choice, papers.moe_2d])
def test_a_capacity_is_finite_and_above_0(fragment, factor):
  refused(fragment(capacity_factor=factor), r'config\.router\.(place|select)\.capacity_factor must be')
  if fragment is not papers.expert_choice:
    refused(fragment(eval_capacity_factor=factor), r'config\.router\.(place|select)\.eval_capacity_factor must be')


@pytest.mark.parametrize('coefficient', [-0.01, math.nan, -math.inf])
@pytest.mark.parametrize('name', ['switch', 'z', 'importance', 'mean_importance'])
def test_a_balance_loss_is_not_rewarded(name, coefficient):
  for entry in (coefficient, dict(coefficient=coefficient)):
    refused(papers.switch() | dict(balance={name: entry}), rf'config\.router\.balance\.{name}(\.coefficient)? must be')


@pytest.mark.parametrize('change', [
    dict(score=dict(name='linear', init_std=-0.02)), dict(score=dict(name='linear', jitter=1.5)),
    dict(score=dict(name='linear', dropout=1.)), dict(score=dict(name='linear', noise_std=-1.)),
    dict(score=dict(name='cosine', epsilon=0.)), dict(score=dict(name='cosine', project=0)),
    dict(score=dict(name='cosine', temperature='divide', temperature_init=-1.)),
    dict(score=dict(name='noisy_linear', noise_floor=-1e-2)), dict(score=dict(name='comet', k=0)),
    dict(score=dict(name='comet', k=2, gamma=0.)), dict(score=dict(name='dselect_k', k=2, gamma=-1.)),
    dict(score=dict(name='hierarchical', groups=0)), dict(score=dict(name='hierarchical', groups=3)),
    dict(score=dict(name='task_mlp', end=0.)), dict(score=dict(name='hash', vocab_size=9, seed=-1)),
    dict(features=dict(name='task', num_tasks=0)), dict(features=dict(name='with_shared', shared_dim=-1)),
    dict(features=dict(name='bigrams', buckets=0)),
    dict(select=dict(name='top_k', k=0)), dict(select=dict(name='sample', k=-1)),
    dict(select=dict(name='gshard_top_2', threshold=-0.1)),
    dict(select=dict(name='thresholded_top_k', k=2, threshold=(-1.,))),
    dict(select=dict(name='ranked', alternatives=-1)), dict(select=dict(name='sinkhorn', epsilon=0.)),
    dict(select=dict(name='sinkhorn', iterations=0)), dict(select=dict(name='auction', rounds=-1)),
    dict(place=dict(name='capacity', capacity_factor=1., min_capacity=-1)),
    dict(balance=dict(bias=dict(rate=-1e-3))),
], ids=lambda change: str(next(iter(change.values())))[:60])
def test_numbers_that_mean_nothing_are_refused(change):
  stage = next(iter(change))
  refused(papers.switch() | dict(balance={}) | change, rf'config\.router\.{stage}\.[a-z_.0-9]+ must be .*, not ')


@pytest.mark.parametrize('change, message', [
    (dict(balance=dict(hierarchical_switch=0.1)), r"hierarchical_switch needs 'outer' .* that can: 'hierarchical'"),
    (dict(balance=dict(selector_entropy=0.1)), r"selector_entropy needs 'selectors' .* that can: 'comet', 'dselect_k'"),
    (dict(balance=dict(reachable=0.1)), "reachable needs 'selectors'"),
    (dict(balance=dict(threshold=0.1)), r"threshold needs 'threshold' .* that can: 'linear_with_thresholds'"),
    (papers.comet(k=2) | dict(balance=dict(permutation_entropy=0.1)), "permutation_entropy needs 'permutation'"),
    (dict(select=dict(name='batchwise', experts_per_token=2.), place=dict(name='dropless'), balance={}),
     r"config\.router\.select needs 'threshold'"),
    (dict(select=dict(name='hashed', k=2), balance={}), r"config\.router\.select needs 'experts' .* that can: 'hash'"),
    (dict(features=dict(name='token_with_ids')), "score 'linear' and features 'token_with_ids' do not fit"),
    (dict(score=dict(name='distilled', vocab_size=9, stage_1_steps=2)), "score 'distilled' and features 'token' do not fit"),
    (papers.expert_choice() | dict(weigh=dict(name='hierarchical', groups=2)), r'config\.router\.weigh: .* requires token choice'),
    (papers.expert_choice() | dict(place=dict(name='two_level_capacity', groups=2)), r'config\.router\.place: a capacity'),
    (papers.lucidrains(straight_through=True) | dict(weigh=dict(name='softmax', renormalize='after')),
     r"config\.router\.place: .*'straight_through'.*renormalize"),
])
def test_stages_that_do_not_fit_are_refused_when_built(change, message):
  refused(papers.switch() | change, message)


@pytest.mark.parametrize('name', ['gather', 'grouped'])
def test_chunks_are_counted_from_1(name):
  with pytest.raises(ConfigError, match=r'config\.dispatch\.chunks must be an int of at least 1'):
    dispatch.build(dict(name=name, chunks=0), 'config.dispatch')


@pytest.mark.parametrize('fragment, message', [
    (papers.hash_layers(vocab_size=9), r'^config\.router\.features needs token ids, but the model does not supply them .* Language models have them'),
    (papers.demix(num_domains=2), 'needs tasks, but the model does not supply them .* with the task or domain'),
    (papers.limoe(image_experts=1., text_experts=1.), r'^config\.router\.balance\.local_entropy needs modalities, but .*two_modalities'),
    (papers.speech_moe(shared_dim=3), 'needs shared, but .* network that all routers share'),
])
def test_a_missing_router_input_is_named_with_a_remedy(fragment, message):
  module, x = build(fragment), jnp.zeros((1, 3, D))
  with pytest.raises(ConfigError, match=message):
    module(x, RouterInputs(), key=jax.random.key(0), train=True)


@pytest.mark.parametrize('change, path', [
    (dict(place=dict(name='capacity', capacity_factor=0.1, convention='tutel')), 'place.capacity_factor'),
    (papers.expert_choice() | dict(select=dict(name='expert_choice', capacity_factor=0.1, convention='lingvo')),
     'select.capacity_factor'),
])
def test_a_capacity_that_keeps_nothing_is_refused_with_its_path_while_tracing(change, path):
  module = build(papers.switch() | dict(balance={}) | change)
  with pytest.raises(ConfigError, match=rf'^config\.router\.{path} = 0\.1 drops every token'):
    module(jnp.zeros((1, 3, D)), RouterInputs(), key=jax.random.key(0), train=True)
