"""Metrics do not depend on the batch size of an evaluator: either they are the same, or the size is refused.

Oracle: the evaluator with the rows of a training batch.
"""
import digits_config
import jax
import pytest

from moejax import evaluation
from moejax.config import ConfigError
from moejax.routing import papers
from moejax.training import setup


def config(router=None, group='batch', accumulate=1, **evaluator):
  made = digits_config.get_config()
  made.model.moe.router = router or papers.vmoe(k=1, eval_capacity_factor=0.5)
  made.model.moe.dispatch = dict(name='reference')
  made.model.moe.group = group
  made.training.accumulate = accumulate
  made.evaluation.evaluators.test.update(evaluator)
  return made


def prepared(*args, **kwargs):
  return setup.prepare(config(*args, **kwargs), jax.devices()[:1])


@pytest.mark.parametrize('router, size', [
    (papers.vmoe(k=1), 24), (papers.expert_choice(), 8), (papers.switch(), 64)])
def test_a_batch_size_that_would_make_other_groups_is_refused(router, size):
  with pytest.raises(ConfigError) as error:
    prepared(router, batch_size=size)
  assert str(error.value).startswith(
      f'config.evaluation.evaluators.test.batch_size = {size}: the router of block_00 would see groups of {size * 4} '
      'tokens, but of 64 in training')


def test_groups_of_a_fixed_number_of_tokens_are_compared_by_how_they_divide_the_batch():
  prepared(group=16, batch_size=24)  # 16 tokens divide 24 x 4 as they do 16 x 4
  with pytest.raises(ConfigError, match='would see groups of 20 tokens, but of 16 in training'):
    prepared(group=20, batch_size=20)


def test_routers_that_sample_in_evaluation_require_the_training_batch_size():
  router = papers.top_k_dropless(k=1)
  router['score'] = dict(name='random')
  with pytest.raises(ConfigError, match='draw random numbers by position in the batch'):
    prepared(router, group='sequence', batch_size=8)


@pytest.mark.parametrize('router, group, sizes', [
    (None, 'sequence', (16, 24, 5)), (papers.expert_choice(), 'sequence', (16, 7)), (None, 8, (16, 10)),
    (papers.top_k_dropless(k=2), 'batch', (16, 60))])
def test_sizes_that_are_accepted_give_the_same_metrics(router, group, sizes):
  variants = [prepared(router, group, batch_size=size) for size in sizes]
  params, state = jax.jit(variants[0].model.init)(jax.random.key(0))
  found = [evaluation.measure(made.evaluators, params, state) for made in variants]
  for other in found[1:]:
    assert other == pytest.approx(found[0], rel=1e-5)  # sums in another order


@pytest.mark.parametrize('evaluator', ['accuracy', 'few_shot'])
@pytest.mark.parametrize('convention, factor', [('moejax', 0.), ('tutel', 0.01), ('widenet', 0.02)])
def test_a_router_that_only_evaluation_cannot_run_is_refused_before_training(evaluator, convention, factor):
  made = config(papers.vmoe(k=1))
  made.model.moe.router.place.update(dict(convention=convention, eval_capacity_factor=factor))
  made.evaluation.evaluators = dict(test=dict(name=evaluator))
  with pytest.raises(ConfigError, match=r'^config\.model\.moe\.router\.place\.eval_capacity_factor'):
    setup.prepare(made, jax.devices()[:1])


def test_by_default_evaluation_takes_the_rows_that_training_routes_together():
  made = prepared(accumulate=2)
  (_, spec), = made.evaluators['test'].passes
  assert spec['image'].shape[0] == 8
  prepared(accumulate=2, batch_size=8)
  with pytest.raises(ConfigError, match='groups of 64 tokens, but of 32 in training'):
    prepared(accumulate=2, batch_size=16)
