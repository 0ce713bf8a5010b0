"""Metrics of evaluators against float64 numpy loops over valid examples, and against values by hand.

The model is a fake whose logits are the batch's own: what is tested is what evaluators sum, exclude and divide by.
"""
import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import evaluation
from moejax.config import ConfigError
from moejax.parallel import mesh as mesh_lib

MESH = mesh_lib.build(dict(data=1), devices=jax.devices()[:1])


@dataclasses.dataclass
class ArrayPipeline:
  """Serves arrays of examples; pads the last batch with zeros, so `valid` is False there."""
  examples: dict
  batch_size: int = 4
  splits: tuple = ('train', 'test')

  def batch_spec(self, batch_size=None):
    size = batch_size or self.batch_size
    return {k: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for k, x in self.examples.items()}

  def evaluate(self, split, batch_size=None, rows=None):
    size, count = batch_size or self.batch_size, len(next(iter(self.examples.values())))
    for start in range(0, count, size):
      rows = {k: x[start:start + size] for k, x in self.examples.items()}
      yield {k: np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)]) for k, x in rows.items()}


def echo(params, state, batch, routers=None):
  """Returns the batch's own logits, nan on padding, so that any use of a padding example shows."""
  valid = batch['valid'] if 'valid' in batch else batch['loss_mask'] > 0
  return types.SimpleNamespace(logits=jnp.where(valid[..., None], batch['logits'], jnp.nan), routers=routers or {})


def run(name, pipeline, apply=echo, **config):
  evaluators = evaluation.build({'test': dict(name=name, **config)}, pipeline=pipeline, apply=apply, mesh=MESH)
  return evaluators['test']({}, {})


def labelled(count=11, classes=7, seed=0):
  rng = np.random.default_rng(seed)
  return ArrayPipeline(dict(logits=rng.normal(size=(count, classes)).astype(np.float32),
                            label=rng.integers(classes, size=count).astype(np.int32), valid=np.ones(count, bool)))


def text(seed=0, rows=5, length=6, vocab=9):
  rng = np.random.default_rng(seed)
  mask = (rng.random((rows, length)) < 0.7).astype(np.float32)
  return ArrayPipeline(dict(logits=rng.normal(size=(rows, length, vocab)).astype(np.float32),
                            targets=rng.integers(vocab, size=(rows, length)).astype(np.int32), loss_mask=mask,
                            segments=mask.astype(np.int32), target_bytes=(3 * mask).astype(np.int32)), batch_size=2)


def log_softmax(logits):
  logits = logits.astype(np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_accuracy_equals_a_loop_over_the_examples():
  pipeline = labelled()
  metrics = run('accuracy', pipeline)
  loss, top_1, top_5 = 0., 0, 0
  for logits, label in zip(pipeline.examples['logits'], pipeline.examples['label']):
    loss -= log_softmax(logits)[label]
    ranking = np.argsort(-logits)
    top_1 += ranking[0] == label
    top_5 += label in ranking[:5]
  assert metrics['examples'] == 11
  assert metrics['accuracy'] == pytest.approx(top_1 / 11)
  assert metrics['top_5_accuracy'] == pytest.approx(top_5 / 11)
  assert metrics['loss'] == pytest.approx(loss / 11, rel=1e-6)  # float32 cross-entropies


def test_top_5_is_left_out_where_it_would_always_be_1():
  assert 'top_5_accuracy' not in run('accuracy', labelled(classes=5))


def test_padding_examples_count_nowhere():
  pipeline = labelled(count=8)
  pipeline.examples['valid'][[1, 5]] = False
  kept = ArrayPipeline({k: x[pipeline.examples['valid']] for k, x in pipeline.examples.items()})
  assert run('accuracy', pipeline) == pytest.approx(run('accuracy', kept))


@pytest.mark.parametrize('name, pipeline', [('accuracy', labelled()), ('language_model', text())])
def test_metrics_do_not_depend_on_the_batch_size(name, pipeline):
  metrics = [run(name, pipeline, batch_size=size) for size in (1, 3, 16)]
  assert metrics[0] == pytest.approx(metrics[1], rel=1e-6) and metrics[0] == pytest.approx(metrics[2], rel=1e-6)


def test_several_labels_per_example_give_precision_at_1_and_a_loss_summed_over_classes():
  # sigmoid cross-entropy of logit z: log(1 + e^-z) for a positive, log(1 + e^z) for a negative.
  logits = np.array([[2., -1., 0.], [0., 3., 1.]], np.float32)
  labels = np.array([[1., 0., 1.], [1., 0., 0.]], np.float32)  # the top class is right in row 0, wrong in row 1
  loss = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log(2)
          + math.log(2) + math.log1p(math.exp(3)) + math.log1p(math.exp(1))) / 2
  metrics = run('accuracy', ArrayPipeline(dict(logits=logits, labels=labels, valid=np.ones(2, bool))))
  assert metrics == pytest.approx(dict(loss=loss, precision_at_1=0.5, examples=2), rel=1e-6)


def test_language_model_loss_is_a_mean_over_unmasked_tokens_of_the_whole_split():
  # Sequences of different lengths: a mean of batch means would differ.
  pipeline = text()
  metrics = run('language_model', pipeline)
  nll, hits, tokens = 0., 0, 0
  for row in range(5):
    for position in range(6):
      if pipeline.examples['loss_mask'][row, position]:
        logits, target = pipeline.examples['logits'][row, position], pipeline.examples['targets'][row, position]
        nll, hits, tokens = nll - log_softmax(logits)[target], hits + (logits.argmax() == target), tokens + 1
  assert metrics['tokens'] == tokens
  assert metrics['loss'] == pytest.approx(nll / tokens, rel=1e-6)
  assert metrics['accuracy'] == pytest.approx(hits / tokens)
  assert metrics['perplexity'] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
  assert metrics['bits_per_byte'] == pytest.approx(nll / math.log(2) / (3 * tokens), rel=1e-6)


def test_uniform_predictions_over_bytes_cost_8_bits_per_byte_and_have_perplexity_256():
  pipeline = ArrayPipeline(dict(logits=np.zeros((2, 3, 256), np.float32), targets=np.zeros((2, 3), np.int32),
                                loss_mask=np.ones((2, 3), np.float32), segments=np.ones((2, 3), np.int32),
                                target_bytes=np.ones((2, 3), np.int32)))
  metrics = run('language_model', pipeline)
  assert metrics['bits_per_byte'] == pytest.approx(8) and metrics['perplexity'] == pytest.approx(256, rel=1e-5)
  # The same loss with tokens that stand for four bytes each is a quarter of the bits.
  pipeline.examples['target_bytes'] *= 4
  assert run('language_model', pipeline)['bits_per_byte'] == pytest.approx(2)


def test_seq2seq_measures_the_decoder_and_gives_bits_per_byte_only_where_targets_are_text():
  pipeline = text()
  renamed = {'targets': 'decoder_targets', 'segments': 'decoder_segments'}
  decoder = ArrayPipeline({renamed.get(k, k): x for k, x in pipeline.examples.items()}, batch_size=2)
  assert run('seq2seq', decoder) == pytest.approx(run('language_model', pipeline))
  decoder.examples['target_bytes'][:] = 0
  assert 'bits_per_byte' not in run('seq2seq', decoder)


def test_router_metrics_are_means_over_valid_tokens():
  # Batches with 4 and 1 valid examples. dropped: (4*0.5 + 1*0) / 5 = 0.4.
  # load: (4*[1, 0] + 1*[0, 1]) / 5 = [0.8, 0.2], and with two experts the busiest has 1.6 times the uniform share.
  def apply(params, state, batch):
    full = batch['valid'].all()
    metrics = dict(dropped=jnp.where(full, 0.5, 0.), load=jnp.where(full, jnp.array([1., 0.]), jnp.array([0., 1.])))
    return echo(params, state, batch, {'block_01': types.SimpleNamespace(metrics=metrics)})
  metrics = run('accuracy', labelled(count=5), apply)
  assert metrics['router/block_01/dropped'] == pytest.approx(0.4)
  assert metrics['router/block_01/busiest'] == pytest.approx(1.6)
  assert metrics['router/block_01/idlest'] == pytest.approx(0.4)


def test_the_model_is_traced_once_however_often_it_is_evaluated():
  traces = []

  def apply(params, state, batch):
    traces.append(1)
    return echo(params, state, batch)
  evaluators = evaluation.build({'test': dict(name='accuracy')}, pipeline=labelled(), apply=apply, mesh=MESH)
  first, second = (evaluation.measure(evaluators, {}, {}) for _ in range(2))
  assert first == second and set(first) == {f'test/{k}' for k in ('loss', 'accuracy', 'top_5_accuracy', 'examples')}
  assert len(traces) == 1


def test_a_batch_spread_over_eight_devices_gives_the_same_metrics():
  pipeline = labelled(count=19)
  spread = evaluation.build({'test': dict(name='accuracy', batch_size=8)}, pipeline=pipeline, apply=echo,
                            mesh=mesh_lib.build(dict(data=4, expert=2)))
  assert spread['test']({}, {}) == pytest.approx(run('accuracy', pipeline), rel=1e-6)


@pytest.mark.parametrize('config, message', [
    (dict(name='acuracy'), "evaluators.test.name: there is no evaluator 'acuracy'. Did you mean 'accuracy'"),
    (dict(name='accuracy', spilt='test'), "config.evaluation.evaluators.test.spilt.*Did you mean 'split'"),
    (dict(name='accuracy', split='validation'), "there is no split 'validation'. Allowed: train, test"),
    (dict(name='language_model'), 'requires batches with targets and loss_mask, but config.data gives label, logits'),
    (dict(name='few_shot', shots=(0,)), 'shots must be a tuple whose items are each an int of at least 1'),
])
def test_evaluators_that_do_not_fit_the_data_are_refused_when_built(config, message):
  with pytest.raises(ConfigError, match=message):
    evaluation.build({'test': config}, pipeline=labelled(), apply=echo, mesh=MESH)


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused():
  with pytest.raises(ConfigError, match='batch_size: 4 examples do not divide over 8 shards'):
    evaluation.build({'test': dict(name='accuracy')}, pipeline=labelled(), apply=echo, mesh=mesh_lib.build(dict(data=-1)))
